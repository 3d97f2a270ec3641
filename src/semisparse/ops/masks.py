"""Ops that choose masks and prune: tile_codes, prune, prune_tokens. On CUDA the mask comes from a Triton kernel."""

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from semisparse import calls, masks
from semisparse.errors import ConfigError, ShapeError, TensorError
from semisparse.ops.register import register
from semisparse.pattern import GROUP
from semisparse.reference import linear as reference_linear
from semisparse.reference import masks as reference_masks


def checked(matrix: Tensor, mask: str, codes: Tensor | None, scale: Tensor | None) -> masks.Mask:
    """The mask called mask, which codes and scale fit.

    Args:
        matrix: What is going to be pruned (R x C).
        mask: As SparseConfig's weight.
        codes: Tile codes to use instead of choosing the mask (int16, R/4 x C/4), or None.
        scale: What a mask that shrinks multiplies by (one fp32 number), None for any other.

    Raises:
        ConfigError: There is no such mask, or it cannot take codes, or its scale is missing or not wanted.
        TensorError, ShapeError: codes or scale do not fit matrix, or matrix cannot be pruned at all.
    """
    found = masks.get(mask)
    if codes is not None and not found.from_codes:
        raise ConfigError(f"mask={mask!r} cannot be given as codes, only 'transposable' can: leave codes out")
    if found.needs_scale and scale is None:
        raise ConfigError(f"mask={mask!r} needs its scale: start its recipe (semisparse.recipes) before the forward")
    if scale is not None and not found.needs_scale:
        raise ConfigError(f"mask={mask!r} takes no scale, only 'soft' does: leave scale out")
    if codes is not None or scale is not None:
        reference_masks.check_shape(matrix, tiles=codes is not None)
        reference_masks.check_dtype(matrix)
        if codes is not None:
            tiles = tuple(size // GROUP for size in matrix.shape)
            _check_held("codes", codes, matrix, torch.int16, tiles)
        if scale is not None:
            _check_held("scale", scale, matrix, torch.float32, ())
    return found


def _check_held(name: str, held: Tensor, matrix: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if held.dtype != dtype or held.device != matrix.device:
        raise TensorError(
            f"{name} is {held.dtype} on {held.device}; for a weight on {matrix.device} it must be {dtype} there: start "
            "the recipe after moving the model"
        )
    if held.shape != shape:
        raise ShapeError(f"{name} has shape {tuple(held.shape)}; for a {tuple(matrix.shape)} weight it must be {shape}")


@cache
def has_triton() -> bool:
    """Whether there are kernels on CUDA."""
    return find_spec("triton") is not None


def _fake_tile_codes(matrix: Tensor, mask: str) -> Tensor:
    return matrix.new_empty(matrix.shape[0] // GROUP, matrix.shape[1] // GROUP, dtype=torch.int16)


def _cuda_tile_codes(matrix: Tensor, mask: str) -> Tensor:
    """By the kernel, except for fp64 and without triton."""
    matrix, found = matrix.detach(), masks.get(mask)
    rows, columns = reference_masks.check_shape(matrix, tiles=True)
    if matrix.dtype == torch.float64 or not has_triton():
        return _reference_codes(matrix, found)
    from semisparse.kernels import tile_codes as kernel

    codes = matrix.new_empty(rows // GROUP, columns // GROUP, dtype=torch.int16)
    kernel.launch(matrix, codes, mask=mask)
    return codes


def _reference_codes(matrix: Tensor, mask: masks.Mask) -> Tensor:
    return reference_masks.to_codes(mask.choose(matrix)).to(torch.int16)


@register(
    "tile_codes(Tensor matrix, str mask) -> Tensor", fake=_fake_tile_codes, cuda=_cuda_tile_codes, every_device=True
)
def tile_codes(matrix: Tensor, mask: str) -> Tensor:
    """Tile codes of the mask that a matrix chooses.

    Args:
        matrix: R x C, both multiples of 4, fp64, fp32, fp16 or bf16, any strides.
        mask: As SparseConfig's weight; for "soft" the entries that it keeps, which are those of "row".

    Returns:
        int16, R/4 x C/4; bit 4 * i + j of a code is set where entry (i, j) of its tile is kept. Bit for bit as
        reference.masks on every device.

    Raises:
        ShapeError, TensorError, ConfigError: matrix has no such mask.
    """
    return _reference_codes(matrix, masks.get(mask))


def _fake_prune(
    matrix: Tensor, dtype: torch.dtype, mask: str, codes: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    return torch.empty(matrix.shape, dtype=dtype, device=matrix.device)


def _kept(matrix: Tensor, dtype: torch.dtype, mask: Tensor) -> Tensor:
    return reference_linear.prune(matrix, mask).to(dtype).contiguous()


def soft(matrix: Tensor, dtype: torch.dtype, scale: Tensor) -> Tensor:
    """What mask "soft" makes of matrix, rounded once: subtracted and scaled in fp32, as the pack kernel does."""
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    return reference_linear.soft_threshold(wide, scale).to(dtype).contiguous()


def _cuda_prune(
    matrix: Tensor, dtype: torch.dtype, mask: str, codes: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """By PyTorch's own kernels, with the mask chosen by ours where the matrix has whole tiles."""
    checked(matrix, mask, codes, scale)
    whole_tiles = matrix.dim() == 2 and not (matrix.shape[0] % GROUP or matrix.shape[1] % GROUP)
    if codes is None and scale is None and whole_tiles:
        return _kept(matrix.detach(), dtype, reference_masks.from_codes(_cuda_tile_codes(matrix, mask)))
    return prune_anywhere(matrix, dtype, mask, codes, scale)


def prune_anywhere(
    matrix: Tensor, dtype: torch.dtype, mask: str, codes: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """prune in plain PyTorch, outside the dispatcher."""
    matrix = matrix.detach()  # autograd must not find the gradient of where()
    found = checked(matrix, mask, codes, scale)
    if scale is not None:
        return soft(matrix, dtype, scale)
    return _kept(matrix, dtype, found.choose(matrix) if codes is None else reference_masks.from_codes(codes))


def members(tensor: Tensor | None, dim: int | None, size: int) -> tuple[Tensor | None, ...]:
    """The members of a batch along dim, or size times the same tensor."""
    return (tensor,) * size if dim is None or tensor is None else tensor.unbind(dim)


def _vmap_prune(
    info: Any,
    in_dims: tuple[int | None, ...],
    matrix: Tensor,
    dtype: torch.dtype,
    mask: str,
    codes: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, int]:
    dims = (*in_dims, None, None)
    size = info.batch_size
    batch = zip(
        members(matrix, dims[0], size), members(codes, dims[3], size), members(scale, dims[4], size), strict=True
    )
    return torch.stack([prune(one, dtype, mask, code, factor) for one, code, factor in batch]), 0  # type: ignore[arg-type]


@register(
    "prune(Tensor matrix, ScalarType dtype, str mask, Tensor? codes=None, Tensor? scale=None) -> Tensor",
    fake=_fake_prune,
    cuda=_cuda_prune,
    every_device=True,
    differentiable=True,
    note=calls.note,
    vmap=_vmap_prune,
)
def prune(
    matrix: Tensor, dtype: torch.dtype, mask: str, codes: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """The pruned matrix (R x C, contiguous), rounded once to dtype. The gradient passes straight through.

    Args:
        matrix: R x C, fp64, fp32, fp16 or bf16, any strides; R and C multiples of 4, for masks along the columns only
            just C.
        dtype: Of the result.
        mask: As SparseConfig's weight, chosen from matrix before rounding, bit for bit as reference.masks does.
        codes: Tile codes, as tile_codes gives them, to use instead of choosing a "transposable" mask.
        scale: For "soft", which is reference.linear.soft_threshold: one fp32 number.

    Raises:
        ShapeError, TensorError, ConfigError: As checked.
    """
    return prune_anywhere(matrix, dtype, mask, codes, scale)


def _fake_prune_tokens(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _vmap_prune_tokens(info: Any, in_dims: tuple[int | None, ...], x: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    batch = members(x, in_dims[0], info.batch_size)
    return torch.stack([prune_tokens(one, dtype) for one in batch]), 0  # type: ignore[arg-type]


@register(
    "prune_tokens(Tensor x, ScalarType dtype) -> Tensor",
    fake=_fake_prune_tokens,
    every_device=True,
    differentiable=True,
    vmap=_vmap_prune_tokens,
)
def prune_tokens(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x pruned by 4x4 tiles over (tokens, features), contiguous, rounded once to dtype.

    The gradient passes straight through. A last partial tile is chosen as if rows of zeros followed.

    Args:
        x: M x K, any M, K a multiple of 4, fp64, fp32, fp16 or bf16.
        dtype: Of the result.

    Raises:
        ShapeError, TensorError: x has no such mask.
    """
    calls.note_tokens(op=True)
    return reference_linear.prune_tokens(x.detach()).to(dtype).contiguous()
