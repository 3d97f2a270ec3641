"""Tables, bars and pictures of time to loss from complete, partial and diverged runs."""

import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from lab.tests.made_timed import ARMS, LOST, SETTINGS, complete, made
from semisparse_lab.errors import DataError
from semisparse_lab.report.bars import bars, steps_needed
from semisparse_lab.report.rates import load_rates, rates
from semisparse_lab.report.time_to_loss_card import card
from semisparse_lab.report.time_to_loss_curves import curves
from semisparse_lab.report.time_to_loss_tables import diverged, summary

WIDTH = 122  # of a table's line, as the tests of the generated pages have it
PARTIAL = [
    *(made(arm, 0) for arm in ARMS),
    *(made(arm, 1) for arm in ("bf16", "fp8-24")),
    made("float8", 0, "seconds", 13),
    made("fp8-24", 0, "seconds", 20),
]
DIVERGED = [
    *complete((0, 1)),
    made("bf16", 2),
    made("fp8-24", 2, **LOST),
    *(made("fp8-24-mvue", 3, budget, **LOST) for budget in ("tokens", "seconds")),
]


def lines(text: str, begin: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(begin)]


def test_a_line_per_arm_says_all_in_short() -> None:
    text = summary(complete())
    names = ["torchao float8", "fp8 + 2:4", "2:4", "fp8 + 2:4 + mvue"]
    assert [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines()[2:6]] == names
    # With seed 0, float8 is at 2.0, dense's last loss after 20 s, in 10 steps of 1.5 s; with others a little sooner.
    assert lines(text, "| torchao float8 |")[0].startswith("| torchao float8 | 3 | ")
    assert lines(text, "| torchao float8 |")[0].endswith("| - | 1.33x | 1.35x |")
    equal = 100 * (1.0 / 2.0 - 1), 100 * (0.97 / 1.99 - 1), 100 * (0.94 / 1.98 - 1)
    (row,) = lines(text, "| fp8 + 2:4 |")
    assert f"| {sum(equal) / 3:.2f} ± " in row and "% (< 0.001) |" in row and "| 2.00x |" in row
    assert diverged(complete()) == ""


def test_comparisons_of_other_seeds_are_counted_and_those_that_lack_are_empty() -> None:
    text = summary(PARTIAL)
    assert lines(text, "| 2:4 |") == ["| 2:4 | 1 | +0.00 % |  |  | 1.25x | 1.25x |"]
    assert lines(text, "| fp8 + 2:4 |")[0].startswith("| fp8 + 2:4 | 2 / 1 / 1 | ")
    assert lines(text, "| torchao float8 |")[0].startswith("| torchao float8 | 1 | ")
    assert summary([run for run in PARTIAL if run["arm"] != "bf16"]) == ""


def test_an_arm_that_had_no_equal_seconds_is_not_said_never_to_be_there() -> None:
    short = [made("bf16", 0), made("fp8-24", 0, scores=[[10, 10.0, 4.4, 2.2]])]
    assert lines(summary(short), "| fp8 + 2:4 |")[0].endswith("x |  |")
    later = [*short, made("fp8-24", 0, "seconds", 20, scores=[[20, 20.0, 4.4, 2.2]])]
    assert lines(summary(later), "| fp8 + 2:4 |")[0].endswith("x | never |")


def test_ends_on_other_text_than_the_tables_stand_beside_them() -> None:
    dense = made("bf16", 0)
    better = {"nats_per_token": 4.0, "bits_per_byte": 1.8, "bytes": 1}
    other = made("fp8-24", 0, test=better, scores=[[10, 10.0, 4.4, 2.2]])
    text = card([dense, other], "plot.png")
    assert "on the windows of the scores on the way alone, to dense bf16: fp8 + 2:4 -10.00 % and +10.00 %." in text
    assert "are of the first 8 windows of the validation set; those at the end of its first 32" in text
    assert "scores on the way alone" not in card([dense], "plot.png")


def test_runs_that_diverged_are_said_and_miss_the_bars() -> None:
    text = diverged(DIVERGED)
    assert text.startswith("Diverged: fp8 + 2:4, seed 2 (equal tokens); fp8 + 2:4 + mvue, seed 3 (equal tokens); ")
    found = [line.split(" | ") for line in lines(bars(DIVERGED), "| fp8 + 2:4 |")]
    assert [row[3] for row in found] == ["0, 1, 2 diverged", "0, 1", "0, 1"]
    assert [row[4].rstrip(" |") for row in found] == ["**missed**", "**met**", "**met**"]
    alone = [made("bf16", 0), made("float8", 0, **LOST), made("fp8-24", 0, **LOST)]
    assert lines(summary(alone), "| fp8 + 2:4 |") == ["| fp8 + 2:4 |  |  |  |  |  |  |"]
    assert "| 0 diverged | **missed** |" in bars(alone)
    assert "| fp8 + 2:4 | 0 diverged |" in card(alone, "x.png")
    longer = [made("fp8-24", seed, "seconds", 20) for seed in (0, 1)]
    fewer = bars([made("bf16", 0), made("bf16", 1), made("float8", 1, "seconds", 13), *longer])
    assert [line.split(" | ")[3] for line in lines(fewer, "| fp8 + 2:4 | seconds")] == ["0, 1", "1"]


