"""The torch.library ops of semisparse: schema, fake implementation and kernels for each device.

Registered with Library.define and Library.impl, which costs a quarter of a custom_op per call. Ops are functional: they
never write to or alias an input. Gradients are not defined here; autograd.py has the only gradient formulas.

Packed buffers are uint8, in the engine's format (gemm/layout.py). On the CPU the reference packs, into the sm90 layout.
"""

from types import ModuleType

import torch
from torch import Tensor

from semisparse.errors import ConfigError
from semisparse.gemm.layout import SM90_16BIT, packed_bytes
from semisparse.gemm.problem import SPARSE_MULTIPLE, pad
from semisparse.reference import linear as reference_linear
from semisparse.reference import masks as reference_masks
from semisparse.reference import packing as reference_packing

_LIBRARY = torch.library.Library("semisparse", "FRAGMENT")
_MASKS = {"transposable": reference_masks.transposable, "row": reference_masks.row}
_SCHEMAS = (
    "prune(Tensor matrix, ScalarType dtype, str mask) -> Tensor",
    "prune_tokens(Tensor x, ScalarType dtype) -> Tensor",
    "pack(Tensor matrix, ScalarType dtype, str mask) -> (Tensor, Tensor)",
    "pack_tokens(Tensor x, ScalarType dtype) -> (Tensor, Tensor)",
    "unpack(Tensor packed, SymInt rows, SymInt columns, ScalarType dtype) -> Tensor",
    "packed_linear(Tensor x, Tensor packed, Tensor? bias, SymInt out_features, str engine) -> Tensor",
    "packed_tokens_linear(Tensor packed, Tensor weight, Tensor? bias, SymInt tokens, str engine) -> Tensor",
    "packed_tokens_grad_weight(Tensor packed_t, Tensor grad_output, SymInt in_features, str engine) -> Tensor",
)
for _schema in _SCHEMAS:
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
_OPS = torch.ops.semisparse


def prune(matrix: Tensor, dtype: torch.dtype, mask: str) -> Tensor:
    """The pruned matrix (R x C, contiguous), rounded once to dtype.

    matrix: R x C, fp64, fp32, fp16 or bf16, any strides. mask: "transposable" (R and C multiples of 4) or "row"
    (C a multiple of 4). The mask is chosen from matrix as it is, before rounding, bit for bit as reference.masks does.
    Raises ShapeError, TensorError, ConfigError.
    """
    return _OPS.prune.default(matrix, dtype, mask)


