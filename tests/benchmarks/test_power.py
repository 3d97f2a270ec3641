"""What a sparse product changes in a process, in one beside it and in the next: rows, sentences, the other process."""

import pytest

from benchmarks import power


def process(kernel: str, watts: float, ms: float) -> dict:
    def stage(watts: float, ms: float) -> dict:
        reading = {"watts": watts, "celsius": 40.0, "mhz": 1455.0}
        return {"idle": reading, "dense_ms": ms, "dense": reading}

    return {"kernel": kernel, "before": stage(100.0, 4.0), "after": stage(watts, ms)}


def test_changes_are_means_over_the_processes_of_a_kernel_and_kernels_that_did_not_run_are_left_out() -> None:
    ran = [process(power.SPARSE, 112.0, 4.2), process(power.SPARSE, 116.0, 4.4), process(power.BESIDE, 100.0, 4.1)]
    result = {"mkn": [3, 4, 5], "processes": ran}
    watts, slower = power.changes(result, power.SPARSE)
    assert watts == pytest.approx(14.0) and slower == pytest.approx(0.075)
    assert power.told(result) == (
        "Time of dense products, and power of the idle GPU: after a 2:4 product +7.5 % (+14 W), "
        "after a 2:4 product in a process that is still there +2.5 % (+0 W)."
    )
    assert [row[-1] for row in power.table([result]).rows] == ["+5.0%", "+10.0%", "+2.5%"]


def test_every_kernel_has_a_row() -> None:
    assert set(power.ORDER) == set(power.KERNELS)


def test_the_other_process_runs_a_sparse_product_and_stays_or_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    beside: list = []
    monkeypatch.setattr(power, "_BESIDE", beside)
    power._in_another_process(stays=True)
    (other,) = beside
    try:
        assert other.poll() is None
        other.communicate(timeout=60)  # its input ends, as when this process does
        assert other.returncode == 0
    finally:
        other.kill()
    power._in_another_process(stays=False)
    assert beside == [other]


def test_another_process_that_fails_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power, "_COMMAND", ("false",))
    with pytest.raises(RuntimeError, match="ended with 1 before its product"):
        power._in_another_process(stays=True)
