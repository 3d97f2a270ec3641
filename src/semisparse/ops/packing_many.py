"""Packing many matrices at once, into buffers that keep their addresses."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from semisparse import masks
from semisparse.errors import EngineError, TensorError
from semisparse.formats.packed import PackedMatrix, packed_format
from semisparse.gemm.engine import engine
from semisparse.ops.packing import pack

if TYPE_CHECKING:
    from semisparse.kernels.prune_pack_many import Batch

_MOST_BATCHES = 64
# Prepared launches by the addresses, shapes and settings that they are for, the last used at the end.
_BATCHES: OrderedDict[tuple[Any, ...], "Batch"] = OrderedDict()
# Those that a CUDA graph has recorded: its replays read their tables.
_RECORDED: list["Batch"] = []


def pack_many(
    matrices: Sequence[Tensor],
    buffers: Sequence[PackedMatrix],
    dtype: torch.dtype,
    mask: str,
    codes: Sequence[Tensor | None] | None = None,
    scales: Sequence[Tensor | None] | None = None,
) -> None:
    """Overwrite buffers with what pack gives for each matrix, byte for byte, and raise their versions.

    On CUDA one launch packs all matrices with codes and one all others, by a table of their addresses that is built
    when they are packed for the first time. What the kernel cannot read in place is packed matrix by matrix.

    A graph that saved a buffer before then raises PyTorch's error for in-place changes in its backward.

    Args:
        matrices: Each as pack takes it; of one stored dtype and on one device.
        buffers: One for each matrix, with the sizes that pack returns. The transpose is left out where its buffer is
            empty.
        dtype: As pack's.
        mask: As pack's.
        codes: As pack's, one or None for each matrix; None where no matrix has any.
        scales: As codes.

    Raises:
        ShapeError, TensorError, ConfigError: As pack.
        EngineError: As pack, and where a CUDA graph is captured before these matrices were packed once.
    """
    nothing = [None] * len(matrices)
    together: dict[tuple[bool, bool], list[tuple[Any, ...]]] = {}
    alone = []
    on_gpu = bool(matrices) and matrices[0].is_cuda and _kernel_packs(matrices[0].get_device(), dtype)
    for matrix, into, held, scale in zip(matrices, buffers, codes or nothing, scales or nothing, strict=True):
        if matrix.device != matrices[0].device or matrix.dtype != matrices[0].dtype:
            raise TensorError(
                f"matrices are {matrix.dtype} on {matrix.device} and {matrices[0].dtype} on {matrices[0].device}; "
                "pack those of one dtype and device together"
            )
        if on_gpu and _fits(matrix, dtype, mask):
            together.setdefault((held is not None, into.transposed.numel() > 0), []).append((matrix, into, held, scale))
        else:
            alone.append((matrix, into, held, scale))
    written = [
        buffer for group in together.values() for _, into, _, _ in group for buffer in into[:2] if buffer.numel()
    ]
    for group in together.values():
        _launch(group, dtype, mask)
    if written:
        torch.autograd.graph.increment_version(written)
    for matrix, into, held, scale in alone:
        packed, transposed = pack(matrix.detach(), dtype, mask, held, scale)
        into.matrix.copy_(packed)
        if into.transposed.numel():
            into.transposed.copy_(transposed)


def _kernel_packs(index: int, dtype: torch.dtype) -> bool:
    return packed_format(index, dtype, engine()).packer == "kernel"


def _fits(matrix: Tensor, dtype: torch.dtype, mask: str) -> bool:
    from semisparse.kernels.prune_pack_many import takes

    return takes(matrix, dtype, masks.get(mask))


def _launch(group: list[tuple[Any, ...]], dtype: torch.dtype, mask: str) -> None:
    from semisparse.kernels.prune_pack_many import Batch, Matrix

    key = (dtype, mask, *(_place(*one) for one in group))
    batch, capturing = _BATCHES.get(key), engine().runtime.capturing()
    if batch is None:
        if capturing:
            raise EngineError(
                f"{len(group)} matrices were not packed together yet, and their table cannot be written while a CUDA "
                "graph is captured: pack them once before the capture"
            )
        layout = packed_format(group[0][0].get_device(), dtype, engine()).layout
        assert layout is not None  # the kernel packs
        members = [
            Matrix(matrix, into.matrix, into.transposed if into.transposed.numel() else None, held, scale)
            for matrix, into, held, scale in group
        ]
        batch = _BATCHES[key] = Batch(members, dtype, layout, mask)
        if len(_BATCHES) > _MOST_BATCHES:
            _BATCHES.popitem(last=False)
    _BATCHES.move_to_end(key)
    if capturing and batch not in _RECORDED:
        _RECORDED.append(batch)
    batch.launch()


def _place(matrix: Tensor, into: PackedMatrix, held: Tensor | None, scale: Tensor | None) -> tuple[Any, ...]:
    """What the table holds of one matrix."""
    tensors = (matrix, into.matrix, into.transposed, held, scale)
    return (
        matrix.shape,
        matrix.stride(0),
        matrix.dtype,
        matrix.get_device(),
        *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
    )
