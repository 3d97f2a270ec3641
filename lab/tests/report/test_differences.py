"""Rows that end close together are shown as differences seed by seed, others as curves."""

import pytest

from lab.tests.report.test_cards import result
from semisparse_lab.report import differences, style


def rows(*ends: float, better: bool = True) -> list[dict]:
    """Two seeds per row; a row ends as far from the first as ends say."""
    return [
        result(f"row{order}", seed, value + seed, order=order, higher_is_better=better)
        for order, value in enumerate((90.0, *ends))
        for seed in (0, 1)
    ]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which kind of picture was made."""
    made: list[str] = []
    monkeypatch.setattr(differences, "dots", lambda results: made.append("dots") or b"")
    monkeypatch.setattr(differences, "curves", lambda results: made.append("curves") or b"")
    return made


@pytest.mark.parametrize(
    ("results", "kind"),
    [
        (rows(90.5, 89.5), "dots"),
        (rows(90.5, 87.0), "curves"),
        (rows(*[80.0] * len(style.COLOURS)), "dots"),  # too many to be told apart
        (rows(90.5, better=False), "dots"),  # half a percent and a little more
        (rows(92.0, better=False), "curves"),
        (rows(), "curves"),
        ([one for one in rows(90.5) if one["order"]], "curves"),  # there is nothing to compare with
    ],
)
def test_rows_within_a_point_and_too_many_rows_are_dots(results: list[dict], kind: str, drawn: list[str]) -> None:
    differences.picture(results)
    assert drawn == [kind]


def test_the_picture_grows_with_the_rows_and_a_diverged_run_does_no_harm() -> None:
    small, large = differences.dots(rows(90.5)), differences.dots(rows(90.5, 90.2, 89.9))
    height = [int.from_bytes(picture[20:24], "big") for picture in (small, large)]  # of a PNG's header
    assert small.startswith(b"\x89PNG") and height[1] > height[0]
    lost = [*rows(90.5), result("row2", 0, None, order=2)]  # a diverged run has no difference
    assert differences.dots(lost).startswith(b"\x89PNG")


def test_flip_rates_are_means_over_a_run_and_only_of_runs_in_which_they_were_measured() -> None:
    measured, blank = result("late", 0, 91.0, order=1), result("dense", 0, 90.0, order=0, flips=False)
    measured["run"]["epochs"][0]["flip_rate"], measured["run"]["epochs"][1]["flip_rate"] = 0.01, 0.03
    assert differences.flip_rates([blank, measured]) == {"row late": [pytest.approx(0.02)]}
    assert differences.dots([blank, measured]) != differences.dots(
        [blank, result("late", 0, 91.0, order=1, flips=False)]
    )
