import json
import math
from dataclasses import replace

import pytest
from matplotlib.image import imread

from semisparse_lab.report import run_report as report
from semisparse_lab.train.results import EpochRecord, PeakMemory, PhaseSpan, RunResult, Scores

MEMORY = PeakMemory(2**20, "resident memory of the whole process")


def run(name: str, accuracy: float, phases: tuple[PhaseSpan, ...]) -> RunResult:
    epochs = tuple(EpochRecord(10 * i, 2.0 / i, Scores(1.0 / i, 0.3 * i), 0.01 * i) for i in (1, 2, 3))
    return RunResult(name, 30, 0, epochs, phases, Scores(0.1, accuracy), MEMORY)


DENSE = run("dense", 0.9, (PhaseSpan("dense", 0, 30, 0.5),))
MIXED = run("mixed", 0.875, (PhaseSpan("sparse", 0, 20, 0.25), PhaseSpan("dense", 20, 30, 0.5)))
UNTIMED = replace(run("untimed", 0.95, (PhaseSpan("sparse", 0, 30, None),)), peak_memory=PeakMemory(None, "none"))


def test_table_compares_each_run_with_the_first():
    rows = report.table_rows([DENSE, MIXED, UNTIMED])
    assert [row.name for row in rows] == ["dense", "mixed", "untimed"]
    assert [row.accuracy for row in rows] == pytest.approx([90.0, 87.5, 95.0])
    assert rows[0].difference is None
    assert [row.difference for row in rows[1:]] == pytest.approx([-2.5, 5.0])
    assert [row.seconds_per_step for row in rows[:2]] == pytest.approx([0.5, 1 / 3])
    assert rows[2].seconds_per_step is None and rows[2].peak_memory is None


def with_losses(train: float = 1.0, validation: float = 1.0, test: float = 0.1, skipped: int = 0) -> RunResult:
    first, second, third = DENSE.epochs
    second = replace(second, train_loss=train, validation=Scores(validation, 0.5))
    return replace(DENSE, epochs=(first, second, third), test=Scores(test, 0.9), skipped_steps=skipped)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_run_diverged_where_a_loss_is_not_finite(value):
    assert not with_losses().diverged
    assert all(with_losses(**{name: value}).diverged for name in ("train", "validation", "test"))
    # A gradient scaler skips steps of such losses until it has found its scale.
    assert not with_losses(train=value, skipped=1).diverged
    assert with_losses(validation=value, skipped=1).diverged and with_losses(test=value, skipped=1).diverged
    last = replace(DENSE.epochs[-1], train_loss=value)
    assert replace(DENSE, epochs=(*DENSE.epochs[:-1], last), skipped_steps=1).diverged


def test_the_table_compares_nothing_with_a_run_that_diverged():
    broken = with_losses(test=math.nan)
    rows = report.table_rows([DENSE, broken, MIXED])
    assert [row.accuracy for row in rows] == [pytest.approx(90), None, pytest.approx(87.5)]
    assert [row.difference for row in rows] == [None, None, pytest.approx(-2.5)]
    assert [row.difference for row in report.table_rows([broken, MIXED])] == [None, None]


def test_results_document_is_strict_json_with_everything_needed_to_judge_it(tmp_path):
    broken = replace(DENSE, test=Scores(math.nan, 0.1))
    document = report.results_document([broken, MIXED], {"seed": 3})
    path = tmp_path / "results.json"
    report.write_results(path, document)

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    found = json.loads(path.read_text(), parse_constant=refuse)
    assert set(found) == {"format", "version", "created", "commit", "environment", "settings", "finished", "runs"}
    assert found["format"] == "semisparse-demo-results" and found["version"] == 5 and found["settings"] == {"seed": 3}
    assert {"torch", "Python", "GPU", "semisparse"} <= set(found["environment"])
    keys = {"name", "steps", "skipped_steps", "epochs", "phases", "test", "peak_memory", "seconds_per_step", "diverged"}
    assert [set(entry) for entry in found["runs"]] == [keys, keys]
    assert [entry["diverged"] for entry in found["runs"]] == [True, False] and found["finished"] is True
    assert report.results_document([DENSE], {}, finished=False)["finished"] is False
    assert found["runs"][0]["test"] == {"loss": None, "accuracy": 0.1}
    assert found["runs"][1]["epochs"][1] == {
        "step": 20, "train_loss": 1.0, "validation": {"loss": 0.5, "accuracy": 0.6}, "flip_rate": 0.02,
        "kept_magnitude": None,
    }  # fmt: skip
    phase = {"kind": "sparse", "start": 0, "end": 20, "seconds_per_step": 0.25, "sparse_products": 0}
    assert found["runs"][1]["phases"][0] == phase


def test_plot_is_a_png_with_all_runs_and_the_sparse_phase_shaded(tmp_path):
    shaded, plain = tmp_path / "shaded.png", tmp_path / "plain.png"
    report.write_plot(shaded, [DENSE, MIXED, UNTIMED], "toy")
    same_curves = replace(MIXED, phases=DENSE.phases)
    report.write_plot(plain, [DENSE, same_curves, UNTIMED], "toy")
    assert shaded.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels, without = imread(shaded), imread(plain)
    assert pixels.shape == without.shape == (630, 2250, 4)
    # The shade covers two thirds of all plots' width, so a good part of all pixels differs and no other.
    assert (pixels != without).any(axis=-1).mean() > 0.2


def test_flip_rates_that_were_not_measured_leave_gaps(tmp_path):
    some = replace(DENSE, epochs=(replace(DENSE.epochs[0], flip_rate=None), *DENSE.epochs[1:]))
    for name, results in (("all", [DENSE]), ("some", [some])):
        report.write_plot(tmp_path / name, results, "toy")
    assert (imread(tmp_path / "all", format="png") != imread(tmp_path / "some", format="png")).any()


def test_plot_of_losses_that_are_not_finite_is_still_written(tmp_path):
    for value in (math.nan, math.inf):
        broken = replace(DENSE, epochs=(EpochRecord(10, value, Scores(value, 0.1)),))
        report.write_plot(tmp_path / "plot.png", [broken], "diverged")
        assert imread(tmp_path / "plot.png").size
