"""Scoring a saved checkpoint in a plain nn.Linear model."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from semisparse_lab.checkpoint.file import load
from semisparse_lab.checks import is_number, shown
from semisparse_lab.data.images import load_dataset
from semisparse_lab.errors import CheckpointError
from semisparse_lab.tasks.classification import ImageClassification
from semisparse_lab.train.config import Precision, resolve_device
from semisparse_lab.train.loop import scoring
from semisparse_lab.train.results import Scores


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Test scores of a checkpoint, measured and recorded.

    Attributes:
        scores: Measured on the test split.
        recorded: Test accuracy saved with the checkpoint, from 0 to 1; None if none was saved.
    """

    scores: Scores
    recorded: float | None


def evaluate_checkpoint(path: Path, data: str, data_dir: Path | None = None, device: str = "auto") -> Evaluation:
    """Test scores of the checkpoint at path, in the precision that it was trained in.

    Args:
        path: The checkpoint.
        data: Name of the data set that it was trained on.
        data_dir: As in load_dataset.
        device: As in TrainConfig.

    Raises:
        CheckpointError: It is damaged, was trained on other data than data, or takes other images.
        DataError: As load_dataset.
        ConfigError: device is not there.
    """
    where = resolve_device(device)
    checkpoint = load(path, where)
    trained_on = checkpoint.info.get("data", data)
    if trained_on != data:
        raise CheckpointError(f"{path} was trained on {shown(trained_on)}, not on data={data!r}; choose that data")
    precision = checkpoint.info.get("precision", "fp32")
    if precision not in get_args(Precision):
        raise CheckpointError(f"{path} names precision {shown(precision)}, not one of {', '.join(get_args(Precision))}")
    recorded = checkpoint.info.get("test_accuracy")
    if recorded is not None and not (is_number(recorded) and 0 <= recorded <= 1):
        raise CheckpointError(f"{path} records test_accuracy {shown(recorded)}, which is not a share from 0 to 1")
    images = load_dataset(data, data_dir, where)
    sizes, channels, side = checkpoint.model.config, *images.test.images.shape[1:3]
    if (sizes.channels, sizes.image_size) != (channels, side) or sizes.classes < images.classes:
        raise CheckpointError(
            f"{path} takes {sizes.channels} x {sizes.image_size} x {sizes.image_size} pixels and tells {sizes.classes} "
            f"classes apart, data={data!r} has {channels} x {side} x {side} and {images.classes}; choose other data"
        )
    with scoring(checkpoint.model, where, cast(Precision, precision)):
        scores = ImageClassification(images).test(checkpoint.model)
    return Evaluation(scores, recorded)