def prune_tokens(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (M x K) pruned by 4x4 tiles over (tokens, features), contiguous, rounded once to dtype; any M.

    K must be a multiple of 4. A last partial tile is chosen as if zero rows followed. Raises ShapeError, TensorError.
    """
    return _OPS.prune_tokens.default(x, dtype)


def pack(matrix: Tensor, dtype: torch.dtype, mask: str) -> tuple[Tensor, Tensor]:
    """matrix (R x C, multiples of 16) pruned and packed: buffers of the pruned matrix and of its transpose.

    The second is empty for mask "row", which is 2:4 along the columns only. dtype: fp16 or bf16, rounded to once.
    Masks as prune chooses them. Raises ShapeError, TensorError, ConfigError; EngineError on CUDA without an engine.
    """
    return _OPS.pack.default(matrix, dtype, mask)


def pack_tokens(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x (M x K, any M, K a multiple of 16) as pack; rows are padded with zeros to a multiple of 16."""
    return _OPS.pack_tokens.default(x, dtype)


def unpack(packed: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The pruned matrix (rows x columns, contiguous) that a buffer of pack holds; exact."""
    return _OPS.unpack.default(packed, rows, columns, dtype)


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, engine: str) -> Tensor:
    """x A^T + bias (M x N) with A (N x K) packed; x (M x K) and bias (N,) of the packed dtype.

    engine: as in SparseConfig.
    """
    return _OPS.packed_linear.default(x, packed, bias, out_features, engine)


def packed_tokens_linear(packed: Tensor, weight: Tensor, bias: Tensor | None, tokens: int, engine: str) -> Tensor:
    """x~ W^T + bias (M x N) from pack_tokens' first buffer; tokens: M.

    weight (N x K) and bias (N,) of the packed dtype. y is rounded twice: before the bias is added, and after.
    """
    return _OPS.packed_tokens_linear.default(packed, weight, bias, tokens, engine)


def packed_tokens_grad_weight(packed_t: Tensor, grad_output: Tensor, in_features: int, engine: str) -> Tensor:
    """dy^T x~ (N x K) from pack_tokens' second buffer; grad_output (M x N) of the packed dtype."""
    return _OPS.packed_tokens_grad_weight.default(packed_t, grad_output, in_features, engine)


def sac_save_ops() -> list[torch._ops.OpOverload]:
    """Ops whose results selective activation checkpointing should save: the packed products, not the packings."""
    return [_OPS.packed_linear.default, _OPS.packed_tokens_linear.default]


def _prune(matrix: Tensor, dtype: torch.dtype, mask: str) -> Tensor:
    if mask not in _MASKS:
        raise ConfigError(f"mask={mask!r} is not one of {', '.join(map(repr, _MASKS))}")
    matrix = matrix.detach()  # the op has no gradient of its own, and autograd must not find where()'s
    return reference_linear.prune(matrix, _MASKS[mask](matrix)).to(dtype).contiguous()


def _prune_tokens(x: Tensor, dtype: torch.dtype) -> Tensor:
    return reference_linear.prune_tokens(x.detach()).to(dtype).contiguous()


def _encoded(matrix: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    written = SM90_16BIT.encode(reference_packing.pack(matrix, mask, dtype))
    return torch.nn.functional.pad(written, (0, packed_bytes(*matrix.shape) - written.numel()))


def _pack_cpu(matrix: Tensor, dtype: torch.dtype, mask: str) -> tuple[Tensor, Tensor]:
    if mask not in _MASKS:
        raise ConfigError(f"mask={mask!r} is not one of {', '.join(map(repr, _MASKS))}")
    kept = _MASKS[mask](matrix)
    if mask == "row":
        return _encoded(matrix, kept, dtype), torch.empty(0, dtype=torch.uint8)
    return _encoded(matrix, kept, dtype), _encoded(matrix.mT, kept.mT, dtype)


def _pack_tokens_cpu(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows = pad(x.shape[0], SPARSE_MULTIPLE)
    return _pack_cpu(torch.nn.functional.pad(x, (0, 0, 0, rows - x.shape[0])), dtype, "transposable")


def _unpack_cpu(packed: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return reference_packing.unpack(SM90_16BIT.decode(packed, rows, columns, dtype))


def _packed_linear_cpu(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, engine: str) -> Tensor:
    return torch.nn.functional.linear(x, _unpack_cpu(packed, out_features, x.shape[1], x.dtype), bias)


def _packed_tokens_linear_cpu(packed: Tensor, weight: Tensor, bias: Tensor | None, tokens: int, engine: str) -> Tensor:
    x = _unpack_cpu(packed, pad(tokens, SPARSE_MULTIPLE), weight.shape[1], weight.dtype)[:tokens]
    return torch.nn.functional.linear(x, weight, bias)


def _packed_tokens_grad_weight_cpu(packed_t: Tensor, grad_output: Tensor, in_features: int, engine: str) -> Tensor:
    tokens = grad_output.shape[0]
    x_t = _unpack_cpu(packed_t, in_features, pad(tokens, SPARSE_MULTIPLE), grad_output.dtype)[:, :tokens]
    return grad_output.mT @ x_t.mT


def _cuda() -> ModuleType:
    """The CUDA side, imported at its first call: importing the package must load no kernel and no engine."""
    from semisparse import cuda_ops

    return cuda_ops


# Pruning has one implementation for every device: the specification itself is plain PyTorch.
_LIBRARY.impl("prune", _prune, "CompositeExplicitAutograd")
_LIBRARY.impl("prune_tokens", _prune_tokens, "CompositeExplicitAutograd")
_CPU = {
    "pack": _pack_cpu,
    "pack_tokens": _pack_tokens_cpu,
    "unpack": _unpack_cpu,
    "packed_linear": _packed_linear_cpu,
    "packed_tokens_linear": _packed_tokens_linear_cpu,
    "packed_tokens_grad_weight": _packed_tokens_grad_weight_cpu,
}
for _name, _cpu in _CPU.items():
    _LIBRARY.impl(_name, _cpu, "CPU")
    _LIBRARY.impl(_name, lambda *args, _name=_name: getattr(_cuda(), _name)(*args), "CUDA")
# No gradient at all, rather than torch's default of a warning and a wrong one; autograd.py differentiates.
for _name in ("prune", "prune_tokens", *_CPU):
    _LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")


def _fake_prune(matrix: Tensor, dtype: torch.dtype, mask: str) -> Tensor:
    return torch.empty(matrix.shape, dtype=dtype, device=matrix.device)


def _fake_prune_tokens(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _fake_pack(matrix: Tensor, dtype: torch.dtype, mask: str) -> tuple[Tensor, Tensor]:
    rows, columns = matrix.shape
    turned = 0 if mask == "row" else packed_bytes(columns, rows)
    return (
        matrix.new_empty(packed_bytes(rows, columns), dtype=torch.uint8),
        matrix.new_empty(turned, dtype=torch.uint8),
    )


def _fake_pack_tokens(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows, columns = pad(x.shape[0], SPARSE_MULTIPLE), x.shape[1]
    sizes = packed_bytes(rows, columns), packed_bytes(columns, rows)
    return x.new_empty(sizes[0], dtype=torch.uint8), x.new_empty(sizes[1], dtype=torch.uint8)


def _fake_unpack(packed: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty(rows, columns, dtype=dtype)


def _fake_packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, engine: str) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


def _fake_packed_tokens_linear(packed: Tensor, weight: Tensor, bias: Tensor | None, tokens: int, engine: str) -> Tensor:
    return weight.new_empty(tokens, weight.shape[0])


def _fake_packed_tokens_grad_weight(packed_t: Tensor, grad_output: Tensor, in_features: int, engine: str) -> Tensor:
    return grad_output.new_empty(grad_output.shape[1], in_features)


for _name in ("prune", "prune_tokens", *_CPU):
    torch.library.register_fake(f"semisparse::{_name}", globals()[f"_fake_{_name}"], lib=_LIBRARY)
