"""Experiments: one file per run, finished runs skipped, nothing lost when something does not fit."""

import errno
import json
import math
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from lab.tests.toys import TRAIN
from semisparse import recipes
from semisparse.errors import ConfigError, EngineError
from semisparse_lab.errors import OutputExistsError
from semisparse_lab.experiment import Experiment, Outcome, Row, train_settings
from semisparse_lab.pipeline import diverged_runs, run_experiment
from semisparse_lab.train.results import PeakMemory, PhaseSpan, RunResult, Scores

DENSE = Row("dense", "dense", recipes.dinov2(sparse_fraction=0.0))
HALF = Row("half", "half sparse", recipes.dinov2(sparse_fraction=0.5))


def experiment(**changes) -> Experiment:
    settings = {"train": train_settings(TRAIN), "pairs": (1, 2)}
    base = Experiment(name="toy", title="Toys", metric="accuracy", higher_is_better=True, rows=(DENSE, HALF),
                      settings=settings, command="make toys", train=Trainer())  # fmt: skip
    return replace(base, **changes)


def outcome(value: float = 90.0, phases: tuple[PhaseSpan, ...] = (PhaseSpan("sparse", 0, 3, None, 6),)) -> Outcome:
    return Outcome(value, RunResult("x", 3, 0, (), phases, Scores(0.1, 0.9), PeakMemory(None, "none")), {"extra": 1.5})


@contextmanager
def silent(name: str):
    yield lambda progress: None


