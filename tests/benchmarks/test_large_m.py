"""The benchmark of many tokens at toy size on the CPU: what it times, and what its table shows."""

from collections.abc import Callable

import pytest

from benchmarks import large_m
from benchmarks.timing import Timing
from semisparse.gemm.autotune.algorithm import Choice

TOOK = {"dense bf16": 8.0, "2:4": 10.0, "2:4 in chunks": 5.0, "dense fp8": 4.0, "fp8 + 2:4": 2.5}


def test_products_of_more_than_a_chunk_are_timed_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
        for call in calls.values():
            call()
        took = {name: TOOK.get(name, 1.5) for name in calls}
        return {name: Timing(ms, ms, ms, 1, (ms,)) for name, ms in took.items()}

    monkeypatch.setattr(large_m, "interleaved", timed)
    found = large_m.benchmark([32, 64], 64, 128, 1, chunk=32)
    found["chosen"]["64"]["2:4"] = str(Choice(4, 4, 5.0, 8.0, "tuned", chunk=32, whole_us=10.0))
    shown = large_m.table([found])
    assert shown.columns == ("M x K x N", *TOOK, "fp8 + 2:4 in chunks")
    assert shown.rows == (
        ("32 x 64 x 128", "250000.0", "312500.0", "", "125000.0", "78125.0", ""),
        ("64 x 64 x 128", "125000.0", "156250.0", "78125.0", "62500.0", "39062.5", "23437.5"),
    )
    (note,) = shown.notes
    assert note.startswith("64 tokens, K x N = 64 x 128, 2:4: cuSPARSELt algorithm 4 in chunks of 32 tokens, 2.00x")


def test_token_counts_are_powers_of_two_up_to_the_largest() -> None:
    assert large_m.sizes(131072) == [8192, 16384, 32768, 65536, 131072]
