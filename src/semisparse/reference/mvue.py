"""The minimum-variance unbiased 2:4 sample of a gradient along tokens, in plain PyTorch: the specification of "mvue".

A group is four neighbouring tokens of one column, with sizes m_i = |a_i| and S their sum. Entry i is kept with
probability p_i = min(1, c m_i), where c makes the four add up to 2, and a kept entry becomes a_i / p_i. Of all unbiased
samples with two entries this has the smallest variance, sum of a_i^2 (1 / p_i - 1) (arXiv 2203.10991; the closed form
follows from the conditions of Karush, Kuhn and Tucker). With R the sum of the three smaller sizes:

    no m_i above R:    p_i = 2 m_i / S. Both kept entries become +-S / 2.
    one m_i above R:   it is kept as it is. One of the others is kept as well: p_j = m_j / R, and becomes +-R.

Both are one rule: with sizes cut down to R and h = min(S / 2, R), p_i = min(m_i, R) / h, and a kept entry becomes
+-max(m_i, h). Exactly two are kept by systematic sampling: with one uniform u, the entries whose intervals of the
running sum hold the points u h and u h + h. There is no division, so kernels can repeat all of this bit for bit. Sums
and products are fp32 (fp64 for fp64), in the order written here; the result is rounded once to the gradient's dtype.
Probabilities are right to 4 x 2^-23, a few units of u's resolution (2^-17 for subnormal bf16 numbers, by search).
Within that, rounding can let a point fall behind its interval, on an entry that is zero, too.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from semisparse.pattern import GROUP
from semisparse.reference.linear import pad_tokens
from semisparse.reference.masks import check_dtype, check_shape
from semisparse.sampling import FOLD, UNIFORM_BITS

_WORD = 0xFFFFFFFF
_MULTIPLIERS, _WEYL, _ROUNDS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 10


class Sample(NamedTuple):
    """A sample of a gradient.

    Attributes:
        matrix: S(dy), M x N in dy's dtype, zero where nothing was kept.
        kept: bool, M' x N, M' being M rounded up to a multiple of 4: exactly two of each group, zeros among them.
    """

    matrix: Tensor
    kept: Tensor


def sample(grad_output: Tensor, seed: Tensor | int) -> Sample:
    """S(dy): two of each four tokens kept at random, and scaled so that the mean is dy.

    A group with fewer than two entries that are not zero keeps them as they are. Of a group with NaN or Inf the first
    of these is always kept as it is, and one other entry with it: the weight gradient is then not finite either. So it
    is where three sizes add up to more than fp32 holds. Rows of zeros complete the last group.

    Args:
        grad_output: dy, M x N, N a multiple of 4, fp64, fp32, fp16 or bf16.
        seed: Key of the random numbers, 64 bits; as a tensor without dimensions it stays on its device.

    Raises:
        ShapeError, TensorError: grad_output has no such groups, or is not of a float dtype.
    """
    tokens = check_shape(grad_output, tiles=False)[0]
    check_dtype(grad_output)
    padded = pad_tokens(grad_output)
    wide = padded.to(torch.promote_types(padded.dtype, torch.float32))
    values = wide.reshape(-1, GROUP, padded.shape[1])
    first, second, scaled = choose(values, uniforms(padded, seed).to(wide.dtype))
    place = torch.arange(GROUP, device=padded.device)[None, :, None]
    kept = ((place == first[:, None]) | (place == second[:, None])).view(padded.shape)
    matrix = torch.where(kept, scaled.view(padded.shape), 0).to(padded.dtype)
    return Sample(matrix[:tokens], kept)


def choose(values: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What is kept of each group, and what each entry becomes if it is kept.

    Args:
        values: Groups x 4 x N, fp32 or fp64.
        uniform: Groups x N, above 0 and below 1.

    Returns:
        Index of the first and of the second kept entry (int64, Groups x N), first < second; and the scaled values.
    """
    a, b, c, d = torch.where(values.isnan(), torch.inf, values.abs()).unbind(1)
    rest = (torch.minimum(a, b) + torch.minimum(c, d)) + torch.minimum(torch.maximum(a, b), torch.maximum(c, d))
    largest = torch.maximum(torch.maximum(a, b), torch.maximum(c, d))
    # An entry that is alone needs an interval, and one that is not finite must be kept.
    limit = torch.where((rest > 0) & (largest < torch.inf), rest, largest)
    step = torch.minimum(0.5 * limit + 0.5 * largest, limit)
    first_sum = torch.minimum(a, limit)
    second_sum = first_sum + torch.minimum(b, limit)
    sums = (first_sum, second_sum, second_sum + torch.minimum(c, limit))
    point = uniform * step
    one = torch.stack([ends <= point for ends in sums]).sum(0)
    other = torch.stack([ends - step <= point for ends in sums]).sum(0)
    # Rounding, or zeros, can let both fall on one entry or behind the last one.
    first = torch.minimum(one, other).clamp(max=2)
    second = torch.maximum(torch.maximum(one, other), first + 1)
    least = torch.minimum(step, rest)[:, None]
    return first, second, torch.copysign(torch.maximum(values.abs(), least), values)


