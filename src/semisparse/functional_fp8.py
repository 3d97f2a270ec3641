"""The linear function in fp8: its operands are rounded and packed here, its formulas are in autograd_fp8.py."""

import torch
from torch import Tensor

from semisparse import ops
from semisparse.autograd import apply
from semisparse.autograd_fp8 import Fp8Linear, TransformedFp8Linear
from semisparse.config import Backend, GradOutput
from semisparse.formats.packed import PackedMatrix
from semisparse.masks import MaskName
from semisparse.operands import as_tokens, distinct
from semisparse.routes import Transform
from semisparse.shared_tokens import quantised
from semisparse.tracing import recording


def fp8_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    mask: MaskName | None,
    codes: Tensor | None,
    backend: Backend,
    packed: PackedMatrix | None,
    transform: Transform,
    grad_output: GradOutput | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """semi_sparse_linear with precision="fp8", where it can run (routes.takes_fp8); operands are checked.

    Args:
        input: (..., K), in its own dtype: e4m3 is rounded to once.
        weight: (N, K).
        bias: (N,) or None.
        dtype: Of the call and of the result.
        mask: As semi_sparse_linear's; None computes with the whole weight.
        codes: As semi_sparse_linear's.
        backend: As semi_sparse_linear's.
        packed: ops.pack_fp8's result for these arguments, to use it again, or None.
        transform: As routes.transform_at_work gives it, but not "other".
        grad_output: As semi_sparse_linear's.
        seed: As semi_sparse_linear's.
    """
    recorded = recording()
    # Inside a transform, requires_grad tells of one level only; a recorded graph may train.
    all_needed, grads = bool(recorded or transform), torch.is_grad_enabled()
    for_x, for_weight = (all_needed or (grads and operand.requires_grad) for operand in (input, weight))
    x8 = quantised(input, weight, columns=for_weight)
    if mask is None:
        w8 = ops.quantise(weight.detach(), True, for_x)
    elif packed is not None and packed.scale is not None:
        w8 = packed.matrix, packed.transposed, packed.scale
    else:
        w8 = ops.pack_fp8(weight.detach(), mask, codes)
    tokens = distinct(as_tokens(input))
    operands = tokens, weight, bias, *x8, *w8, mask, backend, dtype, grad_output, seed
    if recorded:
        y = ops.fp8_linear(*operands)
    else:
        y = TransformedFp8Linear.apply(*operands) if transform else apply(Fp8Linear, *operands)
    return y if input.dim() == 2 else y.view(*input.shape[:-1], weight.shape[0])
