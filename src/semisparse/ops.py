"""The torch.library ops of semisparse: schema, fake implementation and kernels for each device.

Registered with Library.define and Library.impl, which costs a quarter of a custom_op per call. Ops are functional: they
never write to or alias an input. Gradients are not defined here; autograd.py has the only gradient formulas.

The functions of this file are how the package calls its ops. On plain CUDA tensors they go to cuda_ops.py directly:
the dispatcher and its way back into Python cost host time at every call of an eager training step.

Packed buffers are uint8, in the engine's format (formats/layout.py); on the CPU the reference packs them, in the sm90
layout.
"""

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from semisparse import calls, cpu_ops
from semisparse.formats.layout import SPARSE_MULTIPLE, packed_bytes, round_up
from semisparse.pattern import GROUP

_LIBRARY = torch.library.Library("semisparse", "FRAGMENT")
_SCHEMAS = (
    "tile_codes(Tensor matrix, str mask) -> Tensor",
    "prune(Tensor matrix, ScalarType dtype, str mask, Tensor? frozen=None) -> Tensor",
    "prune_tokens(Tensor x, ScalarType dtype) -> Tensor",
    "pack(Tensor matrix, ScalarType dtype, str mask, Tensor? frozen=None) -> (Tensor, Tensor)",
    "pack_tokens(Tensor x, ScalarType dtype) -> (Tensor, Tensor)",
    "unpack(Tensor packed, SymInt rows, SymInt columns, ScalarType dtype) -> Tensor",
    "packed_linear(Tensor x, Tensor packed, Tensor? bias, SymInt out_features, str engine) -> Tensor",
    "packed_tokens_linear(Tensor packed, Tensor weight, Tensor? bias, SymInt tokens, str engine) -> Tensor",
    "packed_tokens_grad_weight(Tensor packed_t, Tensor grad_output, SymInt in_features, str engine) -> Tensor",
)
for _schema in _SCHEMAS:
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
_OPS = torch.ops.semisparse
_DIRECT_DEVICE = "cuda"
_PLAIN = frozenset({Tensor, torch.nn.Parameter})


def tile_codes(matrix: Tensor, mask: str) -> Tensor:
    """int16 tile codes (R/4 x C/4) of the mask that matrix (R x C, multiples of 4) chooses; see reference.masks.

    mask: as prune, but neither "codes" nor "soft". Raises ShapeError, TensorError, ConfigError.
    """
    return _OPS.tile_codes.default(matrix, mask)


def prune(matrix: Tensor, dtype: torch.dtype, mask: str, frozen: Tensor | None = None) -> Tensor:
    """The pruned matrix (R x C, contiguous), rounded once to dtype.

    matrix: R x C, fp64, fp32, fp16 or bf16, any strides. mask: "transposable", "greedy" or "signed_greedy" (R and C
    multiples of 4), "row" (C a multiple of 4): chosen from matrix as it is, before rounding, bit for bit as
    reference.masks does; "codes": the mask that frozen says, tile codes as tile_codes gives them; "soft":
    reference.linear.soft_threshold with the scale in frozen (fp32, a single number).
    Raises ShapeError, TensorError, ConfigError.
    """
    return _OPS.prune.default(matrix, dtype, mask, frozen)


