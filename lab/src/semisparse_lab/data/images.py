"""The lab's image data sets: scikit-learn's digits (default) and Fashion-MNIST, as normalised tensors on a device."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from semisparse_lab.checks import shown
from semisparse_lab.data.idx import find_idx, read_idx
from semisparse_lab.errors import DataError

DATA_NAMES = ("digits", "fashion-mnist")
CLASSES = 10
SPLIT_SEED = 0
"""Who is in which split never depends on a run's seed, so that all runs and checkpoints share one test set."""

_FASHION_SIDE = 28
_FASHION_FILES = [f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
# Shares held out: digits 449 test and about 112 validation images of 1797; Fashion-MNIST 5000 of its 60000.
_DIGITS_TEST = 0.25
_VALIDATION = 1 / 12


@dataclass(frozen=True, slots=True)
class Split:
    """Images and their labels, on one device.

    Attributes:
        images: (n, channels, side, side) float32, normalised.
        labels: (n,) int64.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def sample(self, count: int) -> "Split":
        """At most count of its images, chosen at random; always the same ones."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(SPLIT_SEED))
        chosen = order[:count].to(self.labels.device)
        return Split(self.images[chosen], self.labels[chosen])


@dataclass(frozen=True, slots=True)
class Dataset:
    """A data set in three disjoint, class-balanced splits.

    Attributes:
        name: As load_dataset calls it.
        train: The split to train on.
        validation: The split on which settings are chosen.
        test: The split that is read once, after training.
        classes: Number of classes.
        mean: Mean of the training pixels before normalising.
        std: Standard deviation of the training pixels before normalising.
        sha256: Checksum of pixels and labels as given.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: int
    mean: float
    std: float
    sha256: str


def load_dataset(name: str, data_dir: Path | None = None, device: torch.device | str = "cpu") -> Dataset:
    """The data set called name on device.

    Args:
        name: "digits" (1797 images of 8 x 8 that come with scikit-learn) or "fashion-mnist" (28 x 28).
        data_dir: Folder with the four idx files of fashion-mnist (see read_idx); None for digits.
        device: Where the tensors go.

    Raises:
        DataError: Another name, or a missing or damaged file.
    """
    if name == "digits":
        if data_dir is not None:
            raise DataError(f"data_dir={str(data_dir)!r}: digits come with scikit-learn; leave data_dir out")
        return _digits(device)
    if name == "fashion-mnist":
        if data_dir is None:
            raise DataError("data='fashion-mnist' needs data_dir, the folder with its four idx files")
        return _fashion_mnist(Path(data_dir), device)
    raise DataError(f"data={name!r} is not one of {', '.join(map(repr, DATA_NAMES))}")


def make_dataset(
    name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], device: torch.device | str = "cpu"
) -> Dataset:
    """A Dataset from images and labels.

    A twelfth of each class of train is held out for validation; pixels are normalised by the rest's mean and standard
    deviation.

    Args:
        name: Of the data set.
        train: Pixels (n, side, side) of any range, and labels (n,) from 0 on.
        test: The same.
        device: Where the tensors go.

    Raises:
        DataError: Pixels and labels differ in number, a split would be empty, or pixels have no spread.
    """
    for part, (pixels, labels) in (("train", train), ("test", test)):
        if len(pixels) != len(labels):
            raise DataError(f"{name}: the {part} set has {len(pixels)} images but {len(labels)} labels")
    pixels, labels = train[0].float(), train[1].long()
    held_out, rest = stratified(labels, _VALIDATION)
    if not (len(held_out) and len(rest) and len(test[1])):
        raise DataError(f"{name}: {len(labels)} training and {len(test[1])} test images are too few for three splits")
    std, mean = torch.std_mean(pixels[rest])
    if not std > 0:
        raise DataError(f"{name}: all training pixels are equal or not numbers, so there is nothing to learn from")
    digest = hashlib.sha256()
    for tensor in (*train, *test):
        digest.update(tensor.contiguous().numpy().data)

    def split(images: Tensor, targets: Tensor) -> Split:
        return Split(((images.float() - mean) / std).unsqueeze(1).to(device), targets.long().to(device))

    return Dataset(
        name=name,
        train=split(pixels[rest], labels[rest]),
        validation=split(pixels[held_out], labels[held_out]),
        test=split(*test),
        classes=int(labels.max()) + 1,
        mean=mean.item(),
        std=std.item(),
        sha256=digest.hexdigest(),
    )


def stratified(labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Indices of a random share of each class, and of the rest; always the same for the same labels."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    chosen, rest = [], []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        count = round(len(members) * share)
        chosen.append(members[:count])
        rest.append(members[count:])
    return torch.cat(chosen), torch.cat(rest)


def _digits(device: torch.device | str) -> Dataset:
    from sklearn.datasets import load_digits  # takes seconds, so only where it is needed

    pixels, labels = load_digits(return_X_y=True)
    images, targets = torch.from_numpy(pixels).view(-1, 8, 8), torch.from_numpy(labels).long()
    test, rest = stratified(targets, _DIGITS_TEST)
    return make_dataset("digits", (images[rest], targets[rest]), (images[test], targets[test]), device)


def _fashion_mnist(folder: Path, device: torch.device | str) -> Dataset:
    try:
        if not folder.is_dir():
            raise DataError(
                f"data_dir={str(folder)!r} is not a folder; pass the one with Fashion-MNIST's four idx files"
            )
        files = [find_idx(folder, name) for name in _FASHION_FILES]
    except OSError as error:
        raise DataError(f"data_dir={shown(str(folder))} cannot be read: {error.strerror or error}") from error
    parts = []
    for image_file, label_file in (files[:2], files[2:]):
        images, labels = read_idx(image_file, 3), read_idx(label_file, 1)
        if images.shape[1:] != (_FASHION_SIDE, _FASHION_SIDE):
            raise DataError(
                f"{image_file} holds images of {images.shape[1]} x {images.shape[2]}, "
                f"expected {_FASHION_SIDE} x {_FASHION_SIDE}"
            )
        if len(images) != len(labels):
            raise DataError(f"{image_file} holds {len(images)} images but {label_file} {len(labels)} labels")
        if len(labels) and int(labels.max()) >= CLASSES:
            raise DataError(f"{label_file} holds label {int(labels.max())}, expected 0 to {CLASSES - 1}")
        parts.append((images, labels))
    return make_dataset("fashion-mnist", parts[0], parts[1], device)
