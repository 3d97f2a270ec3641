"""What the ops do on CUDA: pack with NVIDIA's compressor, hand products to the engine. Imported by ops.py on first use."""

import torch
from torch import Tensor

from semisparse.gemm import dispatch, problem
from semisparse.gemm.cusparselt import ALIGNMENT
from semisparse.gemm.engine import engine
from semisparse.gemm.formats import packed_format
from semisparse.gemm.problem import DENSE_MULTIPLE, SPARSE_MULTIPLE, Problem, pad
from semisparse.reference import linear as reference_linear
from semisparse.reference import masks as reference_masks
from semisparse.reference import packing as reference_packing


def prune(matrix: Tensor, dtype: torch.dtype, mask: str) -> Tensor:
    """ops.prune: the reference, in plain PyTorch; the sizes and dtypes that come here have no packed route."""
    return reference_linear.prune(matrix, getattr(reference_masks, mask)(matrix)).to(dtype).contiguous()


def prune_tokens(x: Tensor, dtype: torch.dtype) -> Tensor:
    """ops.prune_tokens: as prune."""
    return reference_linear.prune_tokens(x).to(dtype).contiguous()


def pack(matrix: Tensor, dtype: torch.dtype, mask: str) -> tuple[Tensor, Tensor]:
    """ops.pack: the reference prunes, NVIDIA's compressor packs each direction."""
    return _compress(prune(matrix, dtype, mask), transposed=mask == "transposable")


def pack_tokens(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """ops.pack_tokens: as pack, with zero rows added."""
    tokens = x.shape[0]
    if tokens == 0:
        return x.new_empty(0, dtype=torch.uint8), x.new_empty(0, dtype=torch.uint8)
    rows = pad(tokens, SPARSE_MULTIPLE)
    padded = torch.nn.functional.pad(prune_tokens(x, dtype), (0, 0, 0, rows - tokens))
    return _compress(padded, transposed=True)


def unpack(packed: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """ops.unpack: read with the layout or, where only the engine can read it, as its product with the identity."""
    written = packed_format(packed.get_device(), dtype)
    if written.layout is not None:
        return reference_packing.unpack(written.layout.decode(packed, rows, columns, dtype))
    identity = torch.eye(columns, dtype=dtype, device=packed.device)
    out = packed.new_empty(columns, rows, dtype=dtype)
    engine().matmul(Problem(rows, columns, columns, dtype), 0, packed, identity, out)
    return out.mT.contiguous()


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, mode: str) -> Tensor:
    """ops.packed_linear: tokens are padded to what the engine takes, and cut off again."""
    tokens, in_features = x.shape
    if tokens == 0:
        return x.new_empty(0, out_features)
    asked = problem.forward(tokens, out_features, in_features, x.dtype, bias is not None)
    x = _padded(x, pad(tokens, DENSE_MULTIPLE))
    out = x.new_empty(x.shape[0], out_features)
    _multiply(asked, packed, x, out, None if bias is None else _aligned(bias), mode)
    return out[:tokens] if out.shape[0] != tokens else out


def packed_tokens_linear(packed: Tensor, weight: Tensor, tokens: int, mode: str) -> Tensor:
    """ops.packed_tokens_linear."""
    out_features, in_features = weight.shape
    if tokens == 0:
        return weight.new_empty(0, out_features)
    asked = problem.activation_forward(tokens, out_features, in_features, weight.dtype)
    out = weight.new_empty(asked.d_shape)
    _multiply(asked, packed, _padded(weight, out_features), out, None, mode)
    return out[:tokens] if out.shape[0] != tokens else out


def packed_tokens_grad_weight(packed_t: Tensor, grad_output: Tensor, in_features: int, mode: str) -> Tensor:
    """ops.packed_tokens_grad_weight."""
    tokens, out_features = grad_output.shape
    if tokens == 0:
        return grad_output.new_zeros(out_features, in_features)
    asked = problem.activation_weight(tokens, out_features, in_features, grad_output.dtype)
    out = grad_output.new_empty(asked.d_shape)
    _multiply(asked, packed_t, _padded(grad_output, pad(tokens, SPARSE_MULTIPLE)), out, None, mode)
    return out


def _multiply(asked: Problem, packed: Tensor, b: Tensor, out: Tensor, bias: Tensor | None, mode: str) -> None:
    def unpacked(buffer: Tensor) -> Tensor:
        return unpack(buffer, asked.rows, asked.reduction, asked.dtype)

    dispatch.multiply(asked, packed, b, out, bias, unpack=unpacked, mode=mode)  # type: ignore[arg-type]


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


def _compress(pruned: Tensor, *, transposed: bool) -> tuple[Tensor, Tensor]:
    first = engine().compress(pruned, check=False)
    return first, engine().compress(pruned.mT.contiguous(), check=False) if transposed else first.new_empty(0)
