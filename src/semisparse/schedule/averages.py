"""Exponential averages of a noisy series, and how uncertain they are."""

import math
from dataclasses import dataclass

_LONGER = 10
"""Ratio of the values over which the noise is estimated to those in the average."""


@dataclass(slots=True)
class Average:
    """The exponential average of the values added so far, with weights that add up to 1 from the first value on.

    The value added k values ago has the weight decay^k, divided by the sum of all weights. The noise of one value is
    estimated from successive differences, sqrt(mean (x_t - x_{t-1})^2 / 2) (von Neumann 1941), to which a trend hardly
    adds. They are weighted by decay^(k / 10): over ten times as many values, so that the estimate itself is less noisy.
    It is too small if the noise of neighbouring values is correlated.

    Attributes:
        total: Sum of the weighted values.
        weights: Sum of the weights.
        squares: Sum of their squares.
        differences: Sum of half the squared differences, weighted.
        difference_weights: Sum of their weights.
        last: The last value; 0 before the first.
        count: Number of values.
    """

    total: float = 0.0
    weights: float = 0.0
    squares: float = 0.0
    differences: float = 0.0
    difference_weights: float = 0.0
    last: float = 0.0
    count: int = 0

    def add(self, value: float, decay: float) -> None:
        """Add a value.

        Args:
            value: A finite number.
            decay: Of the weights, 0 or more and less than 1; the same in each call.
        """
        self.total = decay * self.total + value
        self.weights = decay * self.weights + 1
        self.squares = decay * decay * self.squares + 1
        if self.count:
            slowly = decay ** (1 / _LONGER)
            self.differences = slowly * self.differences + (value - self.last) ** 2 / 2
            self.difference_weights = slowly * self.difference_weights + 1
        self.last, self.count = value, self.count + 1

    @property
    def mean(self) -> float:
        """The average; at least one value was added."""
        return self.total / self.weights

    @property
    def standard_error(self) -> float:
        """Of the average: the noise of one value times the norm of the weights; at least two were added."""
        return math.sqrt(self.differences / self.difference_weights * self.squares) / self.weights
