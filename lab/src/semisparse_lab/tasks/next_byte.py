"""Learning to predict the next byte of a text."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from semisparse.errors import ConfigError
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


def bits_per_byte(nats: float) -> float:
    """A cross-entropy of nats per byte in bits."""
    return nats / math.log(2)