def probabilities(grad_output: Tensor) -> Tensor:
    """p_i of each entry (fp64, as grad_output), by the closed form; grad_output: M x N, M a multiple of 4, finite."""
    sizes = grad_output.double().abs().reshape(-1, GROUP, grad_output.shape[1])
    total, largest = sizes.sum(1, keepdim=True), sizes.amax(1, keepdim=True)
    is_largest = sizes == largest
    alone = torch.where(is_largest, 1, sizes / (total - largest).clamp(min=1e-300))
    chance = torch.where(largest > total / 2, alone, 2 * sizes / total.clamp(min=1e-300))
    return chance.reshape(grad_output.shape)


def variance(grad_output: Tensor) -> Tensor:
    """Variance of each entry of S(dy), a_i^2 (1 / p_i - 1), by the closed form (fp64); 0 for an entry that is 0."""
    square, chance = grad_output.double().square(), probabilities(grad_output)
    return torch.where(square > 0, square * (1 / chance.clamp(min=1e-300) - 1), 0)


def uniforms(grad_output: Tensor, seed: Tensor | int) -> Tensor:
    """The uniform of each group, an odd multiple of 2^-24 between 0 and 1 (fp32, M/4 x N).

    Args:
        grad_output: M x N, both multiples of 4.
        seed: As sample's.
    """
    return as_uniforms(random_words(grad_output, seed))


def as_uniforms(words: Tensor) -> Tensor:
    """The uniforms (fp32) of random 32-bit words (int64), from their upper bits."""
    return (2 * (words >> (32 - UNIFORM_BITS)) + 1).float() * 2.0 ** -(UNIFORM_BITS + 1)


def random_words(grad_output: Tensor, seed: Tensor | int) -> Tensor:
    """The random 32-bit word of each group (int64, M/4 x N).

    Args:
        grad_output: M x N, both multiples of 4.
        seed: As sample's.
    """
    rows, columns = (size // GROUP for size in grad_output.shape)
    folded = _folded(grad_output)
    place = torch.arange(max(rows, columns), device=grad_output.device)
    tile_row, tile_column = place[:rows, None].expand(rows, columns), place[None, :columns].expand(rows, columns)
    words = philox((tile_row, tile_column, folded[..., 0], folded[..., 1]), seed)
    return torch.stack(words, dim=-1).view(rows, columns * GROUP)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor | int) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011).

    Args:
        counter: Four int64 tensors of 32-bit words.
        seed: The key, 64 bits: the lower word first.

    Returns:
        Four int64 tensors of random 32-bit words.
    """
    a, b, c, d = counter
    low, high = seed & _WORD, seed >> 32 & _WORD
    for _ in range(_ROUNDS):
        # A product of two words takes 64 bits; where int64 wraps, its bits are right all the same.
        left, right = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (right >> 32 & _WORD) ^ b ^ low, right & _WORD, (left >> 32 & _WORD) ^ d ^ high, left & _WORD
        low, high = (low + _WEYL[0]) & _WORD, (high + _WEYL[1]) & _WORD
    return a, b, c, d


def _folded(grad_output: Tensor) -> Tensor:
    """The bits of each tile's values folded into two words, of its left and its right half: int64, M/4 x N/4 x 2."""
    if grad_output.itemsize == 8:
        bits = grad_output.view(torch.int64)
        bits = (bits ^ bits >> 32) & _WORD
    else:
        whole = {2: torch.int16, 4: torch.int32}[grad_output.itemsize]
        bits = grad_output.view(whole).long() & (_WORD >> (32 - 8 * grad_output.itemsize))
    left, right = bits[:, 0::2], bits[:, 1::2]
    words = left ^ (right << 16 | right >> 16) & _WORD
    rows = words.view(-1, GROUP, words.shape[1] // 2, 2)
    folded = rows[:, 0]
    for row in range(1, GROUP):
        folded = (folded * FOLD + rows[:, row]) & _WORD
    return folded
