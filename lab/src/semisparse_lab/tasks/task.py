"""What a learning problem is to the training loop: batches, loss and scores."""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from semisparse_lab.train.results import Scores

Forward = Callable[[Tensor], Tensor]
Batch = tuple[Tensor, Tensor]


class Task(Protocol):
    """One learning problem. forward maps a batch's inputs to outputs: the model, or what wraps it."""

    def steps_per_epoch(self, batch_size: int) -> int:
        """Batches in one epoch.

        Args:
            batch_size: Examples per batch.

        Raises:
            ConfigError: The data do not fill one batch.
        """

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """One epoch of (inputs, targets); their order and augmentation depend on the CPU generator alone."""

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        """Mean loss of one batch, a scalar on the device."""

    def validate(self, forward: Forward) -> Scores:
        """Scores on the validation split."""

    def test(self, forward: Forward) -> Scores:
        """Scores on the test split; for the end of a run only."""
