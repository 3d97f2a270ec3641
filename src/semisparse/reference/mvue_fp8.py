"""The sample of "mvue" in e4m3: what mvue.py keeps of a gradient, scaled and rounded. The specification, as there.

The sample is drawn from the gradient before rounding, with the same random words as in 16 bits, so the same entries are
kept. What is kept is at most twice the largest magnitude (four equal entries), so its scale is twice that of the
gradient in fp8, and the multiplier half: exact, since both are powers of two.

A kept value is rounded once, from fp32, up or down at random (fp8.encode_at_random): rounding to nearest would bias
it by up to 6 %, because all groups of one size round alike. The random numbers are the lower 9 bits of the group's
word, of which the selection takes the upper 23. So the mean over draws is the gradient where a kept value has at most
12 significant bits, and elsewhere off by at most 2^-10 of the distance of two e4m3 numbers: 2^-13 of a normal value.
The second kept entry takes the bits inverted: where two equal values are kept and one is rounded up, the other is
rather rounded down. Rounding adds d^2 f (1 - f) to the variance of a kept value, with d the distance of its neighbours
and f its place between them.

A tensor with an entry that is not finite has the multiplier NaN, and all that is kept becomes NaN. An fp32 sum beyond
the largest number gives NaN for its group.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from semisparse.pattern import GROUP
from semisparse.reference import fp8, mvue
from semisparse.reference.linear import Quantised, fp8_product, fp8_sums, pad_tokens, quantised
from semisparse.reference.masks import check_shape
from semisparse.sampling import ROUNDING_BITS


class QuantisedSample(NamedTuple):
    """A sample of a gradient in e4m3: S(dy) is about what the codes stand for times scale.

    Attributes:
        codes: M x N, uint8, zero where nothing was kept.
        kept: As mvue.Sample's.
        scale: One fp32 number, twice the scale of dy: a power of two, NaN if dy is not finite.
    """

    codes: Tensor
    kept: Tensor
    scale: Tensor


def sample(grad_output: Tensor, seed: Tensor | int) -> QuantisedSample:
    """S(dy) in e4m3.

    Args:
        grad_output: dy, M x N, N a multiple of 4, fp32, fp16 or bf16.
        seed: As mvue.sample's.

    Raises:
        ShapeError, TensorError: grad_output has no such groups, or has another dtype.
    """
    tokens = check_shape(grad_output, tiles=False)[0]
    multiplier = fp8.multiplier_for(fp8.largest_magnitude(grad_output)) / 2
    padded = pad_tokens(grad_output)
    words = mvue.random_words(padded, seed)
    first, second, scaled = mvue.choose(padded.float().view(-1, GROUP, padded.shape[1]), mvue.as_uniforms(words))
    place = torch.arange(GROUP, device=padded.device)[None, :, None]
    is_first, is_second = place == first[:, None], place == second[:, None]
    lower = (words & ((1 << ROUNDING_BITS) - 1))[:, None]
    random = torch.where(is_second, (1 << ROUNDING_BITS) - 1 - lower, lower)
    kept = is_first | is_second
    codes = torch.where(kept, fp8.encode_at_random(scaled * multiplier, random, ROUNDING_BITS), 0)
    return QuantisedSample(codes.view(padded.shape)[:tokens], kept.view(padded.shape), 1 / multiplier)


def grad_weight(grad_output: Tensor, x: Tensor, result: torch.dtype, seed: Tensor | int) -> Tensor:
    """dW = S(dy)8^T x8 * (2 sdy * sx), shape (N, K), in the dtype result; arguments as linear.fp8_grad_weight's."""
    drawn, tokens = sample(grad_output, seed), quantised(x)
    dy = Quantised(fp8.decode(drawn.codes).double().mT, drawn.scale)
    return fp8_product(dy, Quantised(tokens.values.mT, tokens.scale), None, fp8_sums(result), result)
