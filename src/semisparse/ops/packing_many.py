"""Packing many matrices at once, into buffers that keep their addresses."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from semisparse import masks
from semisparse.errors import EngineError, TensorError
from semisparse.formats.packed import PackedMatrix, packed_format
from semisparse.gemm.engine import engine
from semisparse.ops.packing import pack

if TYPE_CHECKING:
    from semisparse.kernels.prune_pack_many import Batch

_MOST = 64


class _Plan(NamedTuple):
    """How the matrices of one call are packed.

    Attributes:
        batches: Launches.
        alone: Numbers of the matrices that are not part of a launch.
    """

    batches: "list[Batch]"
    alone: list[int]


# Plans by all that they depend on, the last used at the end.
_PLANS: OrderedDict[tuple[Any, ...], _Plan] = OrderedDict()
# Those that a CUDA graph has recorded: its replays read their tables.
_RECORDED: list[_Plan] = []


def pack_many(
    matrices: Sequence[Tensor],
    buffers: Sequence[PackedMatrix],
    dtype: torch.dtype,
    mask: str,
    codes: Sequence[Tensor | None] | None = None,
    scales: Sequence[Tensor | None] | None = None,
) -> Callable[[], None] | None:
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

    Returns:
        What does the same again, as long as all tensors stay where they are; None where some matrix was packed alone.

    Raises:
        ShapeError, TensorError, ConfigError: As pack.
        EngineError: As pack, and where a CUDA graph is captured before these matrices were packed once.
    """
    nothing = [None] * len(matrices)
    codes, scales = codes or nothing, scales or nothing
    key = (dtype, mask, *map(_place, matrices, buffers, codes, scales))
    capturing = bool(matrices) and matrices[0].is_cuda and engine().runtime.capturing()
    plan = _PLANS.get(key)
    if plan is None:
        plan = _PLANS[key] = _planned(matrices, buffers, dtype, mask, codes, scales, capturing)
        if len(_PLANS) > _MOST:
            _PLANS.popitem(last=False)
    _PLANS.move_to_end(key)
    if capturing and plan not in _RECORDED:
        _RECORDED.append(plan)
    again = partial(_launch, plan, [buffer for into in buffers for buffer in into[:2]])
    if plan.batches:
        again()
    for at in plan.alone:
        into = buffers[at]
        packed, transposed = pack(matrices[at].detach(), dtype, mask, codes[at], scales[at])
        into.matrix.copy_(packed)
        if into.transposed.numel():
            into.transposed.copy_(transposed)
    return None if plan.alone else again


def _launch(plan: _Plan, written: list[Tensor]) -> None:
    for batch in plan.batches:
        batch.launch()
    torch.autograd.graph.increment_version(written)


def _place(
    matrix: Tensor, into: PackedMatrix, codes: Tensor | None, scale: Tensor | None
) -> tuple[int | torch.Size | torch.dtype | None, ...]:
    """Where one matrix, its buffers and what it is given lie, and all else that a plan depends on."""
    return (
        matrix.data_ptr(),
        into[0].data_ptr(),
        into[1].data_ptr(),
        matrix.shape,
        matrix.stride(0),
        matrix.dtype,
        None if codes is None else codes.data_ptr(),
        None if scale is None else scale.data_ptr(),
    )


def _planned(
    matrices: Sequence[Tensor],
    buffers: Sequence[PackedMatrix],
    dtype: torch.dtype,
    mask: str,
    codes: Sequence[Tensor | None],
    scales: Sequence[Tensor | None],
    capturing: bool,
) -> _Plan:
    """A launch for each set of matrices that the kernel can take together: with codes or without, one way or both."""
    for matrix in matrices:
        if matrix.device != matrices[0].device or matrix.dtype != matrices[0].dtype:
            raise TensorError(
                f"matrices are {matrix.dtype} on {matrix.device} and {matrices[0].dtype} on {matrices[0].device}; "
                "pack those of one dtype and device together"
            )
    written = None
    if matrices and matrices[0].is_cuda:
        written = packed_format(matrices[0].get_device(), dtype, engine())
    if written is None or written.packer != "kernel" or written.layout is None:
        return _Plan([], list(range(len(matrices))))
    from semisparse.kernels.prune_pack_many import Batch, Matrix, takes

    groups: dict[tuple[bool, bool], list[Matrix]] = {}
    alone = []
    for at, (matrix, into) in enumerate(zip(matrices, buffers, strict=True)):
        if takes(matrix, dtype, masks.get(mask)):
            both = into.transposed.numel() > 0
            member = Matrix(matrix, into.matrix, into.transposed if both else None, codes[at], scales[at])
            groups.setdefault((codes[at] is not None, both), []).append(member)
        else:
            alone.append(at)
    if groups and capturing:
        raise EngineError(
            f"{len(matrices)} matrices were not packed together yet, and their table cannot be written while a CUDA "
            "graph is captured: pack them once before the capture"
        )
    return _Plan([Batch(group, dtype, written.layout, mask) for group in groups.values()], alone)
