"""The torch.library ops of semisparse: schema, fake implementation and kernels for each device.

Registered with Library.define and Library.impl, which costs a quarter of a custom_op per call. Ops are functional: they
never write to or alias an input. Gradients are not defined here; functional.py has the only gradient formulas.
"""

import torch
from torch import Tensor

from semisparse.errors import ConfigError
from semisparse.reference import linear as reference_linear
from semisparse.reference import masks as reference_masks

_LIBRARY = torch.library.Library("semisparse", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_MASKS = {"transposable": reference_masks.transposable, "row": reference_masks.row}

_LIBRARY.define("prune(Tensor matrix, ScalarType dtype, str mask) -> Tensor", tags=_TAGS)
_LIBRARY.define("prune_tokens(Tensor x, ScalarType dtype) -> Tensor", tags=_TAGS)


def prune(matrix: Tensor, dtype: torch.dtype, mask: str) -> Tensor:
    """The pruned matrix (R x C, contiguous), rounded once to dtype.

    matrix: R x C, fp64, fp32, fp16 or bf16, any strides. mask: "transposable" (R and C multiples of 4) or "row"
    (C a multiple of 4). The mask is chosen from matrix as it is, before rounding, bit for bit as reference.masks does.
    Raises ShapeError, TensorError, ConfigError.
    """
    return torch.ops.semisparse.prune.default(matrix, dtype, mask)


def prune_tokens(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (M x K) pruned by 4x4 tiles over (tokens, features), contiguous, rounded once to dtype; any M.

    K must be a multiple of 4. A last partial tile is chosen as if zero rows followed. Raises ShapeError, TensorError.
    """
    return torch.ops.semisparse.prune_tokens.default(x, dtype)


def _prune(matrix: Tensor, dtype: torch.dtype, mask: str) -> Tensor:
    if mask not in _MASKS:
        raise ConfigError(f"mask={mask!r} is not one of {', '.join(map(repr, _MASKS))}")
    matrix = matrix.detach()  # the op has no gradient of its own, and autograd must not find where()'s
    return reference_linear.prune(matrix, _MASKS[mask](matrix)).to(dtype).contiguous()


def _prune_tokens(x: Tensor, dtype: torch.dtype) -> Tensor:
    return reference_linear.prune_tokens(x.detach()).to(dtype).contiguous()


# One implementation for every device: the specification itself is plain PyTorch.
_LIBRARY.impl("prune", _prune, "CompositeExplicitAutograd")
_LIBRARY.impl("prune_tokens", _prune_tokens, "CompositeExplicitAutograd")
# No gradient at all, rather than torch's default of a warning and a wrong one; functional.py differentiates.
for _name in ("prune", "prune_tokens"):
    _LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("semisparse::prune", lib=_LIBRARY)
def _prune_fake(matrix: Tensor, dtype: torch.dtype, mask: str) -> Tensor:
    return torch.empty(matrix.shape, dtype=dtype, device=matrix.device)


@torch.library.register_fake("semisparse::prune_tokens", lib=_LIBRARY)
def _prune_tokens_fake(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)
