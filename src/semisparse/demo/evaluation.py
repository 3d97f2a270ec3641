"""Scoring a saved checkpoint in a plain nn.Linear model."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from semisparse.demo.checkpoint import load
from semisparse.demo.data import load_dataset
from semisparse.demo.results import Scores
from semisparse.demo.task import ImageClassification
from semisparse.demo.train_config import Precision, resolve_device
from semisparse.demo.training import scoring
from semisparse.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Evaluation:
    """scores: on the test split now; recorded: the test accuracy saved with the checkpoint, None if there is none."""

    scores: Scores
    recorded: float | None


def evaluate_checkpoint(path: Path, data: str, data_dir: Path | None = None, device: str = "auto") -> Evaluation:
    """Test scores of the checkpoint at path, in the precision that it was trained in.

    Raises CheckpointError when it is damaged or was trained on other data than data, DataError, ConfigError.
    """
    where = resolve_device(device)
    checkpoint = load(path, where)
    trained_on = checkpoint.info.get("data", data)
    if trained_on != data:
        raise CheckpointError(f"{path} was trained on {trained_on!r}, not on data={data!r}; choose that data")
    precision = checkpoint.info.get("precision", "fp32")
    if precision not in get_args(Precision):
        raise CheckpointError(f"{path} names precision {precision!r}, not one of {', '.join(get_args(Precision))}")
    task = ImageClassification(load_dataset(data, data_dir, where))
    with scoring(checkpoint.model, where, cast(Precision, precision)):
        scores = task.test(checkpoint.model)
    return Evaluation(scores, checkpoint.info.get("test_accuracy"))
