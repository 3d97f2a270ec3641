"""How much noise rounding leaves in a result: the ratio of signal to noise (SQNR) in dB against fp64, and B1's limits.

A number between 2^e and 2^(e+1) that is rounded to p bits behind its first one is off by at most half of u = 2^(e-p),
and by u^2 / 12 in the mean square. The SQNR is 10 log10(12 x 4^p x r), with r the mean of x^2 over that of 4^e: from 1,
where all are just above a power of two, to 4. For normal numbers, for those of them that 2:4 keeps, and for products of
two, this gives (computed over 4 million of each at 16 scales within an octave):

    p = 7 (bf16)    55.6 dB; with r = 1 52.9 dB
    p = 10 (fp16)   73.6 to 73.7 dB; with r = 1 71.0 dB
    p = 3 (e4m3)    31.5 dB; with r = 1 28.9 dB

So the limits of the plan, 54 and 71 dB, are 1.6 and 2.6 dB below what correct rounding reaches. They are for results
that are rounded once. The energy of the noise of n values scatters by about 2 / sqrt(n) of itself, 0.3 dB for MANY:
with fewer values the limit says nothing. What holds for any number of values is the distance from the SQNR that the
same exact values have after correct rounding (LOST): sums in fp32 cost next to none of it, since where they decide
which neighbour is taken, both are equally far.

Where a bias that is small beside it is added to a product that has been rounded, the noise counts twice: 52.6 and
70.6 dB, 3 dB less.

In fp32 a sum is rounded after each of its n terms. One after another is the worst order: after i of them the sum has i
times the energy of one term, so that the noise of all roundings is n / 2 times that of one rounding of the result. From
149.3 dB (p = 23, r = 1) this takes 38.6 dB for LONGEST terms, and 110 dB are left; TF32 would give 71 dB, as fp16 does.
How far a result is from correct rounding says nothing here.

In fp8 both operands are rounded, each on its own: 31.5 - 3.0 = 28.5 dB, and what the result loses in bf16 does not show
beside it. On an H100 28.47 dB was measured for y, dx and dW of large layers (benchmarks/results/noise-*.json). By the
specification 28.2 to 28.7 dB come out where both operands and the result have ENOUGH values. Against products
of the same codes there is no such limit: tensor cores keep fewer bits of sums of fp8 than fp32 has, so that those are
compared with PyTorch's product alone.

The sample of "mvue" has the variance a_i^2 (1 / p_i - 1) in each entry. For normal numbers all of it is 3.24 dB below
the signal, and so it is in dW, since x is drawn on its own: 3.0 to 3.5 dB where dy has SAMPLE values and dW ENOUGH.
Sampling that is not as good gives less (0 dB where all four are kept alike), and less noise comes with a bias. Rounding
to e4m3 does not show beside it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.trust.cases import Case
from tests.trust.outcome import Row, Rule

ONCE = {torch.bfloat16: 54.0, torch.float16: 71.0, torch.float32: 110.0}
"""dB that a result must reach that has MANY values; in 16 bits, if it is rounded once."""

LONGEST = 14336
"""Terms of the longest sum that is looked at."""

AGAIN = 3.0
"""dB that a second rounding costs."""

MANY = 1024
LOST = 2.0
"""dB that a result may be below the correctly rounded one."""

FP8 = 28.0
"""dB that a result in fp8 must reach against operands that are not rounded."""

ENOUGH = 2**13
"""Values of each operand, and of the result, from which on these limits say something."""

SAMPLED, SAMPLE, TOKENS = (2.8, 3.7), 2**15, 64
"""dB between which dW of a sample is, against dW of the whole gradient; values and tokens of the gradient."""


def decibels(found: Tensor, exact: Tensor) -> float:
    """The SQNR; inf where both are equal, NaN where found is not finite.

    Args:
        found: What came out.
        exact: The same in fp64.
    """
    signal, noise = float(exact.square().sum()), float((found.double() - exact).square().sum())
    if noise == 0:
        return math.inf
    return (
        10 * math.log10(signal / noise)
        if signal > 0 and math.isfinite(noise)
        else -math.inf
        if signal == 0
        else math.nan
    )


@dataclass
class Level:
    """The worst of many figures that have the same limit.

    Attributes:
        what: Was measured.
        limit: For all of them; None where they are only reported.
        rule: How they compare.
        figure: The worst one.
        count: How many.
        faults: Those beyond the limit, in words.
    """

    what: str
    limit: float | None
    rule: Rule = "at least"
    figure: float = math.nan
    count: int = 0
    faults: list[str] = field(default_factory=list)

    def add(self, value: float, where: str) -> None:
        """Take one figure in; one that is NaN stays."""
        upper, gone = self.rule == "at most", math.isnan(self.figure) and self.count > 0
        if not gone:
            worse = value if not self.count or math.isnan(value) else (max if upper else min)(self.figure, value)
            self.figure = worse
        self.count += 1
        if self.limit is not None and not (value <= self.limit if upper else value >= self.limit):
            self.faults.append(f"{where}: {value:.2f} dB")

    def row(self, name: str) -> Row:
        """A line of the table."""
        return Row(
            "B1", f"{name}: {self.what}", f"{self.count} results", self.figure, self.limit, self.rule, self.faults
        )


class Noise:
    """The levels of one kind of layer.

    Args:
        case: The kind.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        once = ONCE[case.dtype]
        low, high = SAMPLED
        what = "results summed in fp32" if case.dtype is torch.float32 else "results rounded once"
        self.once = Level(f"lowest SQNR in dB of {what}", once)
        self.twice = Level("lowest SQNR in dB of y, rounded before and after the bias", once - AGAIN)
        self.lost = Level("most dB that a result is below correct rounding", LOST, "at most")
        self.codes = Level("lowest SQNR in dB against exact products of the same codes", None, "reported")
        self.fp8 = Level("lowest SQNR in dB against operands in 16 bits", FP8)
        self.least = Level("lowest SQNR in dB of dW by a sample against dW without", low)
        self.most = Level("highest SQNR in dB of dW by a sample against dW without", high, "at most")

    def rows(self) -> Iterator[Row]:
        """Those of levels for which something was measured."""
        levels = self.once, self.twice, self.lost, self.codes, self.fp8, self.least, self.most
        return (level.row(self.case.name) for level in levels if level.count)

    def own_dtype(self, name: str, found: Tensor, exact: Tensor, bias: Tensor | None, where: str) -> None:
        """Look at a result of a layer that computes in the dtype of its parameters.

        Args:
            name: "y", "dx", "dW" or "db".
            found: The result.
            exact: In fp64.
            bias: Of the layer.
            where: In reports.
        """
        ours, right, level = decibels(found, exact), exact.to(found.dtype), self.once
        if name == "y" and bias is not None and self.case.config.activation is not None:
            right, level = (exact - bias.double()).to(found.dtype) + bias, self.twice
        if found.dtype is not torch.float32:
            best = decibels(right, exact)
            self.lost.add(0.0 if ours == best else best - ours, where)
        if found.numel() >= MANY:
            level.add(ours, where)

    def in_fp8(self, found: Tensor, plain: Tensor, operands: tuple[Tensor, Tensor], where: str) -> None:
        """Look at a result in fp8; plain: the same of operands that are not rounded, in fp64."""
        if min(one.numel() for one in (*operands, found)) >= ENOUGH:
            self.fp8.add(decibels(found, plain), where)

    def sampled(self, found: Tensor, plain: Tensor, dy: Tensor, where: str) -> None:
        """Look at dW of a sample of dy; plain: dW of dy itself, in fp64."""
        if dy.numel() >= SAMPLE and dy.shape[0] >= TOKENS and found.numel() >= ENOUGH:
            value = decibels(found, plain)
            self.least.add(value, where)
            self.most.add(value, where)
