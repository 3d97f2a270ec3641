"""The table of compressed all-gathers: bytes, times, and results over slow links apart."""

import copy
from typing import Any

import pytest

from benchmarks import gathering_tables, scaling_tables, store, table


def result(slow: bool = False) -> dict[str, Any]:
    facts = {
        name: {"losses": [9.0], "peak_bytes": 1, "bytes_per_step": {"allgather_base": sent, "reduce_scatter_base": 8e9}}
        for name, sent in (("dense", 4e9), ("2:4, compressed", 3e9))
    }
    times = {name: {"median_ms": ms, "ratio": 10 / ms} for name, ms in (("dense", 10.0), ("2:4, compressed", 8.0))}
    eager = {"compiled": False, "tokens_per_rank": 8192, "facts": facts, "step": times, "gather": times}
    compiled = copy.deepcopy(eager) | {"compiled": True}
    for one in compiled["facts"].values():
        del one["bytes_per_step"]
    return {
        "kind": "gathering",
        "ranks": 2,
        "nccl": {scaling_tables.SLOW: "1"} if slow else {},
        "tables": [eager, compiled],
        "provenance": store.provenance(),
    }


def test_bytes_stand_beside_times_where_they_were_counted() -> None:
    rows = gathering_tables.table(result()).rows
    assert rows[1] == ("8,192, eager", "2:4, compressed", "8.0", "1.25", "8.0", "1.25", "3,000", "0.75", "8,000")
    assert rows[3] == ("8,192, compiled", "2:4, compressed", "8.0", "1.25", "8.0", "1.25", "", "", "")


def test_slow_links_have_a_table_of_their_own_and_without_results_the_command_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gathering_tables, "load", lambda kind: [result(slow=True), result()])
    before, after = gathering_tables.block().split(scaling_tables.THROUGH_HOST)
    assert before.count("| dense |") == after.count("| dense |") == 2 and "2 of one host" in after
    assert max(len(line) for line in after.splitlines() if line.startswith("|")) <= table.WIDTH + 2
    monkeypatch.setattr(gathering_tables, "load", lambda kind: [])
    assert gathering_tables.COMMAND in gathering_tables.block()