def prune_tokens(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (M x K) pruned by 4x4 tiles over (tokens, features), contiguous, rounded once to dtype; any M.

    K must be a multiple of 4. A last partial tile is chosen as if zero rows followed. Raises ShapeError, TensorError.
    """
    return _OPS.prune_tokens.default(x, dtype)


def pack(matrix: Tensor, dtype: torch.dtype, mask: str, frozen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """matrix (R x C, multiples of 16) pruned and packed: buffers of the pruned matrix and of its transpose.

    The second is empty for masks "row" and "soft", which are 2:4 along the columns only. dtype: fp16 or bf16, rounded
    to once. mask, frozen: as prune; codes must be of transposable tiles, and of those nothing but their number and
    dtype is checked. Raises ShapeError, TensorError, ConfigError; EngineError on CUDA without an engine.
    """
    if _direct(matrix, frozen):
        return _cuda().pack(matrix, dtype, mask, frozen)
    return _OPS.pack.default(matrix, dtype, mask, frozen)


def pack_tokens(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x (M x K, any M, K a multiple of 16) as pack; rows are padded with zeros to a multiple of 16."""
    if _direct(x):
        calls.note_tokens(op=True)
        return _cuda().pack_tokens(x, dtype)
    return _OPS.pack_tokens.default(x, dtype)


def unpack(packed: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The pruned matrix (rows x columns, contiguous) that a buffer of pack holds; exact."""
    return _OPS.unpack.default(packed, rows, columns, dtype)


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, engine: str) -> Tensor:
    """x A^T + bias (M x N) with A (N x K) packed; x (M x K) and bias (N,) of the packed dtype.

    engine: as in SparseConfig.
    """
    if _direct(x, packed, bias):
        return _cuda().packed_linear(x, packed, bias, out_features, engine)
    return _OPS.packed_linear.default(x, packed, bias, out_features, engine)


def packed_tokens_linear(packed: Tensor, weight: Tensor, bias: Tensor | None, tokens: int, engine: str) -> Tensor:
    """x~ W^T + bias (M x N) from pack_tokens' first buffer; tokens: M.

    weight (N x K) and bias (N,) of the packed dtype. y is rounded twice: before the bias is added, and after.
    """
    if _direct(packed, weight, bias):
        return _cuda().packed_tokens_linear(packed, weight, bias, tokens, engine)
    return _OPS.packed_tokens_linear.default(packed, weight, bias, tokens, engine)


def packed_tokens_grad_weight(packed_t: Tensor, grad_output: Tensor, in_features: int, engine: str) -> Tensor:
    """dy^T x~ (N x K) from pack_tokens' second buffer; grad_output (M x N) of the packed dtype."""
    if _direct(packed_t, grad_output):
        return _cuda().packed_tokens_grad_weight(packed_t, grad_output, in_features, engine)
    return _OPS.packed_tokens_grad_weight.default(packed_t, grad_output, in_features, engine)


def sac_save_ops() -> list[torch._ops.OpOverload]:
    """Ops whose results selective activation checkpointing should save: the packed products, not the packings."""
    return [_OPS.packed_linear.default, _OPS.packed_tokens_linear.default]


def _direct(*tensors: Tensor | None) -> bool:
    """Whether the dispatcher would do nothing but find the CUDA side: plain tensors, and nobody watches or traces.

    Compilers, dispatch modes (selective checkpointing, fake tensors), functorch transforms, tensor subclasses and
    calls that autograd would have to see all go through the dispatcher.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None
    ):
        return False
    recorded = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or tensor.device.type != _DIRECT_DEVICE or (recorded and tensor.requires_grad):
            return False
    return True


@cache
def _cuda() -> ModuleType:
    """The CUDA side, imported at its first call: importing the package must load no kernel and no engine."""
    from semisparse import cuda_ops

    return cuda_ops


def _noted(name: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """implementation, noting what it prunes; see calls.py."""
    if name not in ("prune", "pack", "prune_tokens", "pack_tokens"):
        return implementation
    tokens = name.endswith("_tokens")

    def call(matrix: Tensor, *args: Any) -> Any:
        if tokens:
            calls.note_tokens(op=True)
        else:
            calls.note(matrix)
        return implementation(matrix, *args)

    return call


_ANY_DEVICE = ("tile_codes", "prune", "prune_tokens")
_FASTER_ON_CUDA = ("tile_codes", "prune")
_PACKED = ("pack", "pack_tokens", "unpack", "packed_linear", "packed_tokens_linear", "packed_tokens_grad_weight")
for _name in _ANY_DEVICE:
    _LIBRARY.impl(_name, _noted(_name, getattr(cpu_ops, _name)), "CompositeExplicitAutograd")
for _name in _PACKED:
    _LIBRARY.impl(_name, _noted(_name, getattr(cpu_ops, _name)), "CPU")
    _LIBRARY.impl(_name, _noted(_name, lambda *args, _name=_name: getattr(_cuda(), _name)(*args)), "CUDA")
for _name in _FASTER_ON_CUDA:
    _LIBRARY.impl(_name, _noted(_name, lambda *args, _name=_name: getattr(_cuda(), _name)(*args)), "CUDA")
# No gradient at all, rather than torch's default of a warning and a wrong one; autograd.py differentiates.
for _name in (*_ANY_DEVICE, *_PACKED):
    _LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")


def _fake_tile_codes(matrix: Tensor, mask: str) -> Tensor:
    return matrix.new_empty(matrix.shape[0] // GROUP, matrix.shape[1] // GROUP, dtype=torch.int16)


def _fake_prune(matrix: Tensor, dtype: torch.dtype, mask: str, frozen: Tensor | None = None) -> Tensor:
    return torch.empty(matrix.shape, dtype=dtype, device=matrix.device)


def _fake_prune_tokens(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _fake_pack(matrix: Tensor, dtype: torch.dtype, mask: str, frozen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    rows, columns = matrix.shape
    turned = 0 if mask in cpu_ops.ROW_WISE else packed_bytes(columns, rows)
    return (
        matrix.new_empty(packed_bytes(rows, columns), dtype=torch.uint8),
        matrix.new_empty(turned, dtype=torch.uint8),
    )


def _fake_pack_tokens(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows, columns = round_up(x.shape[0], SPARSE_MULTIPLE), x.shape[1]
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


for _name in (*_ANY_DEVICE, *_PACKED):
    torch.library.register_fake(f"semisparse::{_name}", globals()[f"_fake_{_name}"], lib=_LIBRARY)


def _vmap_prune(
    info: Any,
    in_dims: tuple[int | None, ...],
    matrix: Tensor,
    dtype: torch.dtype,
    mask: str,
    frozen: Tensor | None = None,
) -> tuple[Tensor, int]:
    held_dim = in_dims[3] if len(in_dims) > 3 else None
    matrices = _members(matrix, in_dims[0], info.batch_size)
    held = (None,) * info.batch_size if frozen is None else _members(frozen, held_dim, info.batch_size)
    return torch.stack([prune(one, dtype, mask, codes) for one, codes in zip(matrices, held, strict=True)]), 0


def _vmap_prune_tokens(info: Any, in_dims: tuple[int | None, ...], x: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    return torch.stack([prune_tokens(one, dtype) for one in _members(x, in_dims[0], info.batch_size)]), 0


def _members(tensor: Tensor, dim: int | None, size: int) -> tuple[Tensor, ...]:
    """The members of a batch along dim, or size times the same tensor."""
    return (tensor,) * size if dim is None else tensor.unbind(dim)


for _name in ("prune", "prune_tokens"):
    torch.library.register_vmap(f"semisparse::{_name}", globals()[f"_vmap_{_name}"], lib=_LIBRARY)
