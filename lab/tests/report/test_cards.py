"""Cards are made of result files alone; their figures are worked out here by hand."""

import json
import statistics
from pathlib import Path

import pytest
from matplotlib.image import imread

from semisparse.errors import ConfigError
from semisparse_lab.errors import DataError
from semisparse_lab.report import cards, summaries
from semisparse_lab.report.run_document import KIND


def result(row: str, seed: int, value: float | None, *, order: int, flips: bool = True, **changes) -> dict:
    phases = [
        {"kind": "sparse", "start": 0, "end": 10, "seconds_per_step": 0.25, "sparse_products": 40 + seed},
        {"kind": "dense", "start": 10, "end": 20, "seconds_per_step": 0.5, "sparse_products": 0},
    ]
    epochs = [{"step": step, "train_loss": 1 / step, "flip_rate": 0.01 if flips else None,
               "validation": {"loss": 0.5, "accuracy": 0.9}} for step in (10, 20)]  # fmt: skip
    return {
        "kind": KIND, "experiment": "toy", "row": row, "row_title": f"row {row}", "order": order, "seed": seed,
        "title": "Toys compared", "metric": "accuracy", "higher_is_better": True, "command": "make toys",
        "settings": {"epochs": 2},
        "more": {"other_figure": (value or 0) + 1, "count": 7, "note": "text"},        "value": value,
        "gpu": "none", "commit": "abcdef0123456789+changes",
        "environment": {"torch": "2.x", "triton": "3.x", "cuSPARSELt": "not found"},
        "run": {"epochs": epochs, "phases": phases if row != "dense" else phases[1:]}, **changes,
    }  # fmt: skip


RESULTS = [
    result("late", 0, 91.0, order=2),
    result("late", 1, 92.5, order=2),
    result("dense", 0, 92.0, order=0, flips=False),
    result("dense", 1, 93.0, order=0, flips=False),
    result("dense", 2, 95.0, order=0, flips=False),
    result("early", 2, 94.0, order=1),
]


def test_mean_spread_and_differences_seed_by_seed() -> None:
    rows = summaries.summaries(RESULTS)
    assert [row.slug for row in rows] == ["dense", "early", "late"]
    assert rows[0].differences == [] and rows[1].differences == [-1.0] and rows[2].differences == [-1.0, -0.5]
    assert rows[2].sparse_products == 40 and rows[0].sparse_products == 0  # 40 and 41 in two runs
    assert rows[2].seconds == {"sparse": 0.25, "dense": 0.5}
    text = cards.table(RESULTS)
    assert f"| row late | 0, 1 | 91.75 ± {statistics.stdev([91, 92.5]):.2f} | -0.75 ± 0.35 |" in text
    assert "| row early | 2 | 94.00 | -1.00 |" in text
    assert "| row dense | 0, 1, 2 | 93.33 ± 1.53 |  |" in text


def test_step_times_stand_beside_their_ratio_to_the_dense_rows() -> None:
    text = cards.step_times(RESULTS)
    assert "| row dense | 0 |  |  | 500.00 |" in text
    assert "| row early | 42 | 250.00 | 0.50x | 500.00 |" in text


@pytest.mark.parametrize(
    ("seconds", "products", "sentence"),
    [
        (0.25, 5, "Speed: a sparse step took 0.50x the dense step on one G."),
        (0.75, 5, "Speed: this model is too small to gain from 2:4: a sparse step took 1.50x the dense step on one G."),
        (0.75, 0, "Speed: no sparse product ran here"),
    ],
)
def test_each_card_says_whether_the_model_gains_speed(seconds: float, products: int, sentence: str) -> None:
    runs = [result(row, 0, 90.0, order=order, gpu="G") for order, row in enumerate(("dense", "early"))]
    runs[1]["run"]["phases"][0] |= {"seconds_per_step": seconds, "sparse_products": products}
    assert cards.gain(runs).startswith(sentence)
    assert cards.gain(runs) in cards.card(runs, "toy.png")


def test_nothing_is_said_of_speed_where_step_times_cannot_be_compared() -> None:
    assert cards.gain([result("dense", 0, 90.0, order=0)]) == ""
    assert cards.gain([*RESULTS, result("late", 2, 92.0, order=2, gpu="another")]) == ""


