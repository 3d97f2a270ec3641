"""The table of dense before any sparse product and beside 2:4."""

from typing import Any

from benchmarks import cards, compare, fresh_tables


def result(kind: str, fresh: float | None, **ms: float) -> dict[str, Any]:
    name = next(iter(ms))
    times = {title: {"median_ms": one} for title, one in ms.items()}
    known = {} if fresh is None else {name: fresh, f"graph: {name}": 9.0}
    source = {"gpu": "NVIDIA H100 80GB HBM3"}
    return {"kind": kind, "mkn": [1, 2, 3], "fresh_ms": known, "times_ms": times, "provenance": source}


def test_a_process_without_sparse_products_has_no_time_beside_them_and_what_knows_no_fresh_dense_is_left_out() -> None:
    found = [
        result("compare-linear", 2.0, **{compare.DENSE: 2.1, "2:4": 1.0}),
        result("compare-linear", 1.9, **{compare.DENSE: 1.9, "torchao float8": 1.0}),
        result("linear", 4.0, dense=5.0, graph=1.0),
        result("linear", None, dense=5.0),
    ]
    assert fresh_tables.table(found).rows == (
        ("1 x 2 x 3", "1.900", "", "", "H100"),
        ("1 x 2 x 3", "2.000", "2.100", "+5.0 %", "H100"),
        ("1 x 2 x 3", "4.000", "5.000", "+25.0 %", "H100"),
    )


def test_the_page_shows_stored_results() -> None:
    assert "| before, ms | beside 2:4, ms | longer |" in cards.blocks()["slowed"]
