"""B3: the same bits on four streams and from eight threads, while the allocator hands memory around."""

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from semisparse.gemm.cusparselt import Description, Handle, Plan
from semisparse.gemm.problem import Problem
from tests.trust.cases import Case, cases, fill, make_layer, normal, step
from tests.trust.machine import Machine, differing
from tests.trust.outcome import Part, Row

RUNS = 250
STREAMS = 4
THREADS = 8
OF_A_THREAD = 25
"""Steps of each thread and layer."""

SHAPES = ((200, 256, 512), (512, 512, 256), (1000, 1024, 512))
NAMES = ("2:4, bf16", "2:4 activation, bf16", "2:4 + mvue, bf16", "fp8 + 2:4 + mvue")
"""With SHAPES the twelve kinds and shapes of the plan."""


SPLIT_K, SPLIT_K_MODE = 3, 4
"""Attributes of cuSPARSELt's cusparseLtMatmulAlgAttribute_t."""

SPLITTING = (5, 6)
"""Of cusparseLtSplitKMode_t: CUSPARSELT_SPLITK and CUSPARSELT_STREAMK; others split by the factor alone."""

LEFT_OPEN = -1
"""A factor that was not set, as cuSPARSELt 0.8.0 gives it on an H100: then its kernels decide, and their names tell."""

SPLIT_NAMES, WHOLE = ("segment_k_on", "splitk", "split_k", "streamk", "stream_k"), "segment_k_off"
"""What the names of the library's kernels say where sums are split, and where they are not."""

UNKNOWN = -(2**31)

BEYOND = 32
"""More tokens, so that products are new: they are padded to multiples of 8, 16 or 32, by operand and precision."""


class Subject:
    """A layer, its operands, and the bits that every step of it must give."""

    def __init__(self, machine: Machine, case: Case, shape: tuple[int, int, int]) -> None:
        m, k, n = shape
        self.name = f"{case.name} at M={m}, K={k}, N={n}"
        self.layer: nn.Linear = make_layer(machine, case, k, n)
        fill(machine, self.layer, integers=False)
        self.x, self.dy = (normal(machine, m, size, seed=at, dtype=case.dtype) for at, size in ((5, k), (6, n)))
        for _ in range(2):  # the first step tunes, the second one is started by C++
            self.expected = [one.clone() for one in step(self.layer, self.x, self.dy)]
        self.expected = [one.clone() for one in step(self.layer, self.x, self.dy)]
        machine.wait()

    def wrong(self) -> Tensor:
        """How many results of one more step differ, on the device."""
        return differing(step(self.layer, self.x, self.dy), self.expected)


def churn(machine: Machine, turn: int) -> None:
    """Memory that is taken, spoilt and given back on the current stream."""
    torch.full((1 << (10 + turn % 12),), float("nan"), device=machine.device)


def run(machine: Machine, part: Part, runs: int = RUNS, shapes: tuple[tuple[int, int, int], ...] = SHAPES) -> None:
    """Compare until the budget is spent: streams in half of it, then threads.

    Args:
        machine: Where.
        part: Gets the rows.
        runs: Rounds on the streams.
        shapes: M, K, N of each layer.
    """
    machine.tune_quickly()
    subjects = [Subject(machine, case, shape) for case in cases(machine, NAMES) for shape in shapes]
    with part.attempt("streams"):
        _streams(machine, part, subjects, runs)
    with part.attempt("threads"):
        _threads(machine, part, subjects)
    with part.attempt("deterministic mode"), _deterministic():
        (m, k, n), given, made = shapes[0], [], {}
        with split_sums() as found:  # plans are made once: these products must be new
            for case in cases(machine, NAMES):
                before = len(found)
                given.append(Subject(machine, case, (m + BEYOND, k, n)))
                made[case.name] = len(found) - before
        _split(part, found, made, len(given) if machine.cuda else 0)
        with kernels_run(machine) as names:
            for subject in given:
                subject.wrong()
        _named(part, names, 1 if machine.cuda else 0)
        _again(machine, part, given)


def _streams(machine: Machine, part: Part, subjects: list[Subject], runs: int) -> None:
    streams, in_time = machine.streams(STREAMS), part.share(0.5)
    counts = {subject.name: torch.zeros((), dtype=torch.int64, device=machine.device) for subject in subjects}
    # A count of its own for each stream: adding to one from four would be a race of this test.
    found: list[dict[str, Tensor]] = [{name: one.clone() for name, one in counts.items()} for _ in streams]
    machine.wait()
    done = 0
    rounds = part.add(Row("B3", "rounds on four streams", f"of {runs}", 0, runs, "at least"))
    bits = part.add(Row("B3", "layers with other bits on a stream", "", None))

    def tell() -> None:
        machine.wait()
        totals = {name: sum(int(one[name]) for one in found) for name in counts}
        faults = [f"{name}: {total} results" for name, total in totals.items() if total]
        bits.size = f"{len(subjects)} layers, {done * STREAMS} steps each on {STREAMS} streams"
        rounds.figure, bits.figure, bits.faults = done, len(faults), faults
        part.changed()

    for turn in range(runs):
        if not in_time():
            break
        for at, stream in enumerate(streams):
            with stream():
                for subject in subjects:
                    churn(machine, turn + at)
                    found[at][subject.name] += subject.wrong()
        done += 1
        if done % 25 == 0:
            tell()
    tell()


