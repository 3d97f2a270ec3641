"""Learning to predict the next token of a text of which a run sees no byte twice."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from semisparse.errors import ConfigError
from semisparse_lab.data.tokens import TokenSets
from semisparse_lab.tasks.task import Batch, Forward


@dataclass(frozen=True, slots=True)
class TextScore:
    """How well a model predicts a text.

    Attributes:
        nats_per_token: Mean cross-entropy.
        bits_per_byte: The sum of the cross-entropies in bits, over the bytes that the predicted tokens stand for.
        bytes: These bytes.
    """

    nats_per_token: float
    bits_per_byte: float
    bytes: int


class NextToken:
    """Task: predict each token from those before it, in windows of `context` tokens.

    For training, windows of context + 1 tokens lie side by side, and a run takes them in random order, each once. For
    scores they lie side by side, too; what does not fill a batch of windows is left out.

    Args:
        tokens: The text.
        context: Tokens that the model sees.
        batch_size: Windows per batch.
    """

    def __init__(self, tokens: TokenSets, context: int, batch_size: int) -> None:
        self.tokens, self.context, self.batch_size = tokens, context, batch_size
        self._window = torch.arange(context + 1, device=tokens.train.device)
        for part in ("validation", "test"):
            if not self._batches_of(getattr(tokens, part)):
                raise ConfigError(
                    f"batch_size={batch_size} windows of {context} tokens exceed the {len(getattr(tokens, part))} "
                    f"tokens for {part}"
                )

    @property
    def most_steps(self) -> int:
        """Batches in one pass over the training set."""
        return len(self.tokens.train) // ((self.context + 1) * self.batch_size)

    def batches(self, steps: int, generator: torch.Generator) -> Iterator[Batch]:
        """(tokens, the tokens that follow them), both (batch_size, context) int64. Runs of one seed share their order.

        Args:
            steps: Batches, at most most_steps.
            generator: Of the CPU; draws the order of all windows.

        Raises:
            ConfigError: The text is too short.
        """
        if steps > self.most_steps:
            raise ConfigError(f"steps={steps} exceed the {self.most_steps} that the text has without repetition")
        data = self.tokens.train
        order = torch.randperm(len(data) // (self.context + 1), generator=generator)[: steps * self.batch_size]
        places = (order * (self.context + 1)).view(steps, self.batch_size).to(data.device)
        for step in range(steps):
            windows = data[places[step, :, None] + self._window].long()
            yield windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def score(self, forward: Forward, part: str, windows: int | None = None) -> TextScore:
        """Score a set, in batches as large as those for training.

        Args:
            forward: Tokens to logits.
            part: "validation" or "test".
            windows: The first so many, rounded down to whole batches but one at least; None for all.
        """
        data: Tensor = getattr(self.tokens, part)
        batches = self._batches_of(data)
        batches = batches if windows is None else min(batches, max(1, windows // self.batch_size))
        size = batches * self.batch_size * self.context
        shape = (batches, self.batch_size, self.context)
        nats = torch.zeros((), dtype=torch.float64, device=data.device)
        for x, y in zip(data[:size].view(shape), data[1 : size + 1].view(shape), strict=True):
            nats += F.cross_entropy(forward(x.long()).float().flatten(0, 1), y.long().flatten(), reduction="sum")
        counted = int(self.tokens.lengths[data[1 : size + 1].long()].sum().item())
        total = nats.item()
        return TextScore(total / size, total / math.log(2) / counted, counted)

    def _batches_of(self, data: Tensor) -> int:
        return (len(data) - 1) // (self.context * self.batch_size)


def next_token_loss(forward: Forward, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in fp32, nats per token.

    Args:
        forward: Tokens to logits.
        inputs: (B, T) tokens.
        targets: The tokens that follow them.
    """
    return F.cross_entropy(forward(inputs).float().flatten(0, 1), targets.flatten())
