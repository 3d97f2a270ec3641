"""Each part of the trust suite on the CPU: right code passes, and a planted fault is counted and named."""

import torch

from semisparse.gemm.autotune.algorithm import Choice
from tests.trust import algorithms, convergence, determinism, graphs, leaks, numerics, soak
from tests.trust.machine import Machine
from tests.trust.outcome import Part, Row

SHAPE = (24, 64, 32)


def part(seconds: float = 60.0) -> Part:
    return Part("tried", seconds)


def machine() -> Machine:
    return Machine(torch.device("cpu"))


def failed(tried: Part) -> list[Row]:
    return [row for row in tried.rows if not row.passed]


def test_there_are_as_many_shapes_as_the_plan_asks_for() -> None:
    found = numerics.shapes()
    assert len(found) == len(set(found)) >= numerics.WANTED
    assert {1, 8192} <= {m for m, _, _ in found}
    assert len(set(algorithms.SHAPES)) == len(algorithms.SHAPES) >= algorithms.WANTED
    for problem in algorithms.of_shape(0, algorithms.SHAPES[0]):
        assert problem.refusal() is None


def test_numerics_hold_and_a_result_that_is_off_is_named(monkeypatch) -> None:
    tried = part()
    numerics.run(machine(), tried, chosen=[SHAPE, (5, 20, 36)])
    assert not failed(tried) and len(tried.rows) > 6
    right = numerics.step

    def off(layer, x, dy):
        y, dx, *others = right(layer, x, dy)
        return [y, dx * 1.01, *others]

    monkeypatch.setattr(numerics, "step", off)
    tried = part()
    numerics.run(machine(), tried, chosen=[SHAPE])
    assert failed(tried)
    assert all(fault.startswith("dx at M=24, K=64, N=32") for row in failed(tried) for fault in row.faults)


def test_nothing_is_passed_where_the_time_is_over() -> None:
    tried = part(0.0)
    numerics.run(machine(), tried, chosen=[SHAPE])
    assert [row.what for row in failed(tried)] == ["shapes"]


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
    soak.run(Growing(0), tried, shapes=(SHAPE,), cycles=1)
    assert not failed(tried)
    monkeypatch.setattr(determinism.Subject, "wrong", lambda self: torch.tensor(1))
    tried = part(0.5)
    soak.run(Growing(leaks.DEVICE_BYTES + 1), tried, shapes=(SHAPE,), cycles=1)
    assert {"steps with other bits", "growth on the device in bytes"} <= {row.what for row in failed(tried)}


def test_a_thread_of_the_soak_that_raises_ends_it(monkeypatch) -> None:
    def raises(self):
        raise RuntimeError("gone")

    tried = part(5.0)
    monkeypatch.setattr(soak, "CASES", ("2:4, bf16",))
    monkeypatch.setattr(determinism.Subject, "wrong", raises)
    soak.run(machine(), tried, shapes=(SHAPE,))
    assert "RuntimeError: gone" in failed(tried)[0].faults


def test_two_models_learn_alike_by_both_products_and_resume_bit_for_bit() -> None:
    tried = part()
    convergence.run(machine(), tried, steps=2, seeds=1)
    assert not failed(tried) and len(tried.rows) == 8


def test_another_curve_and_another_end_after_resuming_are_found(monkeypatch) -> None:
    made, right = convergence.subjects, convergence.Run.curve
    monkeypatch.setattr(convergence, "subjects", lambda here: made(here)[1:])
    monkeypatch.setattr(convergence.Run, "curve", lambda self: right(self) + (self.backend == "dense"))
    monkeypatch.setattr(convergence.Run, "load", lambda self, state: self.model.load_state_dict(state["model"]))
    tried = part()
    convergence.run(machine(), tried, steps=2, seeds=1)
    assert len(failed(tried)) == 2 and all(row.what.startswith("ViT: ") for row in failed(tried))


def test_curves_are_apart_by_what_is_allowed() -> None:
    curve = torch.tensor([2.0, 1.0])
    assert convergence.apart(curve, curve) == 0
    assert convergence.apart(curve + 0.12, curve) == 2.0
    assert convergence.apart(curve * torch.nan, curve) == float("inf")
