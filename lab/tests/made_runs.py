"""Made-up results of runs, with figures that are easy to check by hand."""

import math
from dataclasses import replace
from typing import Any

from semisparse import recipes
from semisparse_lab.experiment import Experiment, Outcome, Row
from semisparse_lab.report.run_document import run_document
from semisparse_lab.train.results import EpochRecord, PeakMemory, PhaseSpan, RunResult, Scores

MEMORY = PeakMemory(2**20, "resident memory of the whole process")


def run(name: str, accuracy: float, phases: tuple[PhaseSpan, ...]) -> RunResult:
    epochs = tuple(EpochRecord(10 * i, 2.0 / i, Scores(1.0 / i, 0.3 * i), 0.01 * i) for i in (1, 2, 3))
    return RunResult(name, 30, 0, epochs, phases, Scores(0.1, accuracy), MEMORY)


DENSE = run("dense", 0.9, (PhaseSpan("dense", 0, 30, 0.5),))
MIXED = run("mixed", 0.875, (PhaseSpan("sparse", 0, 20, 0.25), PhaseSpan("dense", 20, 30, 0.5)))
UNTIMED = replace(run("untimed", 0.95, (PhaseSpan("sparse", 0, 30, None),)), peak_memory=PeakMemory(None, "none"))
DIVERGED = replace(MIXED, name="diverged", test=Scores(math.nan, 0.1))


def documents(*results: RunResult) -> list[dict[str, Any]]:
    """Their documents, as the rows of one experiment with one seed."""
    rows = tuple(Row(result.name, result.name, recipes.dinov2()) for result in results)
    outcomes = [Outcome(100 * result.test.accuracy, result, {"extra": 1.5}) for result in results]

    def train(row: Row, seed: int, on_progress: object) -> Outcome:
        raise NotImplementedError

    experiment = Experiment(
        name="toy",
        title="Toys",
        metric="accuracy",
        higher_is_better=True,
        rows=rows,
        settings={"seed": 3},
        command="make toys",
        train=train,
    )
    return [run_document(experiment, row, 0, outcome) for row, outcome in zip(rows, outcomes, strict=True)]
