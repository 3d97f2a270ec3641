"""The choices that ship are what the stored results make of them."""

from benchmarks import plan_table, shipped_table


def test_the_table_is_up_to_date():
    assert shipped_table.TARGET.read_text() == shipped_table.text(), "run `python benchmarks/shipped_table.py`"


def test_the_times_of_layers_are_up_to_date():
    assert plan_table.TARGET.read_text() == plan_table.text(), "run `python benchmarks/plan_table.py`"
