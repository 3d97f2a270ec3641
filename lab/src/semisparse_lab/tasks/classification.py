"""Image classification: batches with augmentation, loss and scores."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from semisparse.errors import ConfigError
from semisparse_lab.data.images import Dataset, Split
from semisparse_lab.tasks.task import Batch, Forward
from semisparse_lab.train.results import Scores

_EVALUATION_BATCH = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """Random affine change of each training image, drawn uniformly from plus or minus each value.

    Args:
        shift: Part of the image's side, in both directions.
        rotation: Radians.
        scale: Relative zoom.
        flip: Mirror half of the images left to right.
        whole_pixels: Round shifts to whole pixels, so that images that are not turned or zoomed stay as sharp as those
            that are scored.
    """

    shift: float = 1 / 16
    rotation: float = 0.1
    scale: float = 0.1
    flip: bool = False
    whole_pixels: bool = False

    @property
    def draws(self) -> int:
        """Random numbers that one image takes."""
        return 5 if self.flip else 4


class ImageClassification:
    """Task: cross-entropy on a Dataset, all of it on one device, with optional augmentation of training images.

    An epoch visits the training images in random order; a last partial batch is left out, so all batches have one size.
    """

    def __init__(self, data: Dataset, augmentation: Augmentation | None = None) -> None:
        self.data = data
        self.augmentation = augmentation

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches in the training split.

        Args:
            batch_size: Images per batch.

        Raises:
            ConfigError: The split has fewer images.
        """
        steps = len(self.data.train) // batch_size
        if steps == 0:
            raise ConfigError(f"batch_size={batch_size} exceeds the {len(self.data.train)} training images")
        return steps

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """(images, labels) of one epoch. All random numbers are drawn on the CPU and moved once per epoch."""
        images, labels = self.data.train.images, self.data.train.labels
        order = torch.randperm(len(labels), generator=generator).to(images.device)
        count = 0 if self.augmentation is None else self.augmentation.draws
        draws = (torch.rand(len(labels), count, generator=generator) * 2 - 1).to(images.device)
        for step in range(self.steps_per_epoch(batch_size)):
            chosen = slice(step * batch_size, (step + 1) * batch_size)
            batch = images[order[chosen]]
            if self.augmentation is not None:
                batch = augment(batch, draws[chosen], self.augmentation)
            yield batch, labels[order[chosen]]

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        """Mean cross-entropy in fp32."""
        return F.cross_entropy(forward(batch[0]).float(), batch[1])

    def validate(self, forward: Forward) -> Scores:
        """Scores on the validation split."""
        return classification_scores(forward, self.data.validation)

    def test(self, forward: Forward) -> Scores:
        """Scores on the test split."""
        return classification_scores(forward, self.data.test)


def classification_scores(forward: Forward, split: Split) -> Scores:
    """Mean cross-entropy and accuracy over split."""
    loss, correct = 0.0, 0
    for images, labels in zip(
        split.images.split(_EVALUATION_BATCH), split.labels.split(_EVALUATION_BATCH), strict=True
    ):
        logits = forward(images).float()
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        correct += int((logits.argmax(dim=1) == labels).sum())
    return Scores(loss / len(split), correct / len(split))


def augment(images: Tensor, draws: Tensor, settings: Augmentation) -> Tensor:
    """Images (n, C, S, S) turned, zoomed, shifted and mirrored by draws (n, settings.draws) in [-1, 1], bilinearly.

    Pixels that the moved image does not cover get the darkest value of the batch.
    """
    angle, zoom = draws[:, 0] * settings.rotation, 1 + draws[:, 1] * settings.scale
    shift = 2 * settings.shift * draws[:, 2:4]  # the sampling grid spans 2 units
    if settings.whole_pixels:
        shift = (shift * images.shape[-1] / 2).round() * 2 / images.shape[-1]
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    mirror = torch.where(draws[:, 4] < 0, -1.0, 1.0) if settings.flip else torch.ones_like(cos)
    rows = [
        torch.stack([mirror * cos, -sin, shift[:, 0]], dim=1),
        torch.stack([mirror * sin, cos, shift[:, 1]], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    darkest = images.amin()
    return F.grid_sample(images - darkest, grid, align_corners=False) + darkest
