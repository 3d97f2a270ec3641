"""Each distinct problem is measured once with all candidates, within the budget, and found again on disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from semisparse import SparseConfig, ops
from semisparse.errors import ConfigError
from semisparse.planning import building, measuring
from semisparse.planning.building import Bench
from semisparse.planning.candidates import as_candidates, default_candidates
from semisparse.planning.measuring import CAST, NO_MEMORY, PACK, WITHOUT, distinct
from semisparse.planning.packing import Packing
from semisparse.planning.problems import LayerUse, LinearProblem
from semisparse.planning.store import PlanStore
from semisparse.planning.timing import Times
from tests.planning.simulated import CPU, PACK_MS, POINTWISE, SHARES, SimulatedTimer, dense_ms, measurer

SMALL, LARGE = LinearProblem(16, 32, 32), LinearProblem(16, 64, 64)


def test_every_candidate_is_timed_with_dense() -> None:
    timer = SimulatedTimer()
    found = measurer(timer).measure([SMALL])[SMALL]
    assert timer.names == [["dense", *default_candidates(), CAST]]
    assert {name: times.ms / dense_ms(SMALL) for name, times in found.times.items()} == {
        name: SHARES[name] for name in ["dense", *default_candidates()] if name in SHARES
    }
    assert found.cast is not None


def test_the_pointwise_functions_of_a_compiled_layer_are_subtracted() -> None:
    timer = SimulatedTimer()
    found = measurer(timer, "2:4", "compiled").measure([SMALL])[SMALL]
    assert timer.names == [["dense", "2:4", WITHOUT]]
    assert (found.times["dense"].ms, found.times["2:4"].ms) == (dense_ms(SMALL), 0.875 * dense_ms(SMALL))
    assert POINTWISE > 0


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize(("grad_input", "grad_weight"), [(True, True), (False, True), (True, False), (False, False)])
def test_a_call_is_the_forward_and_backward_of_the_layer(mode: Any, grad_input: bool, grad_weight: bool) -> None:
    problem = LinearProblem(16, 32, 64, grad_input=grad_input, grad_weight=grad_weight)
    bench = Bench(problem, mode, CPU, lambda function: function)
    built = bench.build(None)
    built.call()
    built.call()  # gradients are not accumulated
    x = bench._x.detach().clone().requires_grad_(grad_input)
    weight, bias = (p.detach().clone().requires_grad_(grad_weight) for p in built.layer.parameters())
    between = F.silu if mode == "compiled" else (lambda value: value)
    y = between(F.linear(between(x), weight, bias))
    if y.requires_grad:
        y.backward(bench._dy)
    for found, expected in zip((bench._x, *built.layer.parameters()), (x, weight, bias), strict=True):
        assert (found.grad is None) == (expected.grad is None)
        assert found.grad is None or torch.equal(found.grad, expected.grad)
    bench.without_linear()()
    assert bench._x.grad is None or grad_input


def test_a_call_runs_in_the_autocast_of_the_problem() -> None:
    problem = LinearProblem(16, 32, 64, "bfloat16", "float32", "float32")
    built = Bench(problem, "eager", CPU).build(SparseConfig())
    seen = []
    built.layer.register_forward_hook(lambda layer, args, y: seen.append((args[0].dtype, y.dtype)))
    built.call()
    assert seen == [(torch.float32, torch.bfloat16)]
    assert built.layer.weight.grad is not None and built.layer.weight.grad.dtype == torch.float32


def test_compiled_calls_have_code_objects_of_their_own() -> None:
    codes = []

    def compile(function: Any) -> Any:
        codes.append(function.__code__)
        return function

    bench = Bench(SMALL, "compiled", CPU, compile)
    bench.build(None)
    bench.build(None)
    assert codes[0] is not codes[1] and codes[0].co_name != codes[1].co_name


def test_a_candidate_without_memory_is_dropped_and_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    build = Bench.build

    def scarce(self: Bench, config: SparseConfig | None) -> building.Built:
        if config is not None and config.precision is not None:
            raise torch.OutOfMemoryError
        if self.problem == LARGE:
            raise torch.OutOfMemoryError
        return build(self, config)

    monkeypatch.setattr(Bench, "build", scarce)
    store = PlanStore(tmp_path)
    found = measurer(store=store).measure([SMALL, LARGE])
    assert found[SMALL].dropped["fp8 + 2:4"] == NO_MEMORY and "2:4" in found[SMALL].times
    assert found[LARGE].dropped == {"dense": NO_MEMORY}
    assert not list(tmp_path.iterdir()), "another time there may be more memory"


def test_where_memory_runs_out_while_timing_the_last_candidate_is_dropped_and_said() -> None:
    class Scarce(SimulatedTimer):
        most = 2

        def __call__(self, problem: LinearProblem, calls: Any, mode: Any) -> dict[str, Times]:
            if len(calls) > self.most:
                raise torch.OutOfMemoryError
            return super().__call__(problem, calls, mode)

    timer = Scarce()
    found = measurer(timer, ["2:4", "2:4 + mvue", "fp8 + 2:4"]).measure([SMALL])[SMALL]
    assert list(found.times) == ["dense", "2:4"] and not found.final
    assert found.dropped == {"2:4 + mvue": NO_MEMORY, "fp8 + 2:4": NO_MEMORY}
    timer.most = 0
    assert measurer(timer, "2:4").measure([SMALL])[SMALL].dropped == {"dense": NO_MEMORY}


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_per_step_the_call_uses_what_was_packed_and_packing_is_timed_apart(mode: Any) -> None:
    timer = SimulatedTimer()
    how = measurer(timer, ["2:4", "dense fp8", "fp8 + 2:4"], mode, packing=Packing("per_step"))
    found = how.measure([SMALL])[SMALL]
    assert PACK + "fp8 + 2:4" in timer.names[0]
    # On the CPU 16 bits take the masked-dense route, which packs nothing, as does a layer without a mask.
    assert {name: times.ms for name, times in found.packs.items()} == {"fp8 + 2:4": PACK_MS / building._TOGETHER}
    assert found.times["fp8 + 2:4"].ms == SHARES["fp8 + 2:4"] * dense_ms(SMALL)


def test_a_call_after_packing_per_step_packs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    built = Bench(SMALL, "eager", CPU, per_step=True).build(SparseConfig(precision="fp8"))
    assert built.packed is not None and built.packed.count == built.packed.weights.layers == building._TOGETHER
    packed: list[str] = []
    whole = ops.pack_fp8
    monkeypatch.setattr(ops, "pack_fp8", lambda weight, mask, codes: packed.append(mask) or whole(weight, mask, codes))
    built.call()
    built.call()
    assert packed == []
    Bench(SMALL, "eager", CPU).build(SparseConfig(precision="fp8")).call()
    assert packed == ["transposable"]


def test_times_of_packing_come_back_from_disk_and_are_not_those_of_packing_at_each_forward(tmp_path: Path) -> None:
    first, again, other = SimulatedTimer(), SimulatedTimer(), SimulatedTimer()
    per_step: dict[str, Any] = {"store": PlanStore(tmp_path), "packing": Packing("per_step")}
    found = measurer(first, "fp8 + 2:4", **per_step).measure([SMALL])
    assert measurer(again, "fp8 + 2:4", **per_step).measure([SMALL]) == found and not again.seen
    assert not measurer(other, "fp8 + 2:4", store=PlanStore(tmp_path)).measure([SMALL])[SMALL].packs
    assert other.seen == [SMALL]


def test_a_candidate_that_fails_or_does_not_apply_is_left_out_with_its_reason() -> None:
    odd = LinearProblem(16, 32, 36)
    found = measurer(candidates=["2:4", "fp8 + 2:4"]).measure([odd])[odd]
    assert found.dropped == {"fp8 + 2:4": "N x K = 36 x 32, and fp8 needs multiples of 32"}
    found = measurer(candidates={"sparse only": SparseConfig(backend="cusparselt")}).measure([SMALL])[SMALL]
    assert found.dropped["sparse only"].startswith("failed: EngineError: backend='cusparselt' needs a CUDA weight")
    graph = measurer(SimulatedTimer({"dense": 1.0}), "2:4", "graph").measure([SMALL])[SMALL]
    assert graph.dropped == {"2:4": "it cannot be captured in a CUDA graph"}


def test_the_budget_is_kept_and_what_it_left_out_is_said() -> None:
    now = [0.0]
    timer = SimulatedTimer()

    def clock() -> float:
        now[0] += 1
        return now[0]

    lines: list[str] = []
    found = measurer(timer, seconds=7, clock=clock, progress=lines.append).measure([LARGE, SMALL])
    assert timer.seen == [LARGE]
    assert found[SMALL].dropped == {"dense": "not measured: the budget of 7 s was spent"}
    assert not found[SMALL].times
    assert [line.split(" (")[0] for line in lines] == [
        "measuring 1 of 2: 16 x 64 x 64 bfloat16",
        "measuring 2 of 2: 16 x 32 x 32 bfloat16",
    ]


def test_a_second_run_is_served_from_disk_and_anything_else_is_not(tmp_path: Path, caplog: Any) -> None:
    store, first = PlanStore(tmp_path), SimulatedTimer()
    found = measurer(first, store=store).measure([SMALL])
    second = SimulatedTimer()
    assert measurer(second, store=store).measure([SMALL]) == found
    assert second.seen == []
    measurer(second, store=store, mode="graph").measure([SMALL])
    measurer(second, "2:4", store=store).measure([SMALL])
    assert len(second.seen) == 2
    for damage in ("", "[]", '{"schema": 1}', "{"):
        for path in tmp_path.iterdir():
            path.write_text(damage)
        measurer(third := SimulatedTimer(), store=store).measure([SMALL])
        assert third.seen == [SMALL]
    assert "ignored the stored plan" in caplog.text


def test_a_folder_that_cannot_be_written_only_costs_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = PlanStore(tmp_path / "file" / "below")
    assert measurer(store=store).measure([SMALL])[SMALL].times


def test_results_of_another_machine_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PlanStore(tmp_path)
    measurer(store=store).measure([SMALL])
    here = measuring.machine(CPU)
    monkeypatch.setattr(measuring, "machine", lambda device: here | {"GPU": "another"})
    measurer(timer := SimulatedTimer(), store=store).measure([SMALL])
    assert timer.seen == [SMALL]


def test_problems_are_distinct_and_those_with_most_work_come_first() -> None:
    uses = [
        LayerUse("a", 32, 32, ((SMALL, 1.0),)),
        LayerUse("b", 64, 64, ((LARGE, 1.0),)),
        LayerUse("c", 32, 32, ((SMALL, 2.0),)),
        LayerUse("head", 32, 8, ((LinearProblem(16, 32, 8), 1.0),), stays="a head"),
    ]
    assert distinct(uses) == [LARGE, SMALL]


@pytest.mark.parametrize(
    "wrong",
    [
        ["3:4"],
        "3:4",
        [],
        {},
        {"a": 3},
        {"dense": SparseConfig()},
        {"a": SparseConfig(weight=None, activation="transposable")},
    ],
)
def test_wrong_candidates_are_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="candidates"):
        as_candidates(wrong)
