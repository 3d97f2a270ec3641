"""Toy data, model and settings that train in well under a second."""

from dataclasses import dataclass

import torch
from torch import Tensor

from semisparse.demo.data import Dataset, make_dataset
from semisparse.demo.model import ViTConfig
from semisparse.demo.task import Batch, Forward, ImageClassification
from semisparse.demo.training import TrainConfig

MODEL = ViTConfig(image_size=8, patch_size=4, width=16, depth=1, heads=2, classes=4)
TRAIN = TrainConfig(epochs=3, batch_size=16, lr=1e-2)


def toy_images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise with one bright quadrant; the label says which."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    images = torch.rand(count, 8, 8, generator=generator)
    for i, label in enumerate(labels.tolist()):
        row, column = 4 * (label // 2), 4 * (label % 2)
        images[i, row : row + 4, column : column + 4] += 1
    return images, labels


def toy_data(device: str = "cpu") -> Dataset:
    return make_dataset("toy", toy_images(96, 0), toy_images(40, 1), device)


@dataclass
class OverflowingTask(ImageClassification):
    """ImageClassification whose loss is infinite at the given steps, so that a gradient scaler skips them."""

    data: Dataset
    overflows: frozenset[int]
    augmentation: None = None
    calls: int = 0

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        loss = super().loss(forward, batch)
        self.calls += 1
        return loss * float("inf") if self.calls - 1 in self.overflows else loss


def kept_per_group(weight: Tensor) -> Tensor:
    """Nonzero entries in each group of 4 along the last axis, counted by hand."""
    return (weight.reshape(-1, 4) != 0).sum(dim=1)
