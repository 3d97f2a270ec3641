"""Ops that pack and unpack. A packed buffer is uint8, in the engine's format (formats/); on the CPU in sm90's.

On CUDA the Triton kernel writes what is asked for, a matrix, its transpose or both, in one pass; formats/ says on which
devices it takes more.
"""

from functools import lru_cache

import torch
from torch import Tensor

from semisparse import calls, masks
from semisparse.errors import ConfigError, ShapeError, TensorError
from semisparse.formats.layout import (
    FP8,
    PACKED_DTYPES,
    PADDING,
    SM90_16BIT,
    SPARSE_MULTIPLE,
    lengthened,
    packed_bytes,
    round_up,
    sm90_layout,
)
from semisparse.formats.packed import PackedFormat, packed_format
from semisparse.gemm.engine import engine
from semisparse.gemm.operands import Operands
from semisparse.gemm.problem import Problem
from semisparse.native.structures import LaunchKind
from semisparse.ops import prepare
from semisparse.ops.masks import _cuda_prune, checked, prune_anywhere
from semisparse.ops.register import register
from semisparse.reference import masks as reference_masks
from semisparse.reference import packing as reference_packing

_packed_bytes = lru_cache(4096)(packed_bytes)


def _check_packable(matrix: Tensor, dtype: torch.dtype) -> None:
    """What the pack kernel checks on CUDA."""
    if dtype not in PACKED_DTYPES:
        raise TensorError(f"dtype={dtype}: packed values are fp16 or bf16")
    if any(size % SPARSE_MULTIPLE for size in matrix.shape):
        raise ShapeError(f"matrix is {tuple(matrix.shape)}; packing needs multiples of {SPARSE_MULTIPLE}: pad it")


