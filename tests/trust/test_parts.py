"""Each part of the trust suite on the CPU: right code passes, and a planted fault is counted and named."""

from contextlib import nullcontext
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from semisparse.gemm.autotune.algorithm import Choice
from tests.gemm import simulated
from tests.trust import algorithms, convergence, determinism, graphs, leaks, numerics, soak
from tests.trust.__main__ import budgets
from tests.trust.machine import Machine
from tests.trust.outcome import Part, Row

SHAPE = (24, 64, 32)


def part(seconds: float = 60.0) -> Part:
    return Part("tried", seconds)


def machine() -> Machine:
    return Machine(torch.device("cpu"))


def failed(tried: Part) -> list[Row]:
    return [row for row in tried.all_rows() if not row.passed]


def test_there_are_as_many_shapes_as_the_plan_asks_for() -> None:
    found = numerics.shapes()
    assert len(found) == len(set(found)) >= numerics.WANTED
    assert {1, 8192} <= {m for m, _, _ in found}
    assert len(set(algorithms.SHAPES)) == len(algorithms.SHAPES) >= algorithms.WANTED
    for problem in algorithms.of_shape(0, algorithms.SHAPES[0]):
        assert problem.refusal() is None


@pytest.mark.parametrize("name", budgets(Path()))
def test_a_part_takes_what_it_is_given(name: str) -> None:
    """Only a run of the whole suite would see it otherwise."""
    budget = budgets(Path())[name]
    for work in (budget.whole, budget.cut):
        signature(work).bind(machine(), part())


def test_the_halves_of_numerics_are_all_shapes_once(monkeypatch) -> None:
    seen: list[numerics.Shape] = []
    monkeypatch.setattr(numerics, "_check", lambda machine, case, shape, at, tally: seen.append(shape))
    monkeypatch.setattr(numerics, "IN_TURN", ("2:4, bf16",))
    monkeypatch.setattr(numerics, "ALWAYS", ())
    for name in ("numerics", "numerics-2"):
        budgets(Path())[name].whole(machine(), part())
    assert sorted(seen) == sorted(numerics.shapes())


