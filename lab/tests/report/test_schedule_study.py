"""The schedule study from made-up runs whose differences are known."""

from pathlib import Path

import pytest

from lab.tests.made_timed import made, write
from semisparse_lab.errors import DataError
from semisparse_lab.report.schedule_study import explanation, load_study, shown_runs, tables, write_study
from semisparse_lab.report.timed_document import load_timed

SETTINGS = {"sparse_fraction": 0.7, "dense_start": 0.0, "steps": 10, "train": {"lr": 1, "hold_fraction": 0.67}}
HOLD_0 = {**SETTINGS, "train": {"lr": 1, "hold_fraction": 0.0}}
SHARE_1 = {**SETTINGS, "sparse_fraction": 1.0}
COLUMNS = [
    "variation",
    "changed",
    "seed",
    "steps",
    "validation",
    "test",
    "to main",
    "to dense",
    "seconds",
    "dense's / its",
]


def run(arm: str, bits: float, settings: dict = SETTINGS, seed: int = 0, **changes: object) -> dict:
    """A run that ends at these bits per byte on the validation set, and at 1 more on the test set."""
    scores = {part: {"nats_per_token": 2.0, "bits_per_byte": bits + more, "bytes": 1} for part, more in
              (("validation", 0), ("test", 1))}  # fmt: skip
    return made(arm, seed, settings=settings, **scores, **changes)


def main_runs(folder: Path) -> Path:
    dense = [run("bf16", 2.0), run("bf16", 2.1, seed=1)]
    return write(
        folder, *dense, run("fp8-24", 2.02), run("fp8-24", 2.163, seed=1), run("fp8-24", 9.0, budget="seconds")
    )