def encoded(matrix: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The buffer (in sm90's format, as long as an op's) of a matrix (R x C) of which mask (bool) tells what is kept."""
    written = SM90_16BIT.encode(reference_packing.pack(matrix, mask, dtype))
    return lengthened(written, *matrix.shape)


def _fake_pack(
    matrix: Tensor, dtype: torch.dtype, mask: str, codes: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return _fake_buffers(matrix, matrix.shape[0], matrix.shape[1], masks.get(mask).both_ways)


def _fake_buffers(matrix: Tensor, rows: int, columns: int, both_ways: bool) -> tuple[Tensor, Tensor]:
    packed = matrix.new_empty(packed_bytes(rows, columns), dtype=torch.uint8)
    return packed, matrix.new_empty(packed_bytes(columns, rows) if both_ways else 0, dtype=torch.uint8)


def _cuda_pack(
    matrix: Tensor, dtype: torch.dtype, mask: str, codes: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    found = checked(matrix, mask, codes, scale)
    return _pack_rows(LaunchKind.PACK, matrix, matrix.shape[0], dtype, found, codes, scale)


@register(
    "pack(Tensor matrix, ScalarType dtype, str mask, Tensor? codes=None, Tensor? scale=None) -> (Tensor, Tensor)",
    fake=_fake_pack,
    cuda=_cuda_pack,
    hot=True,
    note=calls.note,
)
def pack(
    matrix: Tensor, dtype: torch.dtype, mask: str, codes: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A matrix pruned and packed, and its transpose.

    Args:
        matrix: R x C, multiples of 16, fp64 (CPU only), fp32, fp16 or bf16, any strides.
        dtype: Of the packed values, fp16 or bf16; rounded to once, after the mask was chosen.
        mask: As SparseConfig's weight.
        codes: As prune's; they must be of transposable tiles, of which nothing but number and dtype is checked.
        scale: As prune's.

    Returns:
        The buffers of the pruned matrix and of its transpose, which is empty for masks along the columns only.

    Raises:
        ShapeError, TensorError, ConfigError: As prune.
        EngineError: On CUDA, when nothing was ever packed on this device and a CUDA graph is being captured.
    """
    found = checked(matrix, mask, codes, scale)
    _check_packable(matrix, dtype)
    kept = found.choose(matrix) if codes is None else reference_masks.from_codes(codes)
    if found.needs_scale:
        matrix = prune_anywhere(matrix, dtype, mask, codes, scale)
    packed = encoded(matrix, kept, dtype)
    return packed, encoded(matrix.mT, kept.mT, dtype) if found.both_ways else packed.new_empty(0)


def _both_ways(mask: masks.Mask) -> masks.Mask:
    """mask, whose packed transpose exists."""
    if not mask.both_ways:
        known = ", ".join(repr(other.name) for other in masks.MASKS.values() if other.both_ways)
        raise ConfigError(f"mask={mask.name!r} is 2:4 along the columns only: its transpose is packed for {known} only")
    return mask


def _fake_pack_transpose(
    matrix: Tensor, dtype: torch.dtype, mask: str, codes: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    _both_ways(masks.get(mask))
    return _fake_buffers(matrix, matrix.shape[0], matrix.shape[1], True)[1]


def _cuda_pack_transpose(
    matrix: Tensor, dtype: torch.dtype, mask: str, codes: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    found = _both_ways(checked(matrix, mask, codes, scale))
    return _pack_rows(LaunchKind.PACK_TRANSPOSE, matrix, matrix.shape[0], dtype, found, codes, scale)[1]


@register(
    "pack_transpose(Tensor matrix, ScalarType dtype, str mask, Tensor? codes=None, Tensor? scale=None) -> Tensor",
    fake=_fake_pack_transpose,
    cuda=_cuda_pack_transpose,
    hot=True,
    note=calls.note,
)
def pack_transpose(
    matrix: Tensor, dtype: torch.dtype, mask: str, codes: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """The second buffer of pack alone: a matrix pruned, and its transpose packed.

    Args:
        matrix: As pack's.
        dtype: As pack's.
        mask: As pack's, but 2:4 along both axes.
        codes: As pack's.
        scale: As pack's.

    Returns:
        The buffer of the transpose of the pruned matrix, with the bytes of pack's.

    Raises:
        ConfigError: As pack, or the mask is 2:4 along the columns only.
        ShapeError, TensorError, EngineError: As pack.
    """
    found = _both_ways(checked(matrix, mask, codes, scale))
    _check_packable(matrix, dtype)
    kept = found.choose(matrix) if codes is None else reference_masks.from_codes(codes)
    return encoded(matrix.mT, kept.mT, dtype)


def _fake_pack_tokens(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return _fake_buffers(x, round_up(x.shape[0], SPARSE_MULTIPLE), x.shape[1], True)


_TOKENS = masks.get("transposable")


def _cuda_pack_tokens(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    calls.note_tokens(op=True)
    return _pack_rows(LaunchKind.PACK_TOKENS, x, round_up(x.shape[0], SPARSE_MULTIPLE), dtype, _TOKENS, None, None)


@register(
    "pack_tokens(Tensor x, ScalarType dtype) -> (Tensor, Tensor)",
    fake=_fake_pack_tokens,
    cuda=_cuda_pack_tokens,
    hot=True,
)
def pack_tokens(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Tokens pruned by 4x4 tiles and packed as pack does; rows are padded with zeros to a multiple of 16.

    Args:
        x: M x K, any M, K a multiple of 16, dtypes as pack.
        dtype: Of the packed values, fp16 or bf16.

    Returns:
        The buffers of x~ (M' x K) and of its transpose (K x M'), M' being M rounded up to a multiple of 16.
    """
    calls.note_tokens(op=True)
    padded = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % SPARSE_MULTIPLE))
    kept = _TOKENS.choose(padded)
    return encoded(padded, kept, dtype), encoded(padded.mT, kept.mT, dtype)


def _fake_unpack(packed: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty(rows, columns, dtype=dtype)


def _cuda_unpack(packed: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """By the kernel or, where only the engine can read the buffer, as the buffer's product with the identity.

    dtype may be float8_e4m3fn.
    """
    written = packed_format(packed.get_device(), dtype, engine())
    if written.packer == "kernel" and written.layout is not None:
        from semisparse.kernels import unpack as kernel

        out = packed.new_empty(rows, columns, dtype=dtype)
        prepare.launch(
            LaunchKind.UNPACK,
            kernel.launch(packed, out, layout=written.layout),
            (packed, out),
            dtypes=(None, dtype),
            sizes=(rows, columns, 0),
            sizes_in_bytes=(written.layout.buffer_bytes(rows, columns, dtype.itemsize), 0),
        )
        return out
    if written.layout is not None:
        held = torch.uint8 if dtype is FP8 else dtype  # not every op of PyTorch takes 8-bit floating-point numbers
        return reference_packing.unpack(written.layout.decode(packed, rows, columns, held)).view(dtype)
    exact = torch.bfloat16 if dtype is FP8 else dtype
    identity = torch.eye(columns, dtype=exact, device=packed.device).to(dtype)
    out = packed.new_empty(columns, rows, dtype=exact)
    engine().matmul(Problem(rows, columns, columns, dtype, out_dtype=exact), 0, Operands(packed, identity, out))
    return out.mT.contiguous().to(dtype)


@register(
    "unpack(Tensor packed, SymInt rows, SymInt columns, ScalarType dtype) -> Tensor",
    fake=_fake_unpack,
    cuda=_cuda_unpack,
    hot=True,
)
def unpack(packed: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The pruned matrix (rows x columns of dtype, contiguous) that a buffer of pack holds; exact."""
    return reference_packing.unpack(SM90_16BIT.decode(packed, rows, columns, dtype))


def _pack_rows(
    kind: LaunchKind,
    matrix: Tensor,
    rows: int,
    dtype: torch.dtype,
    mask: masks.Mask,
    codes: Tensor | None,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """pack on CUDA, with rows of zeros added up to rows. What kind does not want is empty."""
    written, columns = packed_format(matrix.get_device(), dtype, engine()), matrix.shape[1]
    wanted = kind is not LaunchKind.PACK_TRANSPOSE, mask.both_ways
    if rows == 0:  # the buffers may have room all the same
        packed, packed_t = _fake_buffers(matrix, rows, columns, mask.both_ways)
        return packed.fill_(PADDING), packed_t.fill_(PADDING)
    if written.packer != "kernel" or written.layout is None or not mask.chosen_while_packing:
        padded = torch.nn.functional.pad(matrix, (0, 0, 0, rows - matrix.shape[0]))
        return _pack_in_steps(_cuda_prune(padded, dtype, mask.name, codes, scale), written, mask, wanted)
    from semisparse.kernels import prune_pack as kernel

    packed = matrix.new_empty(_packed_bytes(rows, columns) if wanted[0] else 0, dtype=torch.uint8)
    packed_t = matrix.new_empty(_packed_bytes(columns, rows) if wanted[1] else 0, dtype=torch.uint8)
    behind = written.layout.pad_behind(packed, rows, columns), written.layout.pad_behind(packed_t, columns, rows)
    into = packed if wanted[0] else None, packed_t if wanted[1] else None
    launcher = kernel.launch(
        matrix,
        *into,
        dtype=dtype,
        layout=written.layout,
        mask=mask.name,
        rows_padded=rows,
        codes=codes,
        scale=scale,
    )
    if prepare.repeatable(matrix):
        prepare.launch(
            kind,
            launcher,
            (matrix, codes, scale, *into),
            dtypes=(matrix.dtype, dtype),
            sizes=(matrix.shape[0], columns, matrix.stride(0)),
            mask="" if kind is LaunchKind.PACK_TOKENS else mask.name,
            given=(codes is not None, scale is not None),
            sizes_in_bytes=(packed.numel(), packed_t.numel()),
            behind=behind,
        )
    return packed, packed_t


def _pack_in_steps(
    pruned: Tensor, written: PackedFormat, mask: masks.Mask, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """A pruned matrix packed without the kernel: by NVIDIA's compressor or by the reference."""
    if written.packer == "kernel" and engine().available(pruned.get_device()).ok:
        # A mask that the kernel does not choose. The compressor does not synchronise; the reference does.
        written = PackedFormat("compressor", written.layout, f"mask={mask.name!r}")
    empty = pruned.new_empty(0, dtype=torch.uint8)
    packed = pack_pruned(pruned, written) if wanted[0] else empty
    return packed, pack_pruned(pruned.mT.contiguous(), written) if wanted[1] else empty


def pack_pruned(pruned: Tensor, written: PackedFormat) -> Tensor:
    """The buffer of a 2:4 matrix (R x C, contiguous, 16-bit or float8_e4m3fn), written without the kernel."""
    if written.packer == "compressor":
        packed = engine().compress(pruned, check=False)
    else:
        held = pruned.view(torch.uint8) if pruned.dtype is FP8 else pruned
        kept = held & 0x7F != 0 if pruned.dtype is FP8 else held != 0  # -0 is a zero
        packed = (written.layout or sm90_layout(pruned.dtype)).encode(reference_packing.pack(held, kept))
    rows, columns = pruned.shape
    return lengthened(packed, rows, columns, pruned.itemsize)
