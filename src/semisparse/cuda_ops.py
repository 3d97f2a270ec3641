"""What the ops do on CUDA: pack with the kernel, hand products to the engine. Imported by ops.py on first use."""

from functools import cache, lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from semisparse import cpu_ops
from semisparse.formats.layout import ALIGNMENT, SM90_16BIT, SPARSE_MULTIPLE, packed_bytes, round_up
from semisparse.formats.packed import PackedFormat, packed_format
from semisparse.gemm import dispatch, problem
from semisparse.gemm.engine import engine
from semisparse.gemm.operands import Operands
from semisparse.gemm.problem import DENSE_MULTIPLE, Problem
from semisparse.kernels.launch_checks import MODES
from semisparse.pattern import GROUP
from semisparse.reference import masks as reference_masks
from semisparse.reference import packing as reference_packing

_packed_bytes = lru_cache(4096)(packed_bytes)
_CHOSEN_BY_KERNEL = ("transposable", "row", "greedy", "signed_greedy")


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def tile_codes(matrix: Tensor, mask: str) -> Tensor:
    """ops.tile_codes: by the kernel where it knows mask and dtype, else by the reference."""
    matrix = matrix.detach()
    if mask in _CHOSEN_BY_KERNEL and matrix.dtype != torch.float64 and _has_triton():
        from semisparse.kernels import tile_codes as kernel

        rows, columns = reference_masks.check_shape(matrix, tiles=True)
        codes = matrix.new_empty(rows // GROUP, columns // GROUP, dtype=torch.int16)
        kernel.launch(matrix, codes, mode=mask)
        return codes
    return cpu_ops.tile_codes(matrix, mask)


def prune(matrix: Tensor, dtype: torch.dtype, mask: str, frozen: Tensor | None = None) -> Tensor:
    """ops.prune: the reference, with the mask chosen by the kernel where tile_codes would."""
    whole_tiles = not (matrix.shape[0] % GROUP or matrix.shape[1] % GROUP) if matrix.dim() == 2 else False
    if mask in _CHOSEN_BY_KERNEL and whole_tiles:
        return cpu_ops.prune(matrix, dtype, "codes", tile_codes(matrix, mask))
    return cpu_ops.prune(matrix, dtype, mask, frozen)


def pack(matrix: Tensor, dtype: torch.dtype, mask: str, frozen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """ops.pack: one pass over the matrix; see formats/packed.py for the devices where it takes more."""
    return _pack(matrix, matrix.shape[0], dtype, mask, frozen)


def pack_tokens(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """ops.pack_tokens: as pack, with zero rows added."""
    return _pack(x, round_up(x.shape[0], SPARSE_MULTIPLE), dtype, "transposable")


def unpack(packed: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """ops.unpack: by the kernel or, where only the engine can read the buffer, as its product with the identity."""
    written = packed_format(packed.get_device(), dtype, engine())
    if written.packer == "kernel" and written.layout is not None:
        from semisparse.kernels import unpack as kernel

        out = packed.new_empty(rows, columns, dtype=dtype)
        kernel.launch(packed, out, layout=written.layout)
        return out
    if written.layout is not None:
        return reference_packing.unpack(written.layout.decode(packed, rows, columns, dtype))
    identity = torch.eye(columns, dtype=dtype, device=packed.device)
    out = packed.new_empty(columns, rows, dtype=dtype)
    engine().matmul(Problem(rows, columns, columns, dtype), 0, Operands(packed, identity, out))
    return out.mT.contiguous()


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, mode: str) -> Tensor:
    """ops.packed_linear: tokens are padded to what the engine takes, and cut off again."""
    tokens, in_features = x.shape
    if tokens == 0:
        return x.new_empty(0, out_features)
    asked = problem.forward(tokens, out_features, in_features, x.dtype, bias is not None)
    x = _padded(x, round_up(tokens, DENSE_MULTIPLE))
    out = x.new_empty(x.shape[0], out_features)
    _multiply(asked, packed, x, out, None if bias is None else _aligned(bias), mode)
    return out[:tokens] if out.shape[0] != tokens else out


def packed_tokens_linear(packed: Tensor, weight: Tensor, bias: Tensor | None, tokens: int, mode: str) -> Tensor:
    """ops.packed_tokens_linear; the bias by our kernel or, without triton, by PyTorch."""
    out_features, in_features = weight.shape
    if tokens == 0:
        return weight.new_empty(0, out_features)
    asked = problem.activation_forward(tokens, out_features, in_features, weight.dtype)
    out = weight.new_empty(asked.d_shape)
    _multiply(asked, packed, _padded(weight, out_features), out, None, mode)
    out = out[:tokens] if out.shape[0] != tokens else out
    if bias is not None and packed_format(out.get_device(), out.dtype, engine()).packer == "kernel":
        from semisparse.kernels import bias as kernel

        kernel.launch(out, bias.contiguous())
    elif bias is not None:
        out += bias
    return out


def packed_tokens_grad_weight(packed_t: Tensor, grad_output: Tensor, in_features: int, mode: str) -> Tensor:
    """ops.packed_tokens_grad_weight."""
    tokens, out_features = grad_output.shape
    if tokens == 0:
        return grad_output.new_zeros(out_features, in_features)
    asked = problem.activation_weight(tokens, out_features, in_features, grad_output.dtype)
    out = grad_output.new_empty(asked.d_shape)
    _multiply(asked, packed_t, _padded(grad_output, round_up(tokens, SPARSE_MULTIPLE)), out, None, mode)
    return out


def _multiply(asked: Problem, packed: Tensor, b: Tensor, out: Tensor, bias: Tensor | None, mode: str) -> None:
    def unpacked(buffer: Tensor) -> Tensor:
        return unpack(buffer, asked.rows, asked.reduction, asked.dtype)

    dispatch.multiply(asked, Operands(packed, b, out, bias), unpacked, mode)  # type: ignore[arg-type]


def _padded(matrix: Tensor, rows: int) -> Tensor:
    """matrix with zero rows added up to rows, contiguous and 16-byte aligned, as the engine takes it."""
    if matrix.shape[0] != rows:
        return torch.nn.functional.pad(matrix, (0, 0, 0, rows - matrix.shape[0]))
    return _aligned(matrix)


def _aligned(tensor: Tensor) -> Tensor:
    """tensor itself where it is contiguous and 16-byte aligned (a view into a flat buffer may not be), else a copy."""
    if tensor.data_ptr() % ALIGNMENT:
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor.contiguous()


def _pack(
    matrix: Tensor, rows: int, dtype: torch.dtype, mask: str, frozen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Buffers of the pruned matrix, padded to rows, and of its transpose (empty for a row-wise mask)."""
    written, columns = packed_format(matrix.get_device(), dtype, engine()), matrix.shape[1]
    both = mask not in cpu_ops.ROW_WISE
    if mask in ("codes", "soft"):
        cpu_ops.check_frozen(matrix, mask, frozen)
    if rows == 0:
        return matrix.new_empty(0, dtype=torch.uint8), matrix.new_empty(0, dtype=torch.uint8)
    if written.packer != "kernel" or written.layout is None or mask not in MODES:
        padded = torch.nn.functional.pad(matrix, (0, 0, 0, rows - matrix.shape[0]))
        pruned = prune(padded, dtype, mask, frozen)
        if written.packer == "kernel" and engine().available(matrix.get_device()).ok:
            # A mask that the kernel does not know; the compressor, unlike the reference, never waits for the device.
            written = PackedFormat("compressor", written.layout, f"mask={mask!r}")
        first = _slowly(pruned, written)
        return first, _slowly(pruned.mT.contiguous(), written) if both else first.new_empty(0)
    from semisparse.kernels import prune_pack as kernel

    packed = matrix.new_empty(_packed_bytes(rows, columns), dtype=torch.uint8)
    packed_t = matrix.new_empty(_packed_bytes(columns, rows) if both else 0, dtype=torch.uint8)
    kernel.launch(
        matrix,
        packed,
        packed_t if both else None,
        dtype=dtype,
        layout=written.layout,
        mode=mask,
        rows_padded=rows,
        codes=frozen if mask == "codes" else None,
        scale=frozen if mask == "soft" else None,
    )
    return packed, packed_t


def _slowly(pruned: Tensor, written: PackedFormat) -> Tensor:
    """A pruned matrix packed without the kernel, in a buffer of the size that the op promises."""
    if written.packer == "compressor":
        packed = engine().compress(pruned, check=False)
    else:
        packed = (written.layout or SM90_16BIT).encode(reference_packing.pack(pruned, pruned != 0))
    return torch.nn.functional.pad(packed, (0, packed_bytes(*pruned.shape) - packed.numel()))
