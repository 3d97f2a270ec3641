"""The document of a run is strict JSON and holds what is needed to judge it."""

import json
from pathlib import Path

from lab.tests.made_runs import DIVERGED, MIXED, documents
from semisparse_lab.report.run_document import write_document


def test_a_document_is_strict_json_with_everything_needed_to_judge_it(tmp_path: Path) -> None:
    write_document(tmp_path / "results.json", {"runs": documents(DIVERGED, MIXED)})

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    broken, whole = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)["runs"]
    assert broken.keys() == whole.keys() == {
        "kind", "experiment", "row", "seed", "recipe", "settings", "title", "row_title", "order", "metric",
        "higher_is_better", "command", "value", "more", "created", "commit", "gpu", "environment", "run",
    }  # fmt: skip
    assert {"torch", "Python", "GPU", "semisparse"} <= set(whole["environment"])
    assert whole["settings"] == {"seed": 3} and whole["more"] == {"extra": 1.5}
    assert (broken["value"], whole["value"]) == (None, 87.5) and (broken["order"], whole["order"]) == (0, 1)
    keys = {"name", "steps", "skipped_steps", "epochs", "phases", "test", "peak_memory", "seconds_per_step"}
    assert broken["run"].keys() == whole["run"].keys() == keys
    assert broken["run"]["test"] == {"loss": None, "accuracy": 0.1}
    assert whole["run"]["epochs"][1] == {
        "step": 20,
        "train_loss": 1.0,
        "validation": {"loss": 0.5, "accuracy": 0.6},
        "flip_rate": 0.02,
        "kept_magnitude": None,
    }
    phase = {"kind": "sparse", "start": 0, "end": 20, "seconds_per_step": 0.25, "sparse_products": 0}
    assert whole["run"]["phases"][0] == phase
