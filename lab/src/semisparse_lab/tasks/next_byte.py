"""Learning to predict the next byte of a text."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from semisparse.errors import ConfigError
from semisparse_lab.checks import check_counts
from semisparse_lab.data.text import Corpus
from semisparse_lab.tasks.task import Batch, Forward
from semisparse_lab.train.results import Scores

_EVALUATION_BATCH = 128


class NextByte:
    """Task: predict each byte from those before it, in windows of `context` bytes at random places of the corpus.

    An epoch is as many windows as fit side by side into the training set. Scores: mean cross-entropy in nats per byte
    over windows side by side (what does not fill a window is left out), and the share of bytes guessed right.
    """

    def __init__(self, corpus: Corpus, context: int) -> None:
        for part in ("train", "validation", "test"):
            if len(getattr(corpus, part)) <= context:
                raise ConfigError(f"context={context} exceeds the {len(getattr(corpus, part))} bytes for {part}")
        self.corpus, self.context = corpus, context
        self._window = torch.arange(context + 1, device=corpus.train.device)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches of windows in the training set.

        Args:
            batch_size: Windows per batch.

        Raises:
            ConfigError: The set has fewer windows.
        """
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
        """Mean cross-entropy in fp32, nats per byte."""
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


class NextByteOnce(NextByte):
    """Task: as NextByte, but a run sees no byte twice, so that its training loss is a loss on text that is new to it.

    Windows of context + 1 bytes lie side by side, and a run takes them once, in random order. An epoch is one of
    `parts` equal parts of this pass, for that many points of the curves. What does not fill the last batch of each part
    is never seen. An object serves one run of so many epochs.
    """

    def __init__(self, corpus: Corpus, context: int, parts: int) -> None:
        super().__init__(corpus, context)
        self.parts = parts
        check_counts(self, ("parts",))
        self._unseen: Tensor | None = None

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches in a part of the pass.

        Args:
            batch_size: Windows per batch.

        Raises:
            ConfigError: A part has fewer windows.
        """
        steps = len(self.corpus.train) // ((self.context + 1) * batch_size * self.parts)
        if steps == 0:
            raise ConfigError(
                f"batch_size={batch_size} windows of {self.context + 1} bytes exceed one of {self.parts} parts of the "
                f"{len(self.corpus.train)} bytes for training"
            )
        return steps

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """The next part of the pass, as NextByte.batches. The order of all parts is drawn with the first one.

        Raises:
            ConfigError: All parts have been seen.
        """
        steps, data = self.steps_per_epoch(batch_size), self.corpus.train
        if self._unseen is None:
            order = torch.randperm(len(data) // (self.context + 1), generator=generator)
            self._unseen = order[: self.parts * steps * batch_size]
        if not len(self._unseen):
            raise ConfigError(f"parts={self.parts} of the text have all been seen; make a new task for each run")
        starts, self._unseen = self._unseen.tensor_split((steps * batch_size,))
        places = (starts * (self.context + 1)).view(steps, batch_size).to(data.device)
        for step in range(steps):
            windows = data[places[step, :, None] + self._window].long()
            yield windows[:, :-1], windows[:, 1:]


def bits_per_byte(nats: float) -> float:
    """A cross-entropy of nats per byte in bits."""
    return nats / math.log(2)