@pytest.mark.parametrize(
    ("extra", "verdict"),
    [(0.0059, "| +0.30 % | 0 | **met** |"), (0.0061, "| +0.30 % | 0 | **missed** |"), (-1.0, "| 0 | **met** |")],
)
def test_the_bar_at_equal_tokens_is_the_share_of_denses_bits_per_byte(extra: float, verdict: str) -> None:
    text = bars([made("bf16", 0), made("fp8-24", 0, extra=extra)])
    assert verdict in lines(text, "| fp8 + 2:4 | tokens: at most 0.3%")[0]


def test_at_equal_seconds_a_bar_is_met_below_with_a_test_alone() -> None:
    def row(peer: str, *runs: dict) -> str:
        dense = [made("bf16", seed) for seed in (0, 1, 2)]
        return lines(bars([*dense, *runs]), f"| fp8 + 2:4 | seconds: below {peer}")[0]

    longer = [made("fp8-24", seed, "seconds", 20) for seed in (0, 1, 2)]
    assert row("dense bf16", *longer).endswith(" (< 0.001) | 0, 1, 2 | **met** |")
    assert row("dense bf16", longer[0]).endswith("| 0 | open: too few seeds for a test |")
    assert row("torchao float8", *longer).endswith("|  |  | not measured yet |")
    assert row("dense bf16", made("fp8-24", 0)).endswith("|  |  | not measured yet |")
    above = [made("fp8-24", seed, "seconds", 20, extra=1.2) for seed in (0, 1, 2)]
    assert row("dense bf16", *above).endswith("| 0, 1, 2 | **missed** |")
    apart = [made("fp8-24", seed, "seconds", 20, extra=extra) for seed, extra in ((0, 0.99), (1, -1.0), (2, 0.99))]
    assert " (0.2" in row("dense bf16", *apart) and row("dense bf16", *apart).endswith("| **missed** |")


def test_steps_that_an_arm_would_have_needed_lie_on_a_line_in_their_logarithm() -> None:
    # fp8 + 2:4 ends at 2.0 after 10 steps, at 1.0 after 20; float8 at 0.5 after 14, so 10 * 2**1.5 steps are needed.
    runs = [made("bf16", 0), made("fp8-24", 0), made("fp8-24", 0, "seconds", 20)]
    better = made("float8", 0, "seconds", 14, extra=-1.1)
    text = steps_needed([*runs, better])
    assert (
        f"fp8 + 2:4 had {20 / 14:.2f} times the steps of torchao float8 and would need {10 * 2**1.5 / 14:.2f}, " in text
    )
    assert f"would need more than {40 / 14:.2f}, " in steps_needed(
        [*runs, made("float8", 0, "seconds", 14, extra=-1.7)]
    )
    assert steps_needed([*runs, made("float8", 0, "seconds", 14)]) == ""  # it is above already
    assert steps_needed(runs) == "" and steps_needed([*runs[:2], better]) == ""


@pytest.mark.parametrize("runs", [complete(), complete((0,)), PARTIAL, DIVERGED, [made("float8", 0)]])
def test_every_table_fits_the_page_and_every_picture_shows_the_curves(runs: list[dict], tmp_path: Path) -> None:
    for line in lines("\n".join([card(runs, "x.png"), summary(runs)]), "|"):
        assert len(line) <= WIDTH, line
    (tmp_path / "x.png").write_bytes(curves(runs))
    image = imread(tmp_path / "x.png")
    assert (image[..., 3] > 0).mean() > 0.01


def test_a_picture_is_the_same_each_time() -> None:
    assert curves(complete()) == curves(complete())


def test_rates_name_text_and_steps_and_the_best_is_bold(tmp_path: Path) -> None:
    def tried(rate: float, extra: float, **changes: object) -> dict:
        settings = {**SETTINGS, "train": {**SETTINGS["train"], "lr": rate}}
        return made("bf16", 0, extra=extra, settings=settings, **changes)

    folder = tmp_path / "rates"
    folder.mkdir()
    for place, run in enumerate((tried(4e-4, 0.1), tried(2e-4, 0.0), tried(8e-4, 0.2, **LOST))):
        (folder / f"{place}.json").write_text(json.dumps(run))
    (folder / "times.json").write_text('{"kind": "times"}')
    text = rates(load_rates([folder, tmp_path / "none"]), complete())
    assert text.splitlines()[2:5] == [
        "| 01234567 | dense bf16 | 0 | 10 | **0.0002** | **2.0000** | of the runs |",
        "| 01234567 | dense bf16 | 0 | 10 | 0.0004 | 2.1000 |  |",
        "| 01234567 | dense bf16 | 0 | 10 | 0.0008 | diverged |  |",
    ]
    assert "the best rate is the lowest of those tried over 10 steps" in text
    middle = [tried(1e-4, 0.3), tried(2e-4, 0.0), tried(4e-4, 0.1)]
    assert "best rate" not in rates(middle) and "of the runs" not in rates(middle)
    (folder / "3.json").write_text(json.dumps(made("bf16", 0, settings={"text": "0"})))
    with pytest.raises(DataError, match="no learning rate or no text"):
        load_rates([folder])
    (folder / "3.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read as a result"):
        load_rates([folder])