def test_further_figures_are_means_over_the_seeds() -> None:
    text = cards.further_figures(RESULTS)
    assert text.splitlines()[0] == "| configuration | other figure | count |"
    assert f"| row late | 92.75 ± {statistics.stdev([91, 92.5]):.2f} | 7 ± 0 |" in text
    assert cards.further_figures([result("dense", 0, 1.0, order=0, more={})]) == ""


def test_more_figures_than_rows_stand_one_below_the_other() -> None:
    text = cards.further_figures([result("dense", 0, 1.0, order=0)])
    assert text.splitlines() == ["| figure | row dense |", "|---|---|", "| other figure | 2.00 |", "| count | 7 |"]


def test_kept_magnitude_is_shown_of_the_first_and_the_last_epoch_where_all_seeds_have_it() -> None:
    assert cards.kept_magnitudes(RESULTS) == ""
    mine = [result("late", 0, 91.0, order=2), result("late", 1, 92.5, order=2), result("early", 0, 92.5, order=1)]
    for number, run in enumerate(mine):
        for epoch, kept in zip(run["run"]["epochs"], (0.5, 0.75 + number / 4), strict=True):
            epoch["kept_magnitude"] = kept if run["row"] == "late" else None
    lines = cards.kept_magnitudes(mine).splitlines()
    assert lines[2:] == [f"| row late | 0.5000 ± 0.0000 | 0.8750 ± {statistics.stdev([0.75, 1.0]):.4f} |"]
    assert lines[2] in cards.card(mine, "toy.png")


def test_rows_are_remade_with_as_many_seeds_as_each_has() -> None:
    assert cards.remake(RESULTS) == "`make toys --seeds 3 --row dense --row early`, `make toys --seeds 2 --row late`"


def test_rows_are_compared_with_the_first_row_and_losses_in_percent_too() -> None:
    pair = [result(row, seed, value, order=order, higher_is_better=False)
            for order, row, *values in ((1, "dense", 1.25, 2.25), (0, "fst", 1.0, 2.0))
            for seed, value in enumerate(values)]  # fmt: skip
    assert summaries.first_row(pair) == "fst" and [row.slug for row in summaries.summaries(pair)] == ["fst", "dense"]
    assert cards.table(pair).splitlines()[0].endswith("| difference to row fst |")
    assert "| +0.2500 ± 0.0000 (+18.75%) |" in cards.table(pair)  # 25 % and 12.5 %
    alone = cards.table(pair[:2])
    assert alone.splitlines()[0].endswith("| difference to the first row |") and "%" not in alone
    assert "%" not in cards.table(RESULTS)


def test_another_baseline_comes_first() -> None:
    rows = summaries.summaries(RESULTS, baseline="late")
    assert rows[0].slug == "late" and rows[1].slug == "dense" and rows[1].differences == [1.0, 0.5]


def test_cards_are_made_of_whatever_is_there(tmp_path: Path) -> None:
    for number, one in enumerate(
        [*RESULTS, result("dense", 0, 1.5, order=0, experiment="other", higher_is_better=False)]
    ):
        (tmp_path / f"{number}.seed0.json").write_text(json.dumps(one))
    (tmp_path / "x.seed1.json").write_text('{"kind": "something else"}')
    out = tmp_path / "made"
    out.mkdir()
    assert cards.write_cards(tmp_path, out) == [out / "toy.md", out / "other.md"]
    text = (out / "toy.md").read_text()
    assert (
        text.startswith("# Toys compared\n") and "](toy.png)" in text and f"Remake: {cards.remake(RESULTS)}\n" in text
    )
    assert "no GPU, torch 2.x" in text and "abcdef0123+changes" in text
    assert "1.5000" in (out / "other.md").read_text()
    assert imread(out / "toy.png").shape[2] == 4


def test_a_diverged_run_is_shown_and_left_out() -> None:
    broken = [*RESULTS, result("late", 2, None, order=2, more={"other_figure": None, "count": 7})]
    assert "| row late | 0, 1, 2 diverged | 91.75" in cards.table(broken)
    lost = [result("dense", 0, None, order=0, more={}), result("late", 0, 91.0, order=2)]
    assert "| row late | 0 | 91.00 |  |" in cards.table(lost)
    assert cards.card(broken, "x.png")


def test_times_of_different_gpus_are_not_averaged() -> None:
    mixed = [*RESULTS, result("late", 2, 92.0, order=2, gpu="another")]
    assert all(row.seconds == {} for row in summaries.summaries(mixed))


