"""The table of choices that ships with the package."""

import pytest

from semisparse.gemm import shipped
from tests.gemm.tuning import FORWARD, shipped_row, table


def test_the_table_that_ships_is_legal():
    assert isinstance(shipped.table(), tuple)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"gpu": 3}, "gpu"),
        ({"cusparselt": "800"}, "cusparselt"),
        ({"cusparselt": True}, "cusparselt"),
        ({"bias": 1}, "bias"),
        ({"rows": [32, 17]}, "rows"),
        ({"rows": [0, 17]}, "rows"),
        ({"columns": [1]}, "columns"),
        ({"columns": 5}, "columns"),
        ({"algorithm": -1}, "algorithm"),
        ({"algorithm": 3}, "algorithm"),
        ({"extra": 1}, "exactly the fields"),
    ],
)
def test_a_row_that_is_wrong_is_named(change, named):
    with pytest.raises(ValueError, match=named):
        shipped.parse(table([shipped_row(**change)]))


def test_the_first_row_that_applies_is_taken(make_tuner):
    key = make_tuner()[0].key(FORWARD, -1)
    rows = [shipped_row(columns=[65, 999]), shipped_row(algorithm=None), shipped_row(algorithm=2)]
    found = shipped.find(shipped.parse(table(rows)), key)
    assert (found.algorithm, found.sparse_algorithm) == (None, 2)
    for name in ("gpu", "dtype", "b_order", "d_order", "token_axis"):
        assert shipped.find(shipped.parse(table([shipped_row(**{name: "another"})])), key) is None
    for name in ("rows", "reduction", "columns"):
        assert shipped.find(shipped.parse(table([shipped_row(**{name: [key[name] + 1, 10**6]})])), key) is None
        assert shipped.find(shipped.parse(table([shipped_row(**{name: [key[name], key[name]]})])), key)


@pytest.mark.parametrize(
    "text",
    ['[]', '{"schema": 2, "rows": []}', '{"schema": true, "rows": []}', '{"schema": 1}', '{"schema": 1, "rows": {}}',
     '{"schema": 1, "rows": "ab"}', '{"schema": 1, "rows": [], "more": 1}'],
)  # fmt: skip
def test_a_table_of_another_shape_is_refused(text):
    assert shipped.parse('{"schema": 1, "rows": []}') == ()
    with pytest.raises(ValueError, match="the table must be"):
        shipped.parse(text)