class Trainer:
    """Stands for training; remembers what it was asked for."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls: list[tuple[str, int]] = []
        self.fail_at = fail_at

    def __call__(self, row: Row, seed: int, on_progress) -> Outcome:
        if len(self.calls) == self.fail_at:
            raise RuntimeError("power cut")
        self.calls.append((row.slug, seed))
        return outcome(90 + seed)


def test_one_file_a_run_seed_by_seed_and_a_second_call_does_nothing(tmp_path: Path) -> None:
    train, said = Trainer(), []
    paths = run_experiment(experiment(train=train), (DENSE, HALF), range(2), tmp_path / "new", silent, say=said.append)
    assert train.calls == [("dense", 0), ("half", 0), ("dense", 1), ("half", 1)]
    assert [path.name for path in paths] == [
        f"toy.{row}.seed{seed}.json" for seed in (0, 1) for row in ("dense", "half")
    ]
    found = json.loads(paths[3].read_text())
    assert (found["value"], found["more"], found["row"], found["seed"], found["order"]) == (
        91,
        {"extra": 1.5},
        "half",
        1,
        1,
    )
    assert found["recipe"]["sparse_fraction"] == 0.5 and found["settings"]["train"]["epochs"] == TRAIN.epochs
    assert found["run"]["phases"][0]["sparse_products"] == 6
    before = [path.read_bytes() for path in paths]
    again = Trainer()
    assert (
        run_experiment(experiment(train=again), (DENSE, HALF), range(2), tmp_path / "new", silent, say=said.append)
        == paths
    )
    assert again.calls == [] and [path.read_bytes() for path in paths] == before
    assert [line for line in said if "skipped" in line] == said[4:]


def test_a_run_that_was_cut_off_leaves_the_finished_ones_and_continues(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="power cut"):
        run_experiment(experiment(train=Trainer(fail_at=3)), (DENSE, HALF), range(2), tmp_path, silent, say=len)
    rest = Trainer()
    run_experiment(experiment(train=rest), (DENSE, HALF), range(2), tmp_path, silent, say=len)
    assert rest.calls == [("half", 1)]


def test_what_is_kept_is_told_as_soon_as_it_is_there(tmp_path: Path) -> None:
    kept: list[Path] = []
    with pytest.raises(RuntimeError, match="power cut"):
        run_experiment(
            experiment(train=Trainer(fail_at=3)), (DENSE, HALF), range(2), tmp_path, silent, say=len, keep=kept.append
        )
    assert len(kept) == 3 and set(kept) == set(tmp_path.iterdir())
    again: list[Path] = []
    paths = run_experiment(
        experiment(train=Trainer()), (DENSE, HALF), range(2), tmp_path, silent, say=len, keep=again.append
    )
    assert again == paths


def test_a_run_that_diverged_has_no_value_and_is_named(tmp_path: Path) -> None:
    def train(row: Row, seed: int, on_progress) -> Outcome:
        one = outcome(91.0)
        return replace(one, result=replace(one.result, test=Scores(math.nan, 0.9))) if seed else one

    said: list[str] = []
    paths = run_experiment(experiment(train=train), (HALF,), range(2), tmp_path, silent, say=said.append)
    assert [json.loads(path.read_text())["value"] for path in paths] == [91.0, None]
    assert said[1].endswith("seed 1: diverged")
    assert diverged_runs(paths) == ["toy.half.seed1.json"]


@pytest.mark.parametrize(
    ("changes", "row", "named"),
    [
        ({"settings": {"train": {"epochs": 99}}}, HALF, "settings="),
        ({}, replace(HALF, recipe=recipes.dinov2(sparse_fraction=0.9)), "recipe="),
        ({}, replace(HALF, recipe=recipes.dinov2(sparse_fraction=0.5, backend="cusparselt")), "recipe="),
    ],
)
def test_results_of_another_configuration_are_never_mixed_or_overwritten(tmp_path, changes, row, named) -> None:
    (path,) = run_experiment(experiment(train=Trainer()), (HALF,), [0], tmp_path, silent, say=len)
    before, train = path.read_bytes(), Trainer()
    with pytest.raises(OutputExistsError, match=named):
        run_experiment(experiment(**changes, train=train), (DENSE, row), [0], tmp_path, silent, say=len)
    assert path.read_bytes() == before and train.calls == []


def test_other_rows_of_the_folder_must_have_the_same_settings_too(tmp_path: Path) -> None:
    run_experiment(experiment(train=Trainer()), (DENSE,), [0], tmp_path, silent, say=len)
    other = experiment(settings={"train": {"epochs": 99}})
    with pytest.raises(OutputExistsError, match=r"dense\.seed0\.json was made with settings="):
        run_experiment(replace(other, train=Trainer()), (HALF,), [0], tmp_path, silent, say=len)


@pytest.mark.parametrize(
    ("changes", "rows", "seeds", "named"),
    [
        ({}, [replace(HALF, slug="third")], [0], "row='third'"),
        ({}, [HALF, HALF], [0], "twice"),
        ({}, [HALF], [1, 1], "twice"),
        ({"settings": {"folder": Path("x")}}, [HALF], [0], "settings="),
    ],
)
def test_a_description_that_cannot_be_written_is_refused_before_training(tmp_path, changes, rows, seeds, named) -> None:
    train = Trainer()
    with pytest.raises(ConfigError, match=named):
        run_experiment(experiment(**changes, train=train), rows, seeds, tmp_path, silent, say=len)
    assert train.calls == [] and list(tmp_path.iterdir()) == []


def test_rows_and_seeds_may_be_iterators(tmp_path: Path) -> None:
    train = Trainer()
    run_experiment(experiment(train=train), iter((DENSE, HALF)), iter((0, 1)), tmp_path, silent, say=len)
    assert len(train.calls) == 4


def test_a_sparse_row_without_a_sparse_step_is_no_result(tmp_path: Path) -> None:
    dense = outcome(phases=(PhaseSpan("dense", 0, 3, None, 0),))
    with pytest.raises(EngineError, match="none of its 3 steps was sparse"):
        run_experiment(experiment(train=lambda *_: dense), (HALF,), [0], tmp_path, silent, say=len)
    assert list(tmp_path.iterdir()) == []
    assert run_experiment(experiment(train=lambda *_: dense), (DENSE,), [0], tmp_path, silent, say=len)


@pytest.mark.parametrize("content", [b"", b"[1]", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"kind": NaN}'])
def test_a_file_that_is_no_result_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "toy.half.seed0.json"
    path.write_bytes(content)
    with pytest.raises(OutputExistsError, match="seed0"):
        run_experiment(experiment(train=Trainer()), (HALF,), [0], tmp_path, silent, say=len)
    assert path.read_bytes() == content


def test_a_sparse_phase_without_sparse_products_fails_where_the_engine_was_asked_for(tmp_path: Path) -> None:
    row = Row("half", "half", recipes.dinov2(backend="cusparselt"))
    idle = outcome(phases=(PhaseSpan("sparse", 0, 2, None, 0), PhaseSpan("dense", 2, 3, None, 0)))
    with pytest.raises(EngineError, match="steps 0 to 2"):
        run_experiment(experiment(train=lambda *_: idle), (row,), [0], tmp_path, silent, say=len)
    assert list(tmp_path.iterdir()) == []
    busy = outcome(phases=(PhaseSpan("sparse", 0, 2, None, 8), PhaseSpan("dense", 2, 3, None, 0)))
    assert run_experiment(experiment(train=lambda *_: busy), (row,), [0], tmp_path, silent, say=len)


def test_rows_are_chosen_by_slug() -> None:
    assert experiment().chosen([]) == (DENSE, HALF)
    assert experiment().chosen(["half"]) == (HALF,)
    with pytest.raises(ConfigError, match="row='third' is not one of 'dense', 'half'"):
        experiment().chosen(["half", "third"])


def test_a_folder_that_cannot_be_made_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    train = Trainer()
    with pytest.raises(ConfigError, match="out="):
        run_experiment(experiment(train=train), (DENSE,), [0], tmp_path / "file" / "x", silent, say=len)
    assert train.calls == []


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path: Path, monkeypatch) -> None:
    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    train = Trainer()
    with pytest.raises(ConfigError, match=r"out=.* cannot be written: No space left on device"):
        run_experiment(experiment(train=train), (DENSE,), [0], tmp_path, silent, say=len)
    assert train.calls == []
