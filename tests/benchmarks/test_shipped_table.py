"""The choices that ship are what the stored results make of them."""

from benchmarks import shipped_table


def test_the_table_is_up_to_date():
    assert shipped_table.TARGET.read_text() == shipped_table.text(), "run `python benchmarks/shipped_table.py`"
