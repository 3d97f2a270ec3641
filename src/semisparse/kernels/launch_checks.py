"""Checks of what is passed to the launch functions, with the errors for what they cannot take. Needs no triton."""

from functools import lru_cache

import torch
from torch import Tensor

from semisparse import masks
from semisparse.errors import ConfigError, ShapeError, TensorError
from semisparse.formats.layout import PACKED_DTYPES, MetadataLayout, sparse_multiple
from semisparse.pattern import GROUP

READ_DTYPES = (torch.float32, *PACKED_DTYPES)
"""Dtypes of the matrices that kernels read; fp64 is left to the reference."""


def check_written(packed: bool, packed_t: bool) -> None:
    """Raise ConfigError unless a matrix, its transpose or both are written."""
    if not (packed or packed_t):
        raise ConfigError("packed and packed_t are both None: pass the buffer that is to be written")


def check_sizes(
    rows: int,
    rows_padded: int,
    columns: int,
    types: tuple[torch.dtype, torch.dtype],
    mask: masks.Mask,
    transposed: bool,
    packed_dtypes: tuple[torch.dtype, ...] = PACKED_DTYPES,
) -> None:
    """Check the sizes and dtypes of a matrix for a pack kernel.

    Args:
        rows: Of the matrix.
        rows_padded: Rows with the zero rows that are added.
        columns: Of the matrix.
        types: Dtype of the matrix and of the packed values.
        mask: What is chosen.
        transposed: Whether the transpose is written.
        packed_dtypes: What the kernel packs.

    Raises:
        ShapeError: A size does not fit.
        TensorError: A dtype does not fit.
        ConfigError: mask has no packed transpose.
    """
    if types[0] not in READ_DTYPES or types[1] not in packed_dtypes:
        known = " or ".join(str(dtype).removeprefix("torch.") for dtype in packed_dtypes)
        raise TensorError(f"matrix is {types[0]}, packed as {types[1]}; use fp32, fp16 or bf16, packed as {known}")
    multiple = sparse_multiple(types[1])
    if columns % multiple or rows_padded % multiple or rows_padded < rows:
        raise ShapeError(
            f"matrix is {rows} x {columns}, padded to {rows_padded} rows; both must be multiples of {multiple}"
        )
    if transposed and not mask.both_ways:
        raise ConfigError(f"mask={mask.name!r} keeps 2:4 along the columns only: pass packed_t=None")


def check_choice(mask: masks.Mask, given_codes: bool, given_scale: bool) -> None:
    """Check that the pack kernel knows a mask and is given what the mask needs.

    Args:
        mask: What is chosen.
        given_codes: Whether tile codes are given instead of choosing.
        given_scale: Whether a factor of the kept values is given.

    Raises:
        ConfigError: The kernel does not choose this mask, or codes or scale are missing or not wanted.
    """
    if not mask.chosen_while_packing:
        known = ", ".join(repr(other.name) for other in masks.MASKS.values() if other.chosen_while_packing)
        raise ConfigError(f"mask={mask.name!r} is not chosen by this kernel; use one of {known}")
    if given_codes and not mask.from_codes:
        raise ConfigError(f"mask={mask.name!r} cannot be given as codes: pass codes=None")
    if given_scale is not mask.needs_scale:
        raise ConfigError(f"mask={mask.name!r} {'needs a' if mask.needs_scale else 'takes no'} scale")


def check_held(codes: Tensor | None, scale: Tensor | None, rows: int, columns: int) -> None:
    """Check tile codes and scale, where they are given.

    Args:
        codes: Tile codes.
        scale: Factor of the kept values.
        rows: Of the matrix, padding included.
        columns: Of the matrix.

    Raises:
        TensorError: codes or scale are of another dtype or size.
        ShapeError: codes are not one per tile.
    """
    if codes is not None:
        if codes.dtype != torch.int16 or not codes.is_contiguous():
            raise TensorError(f"codes is {codes.dtype}; it must be contiguous int16 tile codes")
        if codes.shape != (wanted := (rows // GROUP, columns // GROUP)):
            raise ShapeError(f"codes has shape {tuple(codes.shape)}; it must be {wanted}")
    if scale is not None and (scale.dtype != torch.float32 or scale.numel() != 1):
        raise TensorError(f"scale is {scale.dtype} {tuple(scale.shape)}; it must be one float32 element")


def check_buffers(
    packed: Tensor | None, packed_t: Tensor | None, rows: int, columns: int, layout: MetadataLayout, itemsize: int = 2
) -> None:
    """check_buffer for what is given: the buffer of a rows x columns matrix and that of its transpose."""
    if packed is not None:
        check_buffer("packed", packed, rows, columns, layout, itemsize)
    if packed_t is not None:
        check_buffer("packed_t", packed_t, columns, rows, layout, itemsize)


def check_buffer(name: str, buffer: Tensor, rows: int, columns: int, layout: MetadataLayout, itemsize: int = 2) -> None:
    """Raise TensorError or ShapeError unless buffer can hold a packed rows x columns matrix; itemsize: of a value."""
    needed = _buffer_bytes(layout, rows, columns, itemsize)
    if buffer.dtype != torch.uint8 or not buffer.is_contiguous():
        raise TensorError(f"{name} is {buffer.dtype}; it must be a contiguous uint8 tensor")
    if buffer.numel() < needed:
        raise ShapeError(f"{name} has {buffer.numel()} bytes; a {rows} x {columns} matrix needs {needed}")


_buffer_bytes = lru_cache(4096)(MetadataLayout.buffer_bytes)
