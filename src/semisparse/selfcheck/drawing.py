"""The mean of many sampled gradients: how far it may be from the gradient, by an inequality that holds for each entry.

With x the unit matrix, dW of a layer is S(dy)^T itself. dy repeats one small block, so that one step draws each of its
entries many times; the keys 0, 1, ... give the same draws on each device. An entry of S(dy) has the mean a, at most the
variance v, and lies within b of its mean. Bernstein's inequality: the mean of D draws is off by t or more with a
probability of at most 2 exp(-D t^2 / (2 v + 2 b t / 3)). Summed over all entries, a right sampler exceeds what is
allowed with a probability of at most CHANCE.
"""

import math

import torch
from torch import Tensor

from semisparse.config import SparseConfig
from semisparse.reference import fp8, mvue
from semisparse.selfcheck.comparing import Found
from semisparse.selfcheck.operands import Setting, Step, build

CHANCE = 1e-9
SIZE = 64
BLOCK = (4, 16)
"""Tokens and columns that are repeated to SIZE x SIZE."""

KEYS = {"cuda": 64, "cpu": 16}
RULE = (
    f"1: the bound of Bernstein's inequality for each entry, which a right sampler exceeds with a chance of {CHANCE:g}"
)


def mean_of_draws(setting: Setting, config: SparseConfig) -> Found:
    """The mean of dW over draws against dy.

    Args:
        setting: Where.
        config: Of a layer with a sampled gradient.
    """
    layer, keys = build(setting, config, SIZE, SIZE, torch.bfloat16), KEYS[setting.device.type]
    block = setting.normal(*BLOCK, seed=6, dtype=torch.bfloat16)
    down, across = (SIZE // size for size in BLOCK)
    step = Step(layer, torch.eye(SIZE, device=setting.device, dtype=torch.bfloat16), block.repeat(down, across))
    total = torch.zeros(SIZE, SIZE, dtype=torch.float64, device=setting.device)
    for seed in range(keys):
        layer.held_seed.fill_(seed)  # type: ignore[operator]
        total += step.run()["dW"].mT.double()
    mean = total.view(down, BLOCK[0], across, BLOCK[1]).mean((0, 2)) / keys
    draws = keys * down * across
    allowed = allowed_errors(block, draws, config.precision is not None)
    share = ((mean - block.double()).abs() / allowed).nan_to_num(torch.inf)
    return Found(float(share.max()), 1.0, f"mean of {draws} draws", RULE)


def allowed_errors(dy: Tensor, draws: int, in_fp8: bool) -> Tensor:
    """How far the mean of each entry may be from dy, fp64.

    Args:
        dy: bf16, finite.
        draws: How many.
        in_fp8: Whether kept values are rounded to e4m3 at random; else to bf16, to nearest.
    """
    exact = dy.double()
    kept = exact.abs() / mvue.probabilities(dy).clamp(min=1e-300)
    kept = torch.where(exact == 0, 0, kept)
    variance, reach = mvue.variance(dy), kept
    rounding = torch.finfo(torch.bfloat16).eps / 2 * exact.abs()  # of what is kept, to nearest
    if in_fp8:
        scale = 2 / fp8.multiplier_for(fp8.largest_magnitude(dy)).double()
        apart = torch.maximum(kept * 2.0**-3, 2.0**-9 * scale)  # neighbours of e4m3, subnormal ones included
        # At random between neighbours: a quarter of their distance squared at most, and a mean off by 2^-10 of it.
        variance, reach, rounding = variance + apart.square() / 4, reach + apart, apart * 2.0**-10
    log = math.log(2 * dy.numel() / CHANCE)
    linear = log * reach / 3
    return (linear + (linear.square() + 2 * log * variance * draws).sqrt()) / draws + rounding