def _threads(machine: Machine, part: Part, subjects: list[Subject]) -> None:
    faults: list[str] = []
    done = [0] * THREADS

    def work(at: int) -> None:
        with machine.streams(1)[0]():
            for turn in range(OF_A_THREAD):
                for subject in subjects:
                    if part.left() <= 0:
                        return
                    churn(machine, turn + at)
                    if int(subject.wrong()):
                        faults.append(f"{subject.name}, thread {at}")
                    done[at] += 1

    raised = together([lambda at=at: work(at) for at in range(THREADS)])
    size = f"{sum(done)} steps of {THREADS} threads"
    part.add(Row("B3", "steps of eight threads with other bits, or an error", size, len(faults) + len(raised),
                 faults=[*raised, *faults]))  # fmt: skip
    most = OF_A_THREAD * len(subjects)
    part.add(Row("B3", "steps of the slowest thread", f"of {most}", min(done), most, "at least"))


def together(works: list[Callable[[], Any]]) -> list[str]:
    """Run all at once, each in a thread; the errors of those that raise."""
    raised: list[str] = []

    def run_one(work: Callable[[], Any]) -> None:
        try:
            work()
        except BaseException as error:
            raised.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=run_one, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@contextmanager
def _deterministic() -> Any:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def split_sums() -> Iterator[dict[str, list[int]]]:
    """What the library says of each plan that is made in the block: the factor of split-K, and its mode."""
    found: dict[str, list[int]] = {}
    describe, build = Handle._described, Handle._build
    selections = threading.local()

    def described(self: Handle, *given: Any) -> Description:
        known = describe(self, *given)
        selections.last = known.selection
        return known

    def built(self: Handle, problem: Problem, algorithm: int, bias: int) -> Plan:
        plan, values = build(self, problem, algorithm, bias), []
        for attribute in (SPLIT_K, SPLIT_K_MODE):
            value = ctypes.c_int32(UNKNOWN)
            with suppress(self._lib.cuSPARSELtError):  # refused: it stays unknown
                where = attribute, ctypes.addressof(value), ctypes.sizeof(value)
                self._lib.matmul_alg_get_attribute(self.handle, selections.last, *where)
            values.append(value.value)
        found[f"{problem}, algorithm {algorithm}"] = values
        return plan

    with mock.patch.object(Handle, "_described", described), mock.patch.object(Handle, "_build", built):
        yield found


def _split(part: Part, found: dict[str, list[int]], made: dict[str, int], least: int) -> None:
    """Sums that are split may depend on the order in which their parts arrive.

    Args:
        part: Gets the rows.
        found: As split_sums gives it.
        made: Plans of each kind of layer.
        least: Kinds that must make plans.
    """
    part.details["split-K factor and mode"] = found
    none = [name for name, count in made.items() if not count]
    size = f"{len(found)} plans of {len(made)} kinds"
    part.add(Row("B3", "kinds of layers that make plans in deterministic mode", size, len(made) - len(none), least,
                 "at least", none))  # fmt: skip
    faults = [f"{name}: factor {factor}, mode {mode}" for name, (factor, mode) in found.items()
              if factor not in (1, LEFT_OPEN) or mode in SPLITTING]  # fmt: skip
    part.add(Row("B3", "of those plans, set to split their sums", f"{len(found)} plans", len(faults), faults=faults))
    open_ = sum(factor == LEFT_OPEN for factor, _ in found.values())
    part.add(Row("B3", "of those plans, left to the library", f"{len(found)} plans", open_, None, "reported"))


@contextmanager
def kernels_run(machine: Machine) -> Iterator[set[str]]:
    """Names of the library's kernels that run inside the block, filled when it ends; none on the CPU."""
    names: set[str] = set()
    if not machine.cuda:
        yield names
        return
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        yield names
        machine.wait()
    names.update(event.name for event in recorded.events() if "cusparselt" in event.name.lower())


def _named(part: Part, names: set[str], least: int) -> None:
    """Where a plan leaves its sums to the library, the names of its kernels say whether they are split.

    Args:
        part: Gets the rows.
        names: Of the library's kernels.
        least: Kernels that must have run.
    """
    part.details["kernels of the library"] = sorted(names)
    whole = sum(WHOLE in name.lower() for name in names)
    size = f"{len(names)} kernels, {whole} of them say {WHOLE}"
    part.add(Row("B3", "kernels of the library that run in deterministic mode", size, len(names), least, "at least"))
    faults = sorted(name for name in names if any(one in name.lower() for one in SPLIT_NAMES))
    part.add(Row("B3", "of those kernels, split their sums by name", size, len(faults), faults=faults))


def _again(machine: Machine, part: Part, subjects: list[Subject]) -> None:
    """With torch.use_deterministic_algorithms on, which switches tuning off."""
    wrong = {subject.name: sum(int(subject.wrong()) for _ in range(10)) for subject in subjects}
    faults = [f"{name}: {count} results" for name, count in wrong.items() if count]
    size = f"{len(subjects)} layers, 10 steps each"
    part.add(Row("B3", "layers with other bits in deterministic mode", size, len(faults), faults=faults))