def test_the_quarters_of_algorithms_are_all_shapes_and_choices_once(monkeypatch) -> None:
    monkeypatch.setattr(algorithms, "shipped", lambda: [entry(0, rows) for rows in range(16, 176, 16)])
    here, of = machine(), algorithms.QUARTERS
    quarters = [algorithms.tasks_of(here, of, first) for first in range(of)]
    assert sorted(map(str, (task for quarter in quarters for task in quarter))) == sorted(
        map(str, algorithms.tasks_of(here, 1, 0))
    )
    found = [{task.shape for task in quarter} - {None} for quarter in quarters]
    assert [len(shapes) for shapes in found] == [algorithms.WANTED // of] * of
    assert [sum(shape % 2 for shape in shapes) for shapes in found] == [algorithms.WANTED // of // 2] * of  # fp16
    taken = []
    monkeypatch.setattr(algorithms, "run", lambda here, part, every, first: taken.append((every, first)))
    for name, budget in budgets(Path()).items():
        if name.startswith("algorithms"):
            budget.whole(here, part())
    assert taken == [(of, first) for first in range(of)]


def entry(algorithm: int, rows: int) -> tuple[dict[str, object], Choice]:
    key = {
        "gpu": "Simulated", "cusparselt": 800, "dtype": "bfloat16", "b_order": "column", "d_order": "column",
        "token_axis": "columns", "bias": False, "rows": rows, "reduction": 32, "columns": 16,
    }  # fmt: skip
    return key, Choice(algorithm, algorithm, None, None, "shipped")


def test_an_algorithm_that_is_wrong_now_and_then_is_listed_and_no_shipped_choice_names_it(monkeypatch) -> None:
    runs = []

    def flaky(out) -> None:
        runs.append(1)
        if len(runs) % 3 == 2:
            out[0, 0] += 1

    tried, here = part(), machine()
    monkeypatch.setattr(algorithms, "SHAPES", [(16, 32, 32)])
    monkeypatch.setattr(algorithms, "of_shape", lambda at, shape: [algorithms.KINDS[0](*shape, torch.bfloat16)])
    monkeypatch.setattr(algorithms, "shipped", lambda: [entry(0, 32), entry(3, 64)])
    algorithms.run(here, tried, repeats=3)
    assert not failed(tried) and tried.details["listed"] == []
    here.engine._load().faults[3] = flaky
    tried = part()
    algorithms.run(here, tried, repeats=3)
    assert [(one["algorithm"], one["wrong"], one["runs"]) for one in tried.details["listed"]] == [(3, 1, 3)]
    assert [row.what for row in failed(tried)] == [
        "shipped choices that name a listed algorithm", "shipped choices whose own product was wrong",
    ]  # fmt: skip


def test_other_bits_on_a_stream_or_in_a_thread_are_counted(monkeypatch) -> None:
    monkeypatch.setattr(determinism, "OF_A_THREAD", 1)
    monkeypatch.setattr(determinism, "NAMES", ("2:4, bf16",))
    tried = part()
    determinism.run(machine(), tried, runs=1, shapes=(SHAPE,))
    assert not failed(tried)
    monkeypatch.setattr(determinism.Subject, "wrong", lambda self: torch.tensor(1))
    tried = part()
    determinism.run(machine(), tried, runs=1, shapes=(SHAPE,))
    assert [row.figure for row in failed(tried)] == [1, determinism.THREADS, 1]


@pytest.mark.parametrize(
    ("split", "wrong", "left_open"),
    [((1, 1), 0, 0), ((2, 1), 1, 0), ((1, 6), 1, 0), ((0, 0), 1, 0), ((-1, 1), 0, 1), ((-1, 5), 1, 1)],
)
def test_plans_whose_sums_are_split_are_counted(split: tuple[int, int], wrong: int, left_open: int) -> None:
    engine, library, _ = simulated.make_engine()
    library.split = split
    tried = part()
    with determinism.split_sums() as found:
        simulated.run(engine, simulated.FORWARD, 3)
    determinism._split(tried, found, {"one": 1, "other": 0}, 2)
    assert [row.figure for row in tried.rows] == [1, wrong, left_open]
    assert not tried.rows[0].passed and tried.rows[0].faults == ["other"] and tried.rows[1].passed == (not wrong)
    assert list(found.values()) == [list(split)] and "algorithm 3" in next(iter(found))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("sm90_segment_k_off_cusparselt", 0), ("sm90_segment_k_on_cusparselt", 1), ("splitKreduce_cusparselt", 1)],
)
def test_kernels_that_split_sums_by_name_are_counted(name: str, wrong: int) -> None:
    tried = part()
    determinism._named(tried, {name, "sm90_cusparselt"}, 2)
    assert [row.figure for row in tried.rows] == [2, wrong] and [row.passed for row in tried.rows] == [True, not wrong]
    determinism._named(tried, set(), 1)
    assert not tried.rows[2].passed


def test_kernels_of_the_library_are_told_by_their_names(monkeypatch) -> None:
    events = [SimpleNamespace(name=name) for name in ("sm90_segment_k_off_kernel_5x_cusparselt", "add_bias", "nvjet")]
    recorded = SimpleNamespace(events=lambda: events)
    monkeypatch.setattr(determinism, "profile", lambda activities: nullcontext(recorded))
    here = machine()
    monkeypatch.setattr(here, "wait", lambda: None)
    here.cuda = True
    with determinism.kernels_run(here) as names:
        assert not names
    assert names == {events[0].name}


