"""A finished run as the JSON document from which tables, cards and curves are made."""

import json
import math
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from semisparse.documents import with_checksum
from semisparse.environment import environment
from semisparse.files import write_atomically
from semisparse_lab.experiment import Experiment, Outcome, Row
from semisparse_lab.provenance import commit

KIND = "accuracy"
"""Tells the documents of experiments from those of benchmarks."""

Document = dict[str, Any]


def identity(experiment: Experiment, row: Row, seed: int) -> Document:
    """What a run was asked to be."""
    return {
        "experiment": experiment.name,
        "row": row.slug,
        "seed": seed,
        "recipe": row.recipe.describe(),
        "settings": experiment.settings,
    }


def run_document(experiment: Experiment, row: Row, seed: int, outcome: Outcome) -> Document:
    """Everything about a run as plain JSON values.

    "value" is None for a run that diverged. Numbers that are not finite become None, for which JSON has no other word.
    """
    run = {**asdict(outcome.result), "seconds_per_step": outcome.result.seconds_per_step}
    content = {
        "kind": KIND,
        **identity(experiment, row, seed),
        "title": experiment.title,
        "row_title": row.title,
        "order": [other.slug for other in experiment.rows].index(row.slug),
        "metric": experiment.metric,
        "higher_is_better": experiment.higher_is_better,
        "command": experiment.command,
        "value": None if outcome.result.diverged else outcome.value,
        "more": outcome.more,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "environment": environment().facts,
        "run": run,
    }
    checked: Document = finite(content)
    return checked


def write_document(path: Path, document: Document) -> None:
    """Write document with its checksum as indented JSON, atomically.

    Args:
        path: The file to write.
        document: What run_document returned.

    Raises:
        OSError: path cannot be written.
    """
    write_atomically(path, json.dumps(with_checksum(document), indent=2, allow_nan=False).encode() + b"\n")


def finite(value: Any) -> Any:
    """value, nested lists and dictionaries included, with None for every number that is not finite."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