def test_different_settings_make_no_common_card(tmp_path: Path) -> None:
    (tmp_path / "a.seed0.json").write_text(json.dumps(result("dense", 0, 1.0, order=0)))
    (tmp_path / "b.seed0.json").write_text(json.dumps(result("late", 0, 1.0, order=2, settings={"epochs": 3})))
    with pytest.raises(DataError, match=r"b\.seed0\.json has other settings"):
        cards.write_cards(tmp_path, tmp_path)
    incomplete = result("late", 0, 1.0, order=2)
    del incomplete["gpu"]
    (tmp_path / "b.seed0.json").write_text(json.dumps(incomplete))
    with pytest.raises(DataError, match="has no 'gpu'"):
        cards.write_cards(tmp_path, tmp_path)


WRONG = {
    "experiment": [["x"], 7, "", "../escaped", "a/b", "/tmp/x", ".hidden", "x" * 300], "row": [1, None, ["x"]],
    "order": ["0", -1, True, 10**30], "seed": ["0", 1.5, 10**4000], "value": ["91", [1], True],
    "more": [[], {"a": [1]}], "run": [None, [], {}, {"phases": {}, "epochs": []}, {"phases": [1], "epochs": []},
    {"phases": [{}], "epochs": []}, {"phases": [], "epochs": [{"step": 1}]}], "gpu": [None], "commit": [5],
    "environment": [{}, {"torch": 2, "triton": "", "cuSPARSELt": ""}], "higher_is_better": ["yes"], "title": [{}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in WRONG for value in WRONG[name]],
    ids=lambda value: repr(value)[:20] if not isinstance(value, int) else "number",
)
def test_a_result_with_a_value_of_another_type_is_refused_by_name(tmp_path: Path, name: str, value: object) -> None:
    (tmp_path / "a.seed0.json").write_text(json.dumps(result("dense", 0, 1.0, order=0) | {name: value}))
    with pytest.raises(DataError, match=rf"a\.seed0\.json is not a (whole )?result: .*'{name}") as found:
        cards.write_cards(tmp_path, tmp_path)
    assert len(str(found.value)) < 600 and [path.name for path in tmp_path.iterdir()] == ["a.seed0.json"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"kind": NaN}', "NaN"),
        ('{"a": 1, "a": 2}', "twice"),
        ('{"a": 1e999}', "too large"),
        ('{"a": ' + "9" * 5000 + "}", "digits"),
        ("", "Expecting value"),
    ],
    ids=["deep", "nan", "twice", "infinite", "long", "empty"],
)
def test_a_file_that_is_not_plain_json_is_refused_with_the_reason(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "a.seed0.json").write_text(text)
    with pytest.raises(DataError, match=rf"a\.seed0\.json cannot be read as a result: .*{reason}"):
        cards.load_results(tmp_path)


def test_results_of_unequal_length_make_no_common_card(tmp_path: Path) -> None:
    short = result("late", 0, 1.0, order=2)
    short["run"]["epochs"].pop()
    for name, one in (("a", result("dense", 0, 1.0, order=0)), ("b", short)):
        (tmp_path / f"{name}.seed0.json").write_text(json.dumps(one))
    with pytest.raises(DataError, match=r"b\.seed0\.json has another number of epochs"):
        cards.write_cards(tmp_path, tmp_path)


def test_a_folder_that_cannot_take_the_card_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.seed0.json").write_text(json.dumps(result("dense", 0, 1.0, order=0)))
    with pytest.raises(ConfigError, match=r"out=.* cannot be written: No such file"):
        cards.write_cards(tmp_path, tmp_path / "missing")


def test_figures_of_a_diverged_run_are_in_no_mean() -> None:
    both = [result("late", 0, 91.0, order=2), result("late", 1, None, order=2, more={"other_figure": 1e9, "count": 9})]
    assert cards.further_figures(both).splitlines()[2:] == ["| other figure | 92.00 |", "| count | 7 |"]


def test_no_result_and_a_damaged_one_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no result"):
        cards.write_cards(tmp_path, tmp_path)
    (tmp_path / "a.seed0.json").write_text("{")
    with pytest.raises(DataError, match=r"a\.seed0"):
        cards.write_cards(tmp_path, tmp_path)
