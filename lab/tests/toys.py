"""Toy data, model and settings that train in well under a second."""

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from semisparse import recipes
from semisparse_lab.data.images import Dataset, make_dataset
from semisparse_lab.experiment import Row, train_row
from semisparse_lab.models.vit import VisionTransformer, ViTConfig, build_model
from semisparse_lab.tasks.classification import ImageClassification
from semisparse_lab.tasks.task import Batch, Forward, Task
from semisparse_lab.train.config import TrainConfig
from semisparse_lab.train.results import RunResult

MODEL = ViTConfig(image_size=8, patch_size=4, width=16, depth=1, heads=2, classes=4)
TRAIN = TrainConfig(epochs=3, batch_size=16, lr=1e-2)


@dataclass(frozen=True)
class Run:
    """A trained row and its model."""

    result: RunResult
    weights: str
    model: VisionTransformer


def train_toy(row: Row, task: Task, config: TrainConfig = TRAIN, **options: object) -> Run:
    """Train a new MODEL as row says."""
    model = build_model(MODEL, config.seed, config.device)
    trained = train_row(row, model, task, config, **options)
    return Run(trained.result, trained.weights, model)


def sparse_row(fraction: float) -> Row:
    """Exact masks for a share of the steps, then dense."""
    return Row("toy", "toy", recipes.dinov2(sparse_fraction=fraction))


FASHION_FILES = [f"{p}-{kind}" for p in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
FASHION_SIZES = {"train": 120, "t10k": 20}


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


def idx(values: Tensor) -> bytes:
    """Values (uint8) as an idx file, by the format's description."""
    header = struct.pack(f">BBBB{values.dim()}I", 0, 0, 8, values.dim(), *values.shape)
    return header + bytes(values.flatten().tolist())


def fashion_contents(name: str) -> Tensor:
    """What the toy Fashion-MNIST holds in the file called name."""
    count = FASHION_SIZES[name.partition("-")[0]]
    if "labels" in name:
        return (torch.arange(count) % 10).to(torch.uint8)
    return (torch.arange(count * 28 * 28) % 251).to(torch.uint8).view(count, 28, 28)


def write_fashion_mnist(folder: Path) -> None:
    """A toy Fashion-MNIST, half of its files compressed."""
    for i, name in enumerate(FASHION_FILES):
        data = idx(fashion_contents(name))
        if i % 2:
            (folder / f"{name}.gz").write_bytes(gzip.compress(data))
        else:
            (folder / name).write_bytes(data)
