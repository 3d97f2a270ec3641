"""What is known about GPUs without measuring: times of layers that we measured, and published ratios of products.

shipped.json is made from benchmark results by benchmarks/plan_table.py: whole forward and backward passes of single
layers in bf16 with bias, packing included. The published ratios are another thing: products alone, of other people.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from semisparse.planning.problems import LinearProblem
from semisparse.planning.timing import Mode


@dataclass(frozen=True, slots=True)
class KnownLayer:
    """A layer that we measured.

    Attributes:
        gpu: As torch names it.
        torch: Version.
        measured: Day.
        mode: How it ran.
        mkn: M, K and N.
        ms: Milliseconds of forward and backward by candidate; dense is among them.
    """

    gpu: str
    torch: str
    measured: str
    mode: str
    mkn: tuple[int, int, int]
    ms: dict[str, float]

    @property
    def size(self) -> str:
        """M x K x N as text."""
        return " x ".join(map(str, self.mkn))


@cache
def known_layers() -> tuple[KnownLayer, ...]:
    """The layers that ship with the package, read once."""
    content = json.loads(resources.files(__package__).joinpath("shipped.json").read_text(encoding="utf-8"))
    return tuple(KnownLayer(**{**entry, "mkn": tuple(entry["mkn"])}) for entry in content["layers"])


def near(problem: LinearProblem, gpu: str, mode: Mode, layers: Sequence[KnownLayer] | None = None) -> KnownLayer | None:
    """The measured layer of the same K and N whose M is nearest, at most twice or half as many; else None.

    Args:
        problem: A layer in 16 bits.
        gpu: As torch names it.
        mode: How it runs.
        layers: To search; default: known_layers().
    """
    there = [layer for layer in (known_layers() if layers is None else layers)
             if (layer.gpu, layer.mode, *layer.mkn[1:]) == (gpu, mode, problem.in_features, problem.out_features)
             and problem.tokens <= 2 * layer.mkn[0] and layer.mkn[0] <= 2 * problem.tokens]  # fmt: skip
    return min(there, key=lambda layer: abs(math.log(layer.mkn[0] / problem.tokens)), default=None)


@dataclass(frozen=True, slots=True)
class Published:
    """Medians of one GPU: how many times faster a product is, from the 10th to the 90th percentile.

    Attributes:
        gpu: Name and capability.
        bf16: 2:4 over dense, both in bf16.
        bf16_spread: Its percentiles.
        fp8: 2:4 over dense, both in fp8; None where there is none.
        fp8_spread: Its percentiles; None where they are not given.
        fp8_over_bf16: fp8 with 2:4 over dense bf16; None where there is none.
    """

    gpu: str
    bf16: float
    bf16_spread: tuple[float, float]
    fp8: float | None = None
    fp8_spread: tuple[float, float] | None = None
    fp8_over_bf16: float | None = None

    @property
    def cells(self) -> tuple[str, str, str]:
        """The three ratios as text, with percentiles where there are some; "" where there is no ratio."""
        return _cell(self.bf16, self.bf16_spread), _cell(self.fp8, self.fp8_spread), _cell(self.fp8_over_bf16, None)


def _cell(value: float | None, spread: tuple[float, float] | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" + (f" ({spread[0]:.2f} to {spread[1]:.2f})" if spread else "")


PUBLISHED = (
    Published("A100 PCIe (sm80)", 1.61, (1.20, 1.68)),
    Published("RTX 4090 (sm89)", 1.93, (1.44, 2.12), 2.03, (1.93, 2.07), 3.87),
    Published("H100 PCIe (sm90)", 1.57, (1.45, 1.71), 1.57, (1.36, 1.78), 2.91),
    Published("B200 (sm100)", 1.69, (1.47, 1.81), 1.62, (1.48, 1.84), 3.20),
    Published("RTX 5080 (sm120)", 1.88, (1.58, 1.92), 1.71, (1.67, 1.74), 3.47),
    Published("GB10 (sm121)", 0.93, (0.49, 1.50), 1.24, None, 2.68),
)
"""Evaluated by us from the tables that SOURCE names; not run by us."""

SOURCE = (
    "SlideSparse repository, slidesparse/benchmark_kernel/kernel_speedup_results, torch 2.9.0+cu129, January 2026: "
    "medians (10th to 90th percentile) over linear shapes of Llama-3.2, Qwen2.5 and BitNet, M >= 8192, N and K >= 2048"
)
