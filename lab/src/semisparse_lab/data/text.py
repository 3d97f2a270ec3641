"""Text to learn from that every Python brings along, the source of its standard library, and learning bytes of it."""

import hashlib
import math
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from semisparse.errors import ConfigError
from semisparse_lab.errors import DataError
from semisparse_lab.tasks.classification import Batch, Forward
from semisparse_lab.train.results import Scores

_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "__pycache__", "idlelib", "turtledemo"})
_EVALUATION_BATCH = 128


@dataclass(frozen=True, slots=True)
class Corpus:
    """Bytes (uint8, one dimension, on one device) in three disjoint sets of whole files. sha256: names and contents."""

    train: Tensor
    validation: Tensor
    test: Tensor
    files: int
    sha256: str

    def shortened(self, length: int) -> "Corpus":
        """The first length bytes of the training set, and a tenth as many of the others."""
        tenth = length // 10
        return replace(self, train=self.train[:length], validation=self.validation[:tenth], test=self.test[:tenth])


def standard_library(folder: Path | None = None, device: torch.device | str = "cpu") -> Corpus:
    """The .py files of the standard library of this interpreter, or of folder, without its tests.

    A file's name decides its set: one of 20 is for validation, one for test. Files are joined in the order of their
    names, each ended by a zero byte. Another Python version has other files; Corpus.sha256 tells. Raises DataError
    when folder has no source, or so little that a set is empty.
    """
    root = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    parts: dict[str, list[bytes]] = {"train": [], "validation": [], "test": []}
    digest = hashlib.sha256()
    try:
        paths = sorted(
            path for path in root.rglob("*.py") if path.is_file() and not _LEFT_OUT & set(path.relative_to(root).parts)
        )
        for path in paths:
            name, content = path.relative_to(root).as_posix(), path.read_bytes() + b"\0"
            digest.update(name.encode() + b"\0" + content)
            twentieth = hashlib.sha256(name.encode()).digest()[0] % 20
            parts[{0: "validation", 1: "test"}.get(twentieth, "train")].append(content)
    except OSError as error:
        raise DataError(f"data_dir={str(root)!r} cannot be read: {error.strerror or error}") from error
    for part, contents in parts.items():
        if not contents:
            raise DataError(f"data_dir={str(root)!r} has {len(paths)} .py files, none of them for {part}; "
                            "pass the folder of a whole standard library")  # fmt: skip
    # A bytearray, because torch warns of memory that it may not write to.
    joined = {
        part: torch.frombuffer(bytearray(b"".join(contents)), dtype=torch.uint8) for part, contents in parts.items()
    }
    return Corpus(
        **{part: tensor.to(device) for part, tensor in joined.items()}, files=len(paths), sha256=digest.hexdigest()
    )


class NextByte:
    """Task: predict each byte from those before it, in windows of `context` bytes at random places of the corpus.

    An epoch is as many windows as fit side by side into the training set. Scores: mean cross-entropy in nats a byte
    over windows side by side (what does not fill a window is left out), and the share of bytes guessed right.
    """

    def __init__(self, corpus: Corpus, context: int) -> None:
        for part in ("train", "validation", "test"):
            if len(getattr(corpus, part)) <= context:
                raise ConfigError(f"context={context} exceeds the {len(getattr(corpus, part))} bytes for {part}")
        self.corpus, self.context = corpus, context
        self._window = torch.arange(context + 1, device=corpus.train.device)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches of windows in the training set. Raises ConfigError when there is none."""
        steps = len(self.corpus.train) // (self.context * batch_size)
        if steps == 0:
            raise ConfigError(f"batch_size={batch_size} windows of {self.context} bytes exceed the training set")
        return steps

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """(bytes, the bytes that follow them), both (batch_size, context) int64. Places are drawn on the CPU."""
        steps, data = self.steps_per_epoch(batch_size), self.corpus.train
        starts = torch.randint(len(data) - self.context, (steps, batch_size), generator=generator).to(data.device)
        for step in range(steps):
            windows = data[starts[step, :, None] + self._window].long()
            yield windows[:, :-1], windows[:, 1:]

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        """Mean cross-entropy in fp32, nats a byte."""
        return F.cross_entropy(forward(batch[0]).float().flatten(0, 1), batch[1].flatten())

    def validate(self, forward: Forward) -> Scores:
        """Scores on the validation set."""
        return self._scores(forward, self.corpus.validation)

    def test(self, forward: Forward) -> Scores:
        """Scores on the test set."""
        return self._scores(forward, self.corpus.test)

    def _scores(self, forward: Forward, data: Tensor) -> Scores:
        count = (len(data) - 1) // self.context
        inputs = data[: count * self.context].view(count, self.context)
        targets = data[1 : count * self.context + 1].view(count, self.context)
        loss, correct = torch.zeros((), dtype=torch.float64, device=data.device), torch.zeros((), device=data.device)
        for x, y in zip(inputs.split(_EVALUATION_BATCH), targets.split(_EVALUATION_BATCH), strict=True):
            logits = forward(x.long()).float().flatten(0, 1)
            loss += F.cross_entropy(logits, y.long().flatten(), reduction="sum")
            correct += (logits.argmax(dim=1) == y.flatten()).sum()
        return Scores(loss.item() / inputs.numel(), correct.item() / inputs.numel())


def bits_per_byte(nats: float) -> float:
    """A cross-entropy of nats a byte in bits."""
    return nats / math.log(2)
