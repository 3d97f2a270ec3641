"""The shipped table is what the stored results make of it, and it is one the package accepts."""

from benchmarks import shipped_table
from semisparse.gemm import shipped


def test_the_table_is_up_to_date():
    assert shipped_table.TARGET.read_text() == shipped_table.text(), "run `python benchmarks/shipped_table.py`"


def test_a_measured_choice_is_found_for_half_to_twice_its_tokens():
    rows = shipped.parse(shipped_table.text())
    key = next(
        {name: row[name] for name in shipped_table.EXACT}
        | {name: row[name][1] for name in ("rows", "reduction", "columns")}
        for row in rows
    )
    assert shipped.find(rows, key) == rows[0]["choice"]
    assert shipped.find(rows, key | {key["token_axis"]: 2 * key[key["token_axis"]]}) is None
