"""Exponential averages of a noisy series, and how uncertain they are."""

import math
from dataclasses import dataclass


@dataclass(slots=True)
class Average:
    """The exponential average of the values added so far, with weights that add up to 1 from the first value on.

    The value added k values ago has the weight (1 - 1 / steps)^k, divided by the sum of all weights. The noise of one
    value is estimated from successive differences, sqrt(mean (x_t - x_{t-1})^2 / 2) (von Neumann 1941), with the same
    weights: a trend hardly adds to it. It is too small if the noise of neighbouring values is correlated.

    Attributes:
        total: Sum of the weighted values.
        weights: Sum of the weights.
        squares: Sum of their squares.
        differences: Sum of half the squared differences, weighted.
        last: The last value; 0 before the first.
        count: Number of values.
    """

    total: float = 0.0
    weights: float = 0.0
    squares: float = 0.0
    differences: float = 0.0
    last: float = 0.0
    count: int = 0

    def add(self, value: float, steps: int) -> None:
        """Add a value.

        Args:
            value: A finite number.
            steps: Values after which a weight has fallen by about e; the same in each call.
        """
        decay = 1 - 1 / steps
        self.total = decay * self.total + value
        self.weights = decay * self.weights + 1
        self.squares = decay * decay * self.squares + 1
        self.differences *= decay
        if self.count:
            self.differences += (value - self.last) ** 2 / 2
        self.last, self.count = value, self.count + 1

    @property
    def mean(self) -> float:
        """The average; at least one value was added."""
        return self.total / self.weights

    @property
    def standard_error(self) -> float:
        """Of the average, if values are independent: the noise of one value times the norm of the weights."""
        return math.sqrt(self.differences / self.weights * self.squares) / self.weights