def rows(folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    """Cells by column of each row of the tables, by arm and variation."""
    main, found, arm = load_timed(folder), {}, ""
    for line in tables(main, load_study(folder, main)).splitlines():
        arm = line.partition("(arm `")[2].partition("`")[0] or arm
        if line.startswith("|") and "---" not in line and "variation" not in line:
            cells = dict(zip(COLUMNS, [cell.strip() for cell in line.split("|")[1:-1]], strict=True))
            found[arm, cells["variation"]] = cells
    return found


def test_a_variation_stands_beside_the_main_run_and_the_dense_run_of_its_seed(tmp_path: Path) -> None:
    folder = main_runs(tmp_path)
    write(folder / "study-share-1.0", run("fp8-24", 2.04, SHARE_1))
    assert rows(folder) == {
        ("fp8-24", "main"): dict(
            zip(COLUMNS, ["main", "", "0", "10", "2.0200", "3.0200", "", "+1.00 %", "10.0", "2.00x"], strict=True)
        ),
        ("fp8-24", "share-1.0"): dict(
            zip(
                COLUMNS,
                [
                    "share-1.0",
                    "`sparse_fraction` 0.7 → 1",
                    "0",
                    "10",
                    "2.0400",
                    "3.0400",
                    "+0.99 %",
                    "+2.00 %",
                    "10.0",
                    "2.00x",
                ],
                strict=True,
            )
        ),
    }


def test_the_spread_over_the_main_arms_seeds_stands_below(tmp_path: Path) -> None:
    folder = main_runs(tmp_path)
    write(folder / "study-share-1.0", run("fp8-24", 2.04, SHARE_1))
    main = load_timed(folder)
    # 2.02 and 2.163 differ from their mean by 0.0715; against dense they are 1 % and 3 % above.
    said = "The main arm over its seeds 0, 1: validation 2.0915 ± 0.1011, a spread of 4.83 %; +2.00 ± 1.41 % to dense."
    assert said in tables(main, load_study(folder, main))
    alone = [one for one in main if one["seed"] == 0]
    assert "has no second seed" in tables(alone, load_study(folder, main))
    assert "Each variation has one seed (0)" in explanation(load_study(folder, main))


def test_another_run_of_the_same_settings_says_so_and_all_runs_shown_are_named(tmp_path: Path) -> None:
    folder = main_runs(tmp_path)
    write(folder / "study-repeat", run("fp8-24", 2.04))
    assert rows(folder)["fp8-24", "repeat"]["changed"] == "nothing: another run"
    main = load_timed(folder)
    shown = shown_runs(main, load_study(folder, main))
    assert [(one["arm"], one["seed"], one["budget"]) for one in shown] == [
        ("fp8-24", 0, "tokens"), ("bf16", 0, "tokens"), ("bf16", 1, "tokens"), ("fp8-24", 0, "tokens"),
        ("fp8-24", 1, "tokens"),
    ]  # fmt: skip


def test_dense_runs_are_those_of_the_same_course_of_the_learning_rate(tmp_path: Path) -> None:
    folder = main_runs(tmp_path)
    write(folder / "study-hold-0", run("fp8-24", 2.2, HOLD_0), run("bf16", 2.5, HOLD_0))
    found = rows(folder)
    assert found["fp8-24", "hold-0"]["to dense"] == "-12.00 %" and found["fp8-24", "main"]["to dense"] == "+1.00 %"
    assert (found["bf16", "hold-0"]["to main"], found["bf16", "hold-0"]["to dense"]) == ("+25.00 %", "")
    (folder / "study-hold-0" / "toy.bf16.tokens.seed0.json").unlink()
    assert rows(folder)["fp8-24", "hold-0"]["to dense"] == ""


def test_what_cannot_be_compared_is_left_out(tmp_path: Path) -> None:
    folder = main_runs(tmp_path)
    write(folder / "study-share-1.0", run("fp8-24", 2.04, SHARE_1, gpu="another"))
    lost = {"test": None, "validation": None, "scores": [[1, 1.0, None, None]], "tokens_per_second": None}
    start = {**SETTINGS, "dense_start": 0.02}
    write(folder / "study-start", made("fp8-24", 0, settings=start, **lost))
    write(folder / "study-other-seed", run("float8", 2.04, SHARE_1, seed=7))
    found = rows(folder)
    assert found["fp8-24", "share-1.0"]["dense's / its"] == "" and found["fp8-24", "share-1.0"]["seconds"] == "10.0"
    assert found["fp8-24", "start"]["validation"] == "diverged"
    (folder / "study-share-1.0" / "toy.fp8-24.tokens.seed0.json").unlink()
    assert rows(folder)["fp8-24", "main"]["validation"] == "2.0200"
    assert {found["float8", "other-seed"][name] for name in ("to main", "to dense", "dense's / its")} == {""}


def test_each_seed_has_a_row_beside_the_main_and_the_dense_run_of_that_seed(tmp_path: Path) -> None:
    folder = main_runs(tmp_path)
    write(folder / "study-share-1.0", run("fp8-24", 2.04, SHARE_1), run("fp8-24", 2.184, SHARE_1, seed=1))
    main = load_timed(folder)
    study = load_study(folder, main)
    lines = [line for line in tables(main, study).splitlines() if line.startswith(("| main", "| share"))]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [(row[0], row[2], row[4], *row[6:8]) for row in cells] == [
        ("main", "0", "2.0200", "", "+1.00 %"),
        ("main", "1", "2.1630", "", "+3.00 %"),
        ("share-1.0", "0", "2.0400", "+0.99 %", "+2.00 %"),
        ("share-1.0", "1", "2.1840", "+0.97 %", "+4.00 %"),
    ]
    assert "few have more than one (0, 1)" in explanation(study)
    write(folder / "study-far", run("fp8-24", 2.04, SHARE_1, seed=5))
    (folder / "study-share-1.0" / "toy.fp8-24.tokens.seed0.json").unlink()
    (folder / "study-share-1.0" / "toy.fp8-24.tokens.seed1.json").unlink()
    assert rows(folder)["fp8-24", "main"]["validation"] == "not there"


def test_other_settings_than_those_of_a_variation_are_refused(tmp_path: Path) -> None:
    folder = main_runs(tmp_path)
    longer = {**SHARE_1, "steps": 20, "train": {"lr": 1, "hold_fraction": 0.67}}
    for number, (settings, message) in enumerate(
        ((longer, "has steps=20, the main runs 10"), ({"lr": 1}, "without settings of the training"))
    ):
        path = write(folder / f"study-{number}", run("fp8-24", 2.0, settings))
        with pytest.raises(DataError, match=message):
            load_study(folder, load_timed(folder))
        (path / "toy.fp8-24.tokens.seed0.json").unlink()


def test_without_a_study_there_is_no_card(tmp_path: Path) -> None:
    folder = main_runs(tmp_path)
    (folder / "study-empty").mkdir()
    assert write_study(folder, tmp_path) is None and not list(tmp_path.glob("*.md"))
