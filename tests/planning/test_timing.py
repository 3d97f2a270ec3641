"""Timing on a simulated GPU whose calls take as long as they say."""

import gc
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from semisparse.planning import timing
from semisparse.planning.timing import Times, cuda_times, plus, step_times


class Device:
    """A clock that calls advance; a captured call costs the device's part alone."""

    def __init__(self) -> None:
        self.now, self.capturing, self.order = 0.0, False, []  # type: float, bool, list[str]

    def call(self, name: str, device_ms: float, host_ms: float, capturable: bool = True) -> Callable[[], None]:
        def run() -> None:
            if self.capturing and not capturable:
                raise RuntimeError("operation not permitted when stream is capturing")
            self.last = device_ms
            if not self.capturing:
                self.now += max(device_ms, host_ms)
                self.order.append(name)

        return run

    def event(self, **_: Any) -> Any:
        event = SimpleNamespace(at=0.0, synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda end: end.at - event.at
        return event

    @contextmanager
    def graph(self, graph: Any) -> Iterator[None]:
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False
        taken = self.last
        graph.replay = lambda: setattr(self, "now", self.now + taken)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    stream = SimpleNamespace(wait_stream=lambda other: None)
    replaced = {
        "Event": made.event,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda one: nullcontext(),
        "graph": made.graph,
        "CUDAGraph": SimpleNamespace,
        "synchronize": lambda: None,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: made.now / 1000)
    return made


def test_the_device_alone_is_timed_beside_the_call(device: Device) -> None:
    calls = {"a": device.call("a", 2.0, 0.5), "host": device.call("host", 0.5, 4.0)}
    found = cuda_times(calls, "eager")
    assert {name: (times.ms, times.device_ms) for name, times in found.items()} == {
        "a": (pytest.approx(2.0), pytest.approx(2.0)),
        "host": (pytest.approx(4.0), pytest.approx(0.5)),
    }
    assert found["host"].host_ms == pytest.approx(4.0)
    graphs = cuda_times(calls, "graph")
    assert graphs["host"].ms == graphs["host"].device_ms == pytest.approx(0.5)
    assert graphs["host"].host_ms is None


def test_what_cannot_be_captured_is_left_out_of_graphs_and_timed_as_it_is_otherwise(device: Device) -> None:
    calls = {"a": device.call("a", 2.0, 0.5), "b": device.call("b", 1.0, 0.5, capturable=False)}
    assert list(cuda_times(calls, "graph")) == ["a"]
    found = cuda_times(calls, "compiled")
    assert found["b"].device_ms is None and found["b"].on_device == found["b"].ms == pytest.approx(1.0)


def test_blocks_are_interleaved_so_that_a_slow_drift_does_not_flatter_the_first(device: Device) -> None:
    timing.interleaved({name: device.call(name, 20.0, 0.0) for name in "ab"})
    blocks = [name for name, before in zip(device.order, [None, *device.order], strict=False) if name != before]
    assert blocks == ["a", "b"] * (1 + timing.ROUNDS)


def test_a_block_that_was_disturbed_does_not_count(device: Device) -> None:
    taken: list[float] = []

    def call() -> None:
        taken.append(100.0 if 40 < len(taken) < 60 else 10.0)
        device.now += taken[-1]

    assert timing.interleaved({"": call})[""] == pytest.approx(10.0)
    assert statistics.mean(taken) > 11


def test_a_step_is_timed_whole_and_on_the_host(device: Device) -> None:
    found = step_times(device.call("step", 30.0, 7.0))
    assert (found.ms, found.device_ms) == (pytest.approx(30.0), None)
    assert found.on_device == found.ms


def test_host_time_is_no_longer_than_the_step(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "host_ms", lambda call, calls: 40.0)  # a moment when the host was slow
    assert step_times(device.call("step", 30.0, 7.0)).host_ms == pytest.approx(30.0)


@pytest.fixture
def collected() -> Iterator[list[int]]:
    """The generations that are collected, with thresholds at which the old one is, soon."""
    generations: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            generations.append(info["generation"])

    before = gc.get_threshold()
    gc.callbacks.append(note)
    gc.set_threshold(10, 1, 1)
    yield generations
    gc.callbacks.remove(note)
    gc.set_threshold(*before)


def test_old_garbage_is_collected_before_blocks_and_not_within_them(collected: list[int]) -> None:
    def allocate() -> list[list[object]]:
        return [[] for _ in range(200 + len(gc.get_objects()))]  # full collections wait for a quarter more objects

    kept = allocate()
    assert 2 in collected
    collected.clear()
    with pytest.raises(ZeroDivisionError), timing.without_full_collections():
        assert 2 in collected
        collected.clear()
        kept += allocate()
        assert set(collected) == {0, 1}
        _ = 1 / 0
    assert gc.get_threshold() == (10, 1, 1)


def test_sums_keep_what_is_not_known() -> None:
    assert plus(Times(1.0, 1.0, None, 8), Times(2.0, None, 1.0, 4), -0.5) == Times(0.0, None, None, 6)


def test_a_candidate_may_have_the_name_of_the_graph_of_another(device: Device) -> None:
    calls = {"a": device.call("a", 2.0, 0.5), "graph: a": device.call("graph: a", 3.0, 0.5)}
    found = cuda_times(calls, "eager")
    assert {name: times.ms for name, times in found.items()} == {
        "a": pytest.approx(2.0),
        "graph: a": pytest.approx(3.0),
    }
    assert found["a"].device_ms == pytest.approx(2.0)