def test_products_in_deterministic_mode_are_new() -> None:
    tokens = [shape[0] for shape in determinism.SHAPES]
    for multiple in (8, 16, 32):
        padded = {-(-one // multiple) for one in tokens}
        assert -(-(tokens[0] + determinism.BEYOND) // multiple) not in padded


def test_the_errors_of_threads_are_kept() -> None:
    assert determinism.together([lambda: None, lambda: [][0]]) == ["IndexError: list index out of range"]


def test_a_replay_that_does_not_see_new_inputs_is_counted(monkeypatch) -> None:
    monkeypatch.setattr(graphs, "NAMES", ("2:4, bf16",))
    tried = part()
    graphs.run(machine(), tried, replays=2, modes=(), sizes=(32, 64))
    assert not failed(tried)
    stale = machine()
    monkeypatch.setattr(stale, "capture", lambda call: (call(), lambda: None))
    tried = part()
    graphs.run(stale, tried, replays=2, modes=(), sizes=(32, 64))
    assert [row.faults for row in failed(tried)] == [["2:4, bf16: 12 results"]]


def test_token_counts_share_compilations_and_one_more_is_an_error(monkeypatch) -> None:
    monkeypatch.setattr(graphs, "BATCH_SIZES", 4)
    assert graphs._compilations(machine(), (32, 64), backend="aot_eager") == (2, 2)
    monkeypatch.setattr(graphs, "model", lambda *given, **options: Recompiling())
    assert graphs._compilations(machine(), (32, 64), backend="aot_eager")[1] == 1


class Recompiling(torch.nn.Linear):
    """Compiled again where the number of tokens is no multiple of 4."""

    def __init__(self) -> None:
        super().__init__(32, 32, dtype=torch.bfloat16)

    def forward(self, x):
        return super().forward(x) * (3 if x.shape[0] % 4 else 1)


def test_a_mode_of_the_compiler_that_fails_or_has_no_time_does_not_pass(monkeypatch) -> None:
    def fails(here, case, mode, sizes):
        if mode == "default":
            raise RuntimeError("gone")
        return 0

    monkeypatch.setattr(graphs, "NAMES", ("2:4, bf16",))
    monkeypatch.setattr(graphs, "_replayed", lambda *given: 0)
    monkeypatch.setattr(graphs, "COMPILED", ("2:4, bf16",))
    monkeypatch.setattr(graphs, "_compiled", fails)
    monkeypatch.setattr(graphs, "_compilations", lambda here, sizes: (2, graphs.BATCH_SIZES - graphs.SETTLED))
    tried = part()
    graphs.run(machine(), tried, modes=("default", "reduce-overhead"))
    assert [row.what for row in failed(tried)] == [
        "2:4, bf16: results with other bits, compiled in mode default", "cases that raised",
    ]  # fmt: skip
    tried = part(0.0)
    graphs.run(machine(), tried, modes=("default",))
    assert ["no time was left"] in [row.faults for row in failed(tried)]


class Growing(Machine):
    """Every look at the memory of the device finds more in use, by some bytes."""

    def __init__(self, by: int) -> None:
        super().__init__(torch.device("cpu"))
        self.by, self.found = by, 0

    def allocated(self) -> int:
        self.found += self.by
        return self.found

    def resident(self) -> int:
        return 0


def test_the_memory_of_the_process_is_measured() -> None:
    before = machine().resident()
    kept = bytearray(64 << 20)
    assert machine().resident() - before > len(kept) // 2


def test_growth_on_the_device_is_found(monkeypatch) -> None:
    monkeypatch.setattr(leaks, "NAMES", ("2:4, bf16",))
    monkeypatch.setattr(leaks, "FIRST", 8)
    tried = part()
    leaks.run(Growing(leaks.DEVICE_BYTES + 1), tried, steps=2, shapes=2, layers=2)
    device = [row for row in tried.rows if row.what == "growth on the device in bytes"]
    assert len(device) == 2 and not any(row.passed for row in device)
    tried = part()
    leaks.run(Growing(0), tried, steps=2, shapes=2, layers=2)
    assert not failed(tried)


def test_a_soak_counts_other_bits_and_growth(monkeypatch) -> None:
    tried = part(0.5)
    monkeypatch.setattr(soak, "CASES", ("2:4, bf16",))
    soak.run(Growing(0), tried, shapes=(SHAPE,), cycles=1, kills=0)
    assert not failed(tried)
    monkeypatch.setattr(determinism.Subject, "wrong", lambda self: torch.tensor(1))
    tried = part(0.5)
    soak.run(Growing(leaks.DEVICE_BYTES + 1), tried, shapes=(SHAPE,), cycles=1, kills=0)
    assert {"steps with other bits", "growth on the device in bytes"} <= {row.what for row in failed(tried)}


def test_a_thread_of_the_soak_that_raises_ends_it(monkeypatch) -> None:
    def raises(self):
        raise RuntimeError("gone")

    tried = part(5.0)
    monkeypatch.setattr(soak, "CASES", ("2:4, bf16",))
    monkeypatch.setattr(determinism.Subject, "wrong", raises)
    soak.run(machine(), tried, shapes=(SHAPE,), kills=0)
    assert "RuntimeError: gone" in failed(tried)[0].faults


def test_two_models_learn_alike_by_both_products_and_resume_bit_for_bit() -> None:
    tried = part()
    convergence.run(machine(), tried, steps=2, seeds=1)
    assert not failed(tried) and len(tried.rows) == 12


def test_the_gap_of_means_is_measured_by_the_spread_of_seeds() -> None:
    seeds = torch.tensor([1.0, 2.0, 3.0])
    assert convergence.mean_gap(seeds, seeds) == 0
    assert convergence.mean_gap(seeds + 2, seeds) == 1
    assert convergence.mean_gap(seeds * torch.nan, seeds) == float("inf")
    assert convergence.mean_gap(torch.ones(2), torch.zeros(2)) == float("inf")


def test_gradients_that_are_off_in_the_first_step_are_found(monkeypatch) -> None:
    here, right = machine(), convergence._gradients
    subject = convergence.subjects(here)[1]
    assert convergence._first_step(here, subject) <= 2
    calls = []

    def off(run, *given):
        calls.append(1)
        return [one * (1.1 if len(calls) == 2 else 1) for one in right(run, *given)]

    monkeypatch.setattr(convergence, "_gradients", off)
    assert convergence._first_step(here, subject) > 2


def test_another_curve_and_another_end_after_resuming_are_found(monkeypatch) -> None:
    made, right = convergence.subjects, convergence.Run.curve
    monkeypatch.setattr(convergence, "subjects", lambda here: made(here)[1:])
    monkeypatch.setattr(convergence.Run, "curve", lambda self: right(self) + (self.backend == "dense"))
    monkeypatch.setattr(convergence.Run, "load", lambda self, state: self.model.load_state_dict(state["model"]))
    tried = part()
    convergence.run(machine(), tried, steps=2, seeds=1)
    assert len(failed(tried)) == 2 and all(row.what.startswith("ViT: ") for row in failed(tried))


def test_models_for_which_no_time_is_left_do_not_pass(monkeypatch) -> None:
    made = convergence.subjects
    monkeypatch.setattr(convergence, "subjects", lambda here: made(here)[1:])
    tried = part(60.0)
    ticks = iter(range(1, 10**6))
    tried.clock = lambda: tried.begin + 20.0 * next(ticks)
    convergence.run(machine(), tried, steps=4, seeds=1)
    assert [row.what for row in failed(tried)] == ["ViT: seeds", "ViT: parameters that differ after resuming"]
    assert not tried.raised


def test_curves_are_apart_by_what_is_allowed() -> None:
    curve = torch.tensor([2.0, 1.0])
    assert convergence.apart(curve, curve) == 0
    assert convergence.apart(curve + 0.12, curve) == 2.0
    assert convergence.apart(curve * torch.nan, curve) == float("inf")
