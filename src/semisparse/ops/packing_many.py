"""Packing many matrices at once, into buffers that keep their addresses."""

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, MutableMapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from semisparse import forks, masks
from semisparse.errors import ConfigError, EngineError, ShapeError, TensorError
from semisparse.formats.layout import FP8, MetadataLayout
from semisparse.formats.packed import PackedMatrix, packed_format
from semisparse.gemm.engine import engine
from semisparse.ops.fp8_packed import pack_fp8
from semisparse.ops.packing import pack

if TYPE_CHECKING:
    from semisparse.kernels import pack_table, prune_pack8_many, prune_pack_many

_MOST = 64


class _Plan(NamedTuple):
    """How the matrices of one call are packed.

    Attributes:
        batches: Launches.
        alone: Numbers of the matrices that are not part of a launch.
    """

    batches: "list[prune_pack_many.Batch | prune_pack8_many.Batch]"
    alone: list[int]


# Plans by all that they depend on, the last used at the end.
_PLANS: OrderedDict[tuple[Any, ...], _Plan] = OrderedDict()
_LOCK = threading.Lock()
forks.renewed_in_children(sys.modules[__name__], "_LOCK", threading.Lock)
# Those that a CUDA graph has recorded, for each buffer that its replays write: they read the tables.
_RECORDED: MutableMapping[Tensor, list[_Plan]] = WeakTensorKeyDictionary()


def pack_many(
    matrices: Sequence[Tensor],
    buffers: Sequence[PackedMatrix],
    dtype: torch.dtype,
    mask: str,
    codes: Sequence[Tensor | None] | None = None,
    scales: Sequence[Tensor | None] | None = None,
) -> Callable[[], None] | None:
    """Overwrite buffers with what pack, or pack_fp8, gives for each matrix, byte for byte, and raise their versions.

    On CUDA one launch packs all matrices with codes and one all others, by a table of their addresses that is built
    when they are packed for the first time. (In e4m3 each is three launches: amax, scales, packing.) What the kernel
    cannot read in place is packed matrix by matrix.

    A graph that saved a buffer before then raises PyTorch's error for in-place changes in its backward. A CUDA graph
    that recorded the launch may be replayed as long as the matrices and buffers exist.

    Args:
        matrices: Each as pack takes it; of one stored dtype and on one device.
        buffers: One for each matrix, with the sizes that pack or pack_fp8 returns, and full of formats.layout.PADDING
            before they are packed for the first time: launches leave what follows the last metadata block. The
            transpose is left out where its buffer is empty. The scale is one fp32 element for e4m3, else None.
        dtype: As pack's, or float8_e4m3fn for what pack_fp8 gives.
        mask: As pack's.
        codes: As pack's, one or None for each matrix; None where no matrix has any.
        scales: As codes.

    Returns:
        What does the same again, as long as all tensors stay where they are; None where some matrix was packed alone.

    Raises:
        ShapeError: As pack, or the sequences differ in length.
        TensorError, ConfigError: As pack, or matrices differ in dtype or device, or a scale is missing.
        EngineError: As pack, and where a CUDA graph is captured before these matrices were packed once.
    """
    nothing = [None] * len(matrices)
    codes, scales = codes or nothing, scales or nothing
    _check_lengths(matrices, buffers=buffers, codes=codes, scales=scales)
    _check_scales(buffers, scales, dtype)
    key = (dtype, mask, *map(_place, matrices, buffers, codes, scales))
    capturing = _capturing(matrices)
    with _LOCK:
        plan = _PLANS.get(key)
        if plan is None:
            plan = _PLANS[key] = _planned(matrices, buffers, dtype, mask, codes, scales, capturing)
            if len(_PLANS) > _MOST:
                _PLANS.popitem(last=False)
        _PLANS.move_to_end(key)
        if capturing:
            _keep_for_replays(plan, buffers)
    again = partial(_launch, plan, [buffer for into in buffers for buffer in into if buffer is not None])
    if plan.batches:
        again()
    for at in plan.alone:
        _pack_alone(matrices[at].detach(), buffers[at], dtype, mask, codes[at], scales[at])
    return None if plan.alone else again


def _pack_alone(
    matrix: Tensor, buffers: PackedMatrix, dtype: torch.dtype, mask: str, codes: Tensor | None, scale: Tensor | None
) -> None:
    packed = pack_fp8(matrix, mask, codes) if dtype is FP8 else pack(matrix, dtype, mask, codes, scale)
    for into, result in zip(buffers, packed, strict=False):
        if into is not None and into.numel():
            into.copy_(result)


def _keep_for_replays(plan: _Plan, buffers: Sequence[PackedMatrix]) -> None:
    """Keep plan as long as one of the buffers exists."""
    for into in buffers:
        kept = _RECORDED.setdefault(into.matrix, [])
        if plan not in kept:
            kept.append(plan)


def _launch(plan: _Plan, written: list[Tensor]) -> None:
    for batch in plan.batches:
        batch.launch()
    torch.autograd.graph.increment_version(written)


def _check_lengths(matrices: Sequence[Tensor], **others: Sequence[Any]) -> None:
    for name, given in others.items():
        if len(given) != len(matrices):
            raise ShapeError(f"{name} has {len(given)} entries for {len(matrices)} matrices; give one for each")


def _check_scales(buffers: Sequence[PackedMatrix], scales: Sequence[Tensor | None], dtype: torch.dtype) -> None:
    if dtype is FP8 and any(scale is not None for scale in scales):
        raise ConfigError("scales are given, and no mask that is packed in e4m3 takes one: leave scales out")
    for into in buffers:
        if (into.scale is not None) is not (dtype is FP8):
            raise TensorError(
                f"buffers.scale is {'missing' if into.scale is None else 'given'} for packing as {dtype}; pass one "
                "float32 element for float8_e4m3fn, else None"
            )


def _place(matrix: Tensor, into: PackedMatrix, codes: Tensor | None, scale: Tensor | None) -> tuple[Any, ...]:
    """Where one matrix, its buffers and what it is given lie, and all else that a plan depends on."""
    packed, packed_t = into.matrix, into.transposed
    # This runs for each matrix at each call, so of the buffers it takes no more than the checks look at. The strides of
    # the matrix count, because x[:, :16] and x[:, ::2] may agree in all the rest.
    return (
        matrix.data_ptr(),
        matrix.shape,
        matrix.stride(),
        matrix.dtype,
        packed.data_ptr(),
        packed.numel(),
        packed.dtype,
        packed.is_contiguous(),
        packed_t.data_ptr(),
        packed_t.numel(),
        packed_t.dtype,
        packed_t.is_contiguous(),
        None if codes is None else (codes.data_ptr(), codes.shape, codes.dtype, codes.is_contiguous()),
        *(None if one is None else (one.data_ptr(), one.shape, one.dtype) for one in (scale, into.scale)),
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
    layout = _kernel_layout(matrices, dtype)
    if layout is None:
        return _Plan([], list(range(len(matrices))))
    from semisparse.kernels.pack_table import Matrix, takes

    groups: dict[tuple[bool, bool], list[Matrix]] = {}
    alone = []
    for at, (matrix, into) in enumerate(zip(matrices, buffers, strict=True)):
        both = into.transposed.numel() > 0
        scale = scales[at] if into.scale is None else into.scale
        member = Matrix(matrix, into.matrix, into.transposed if both else None, codes[at], scale)
        if takes(member, dtype, masks.get(mask)):
            groups.setdefault((codes[at] is not None, both), []).append(member)
        else:
            alone.append(at)
    if groups and capturing:
        raise EngineError(
            f"{len(matrices)} matrices were not packed together yet, and their table cannot be written while a CUDA "
            "graph is captured: pack them once before the capture"
        )
    return _Plan([_batch(group, dtype, layout, mask) for group in groups.values()], alone)


def _batch(
    members: "list[pack_table.Matrix]", dtype: torch.dtype, layout: MetadataLayout, mask: str
) -> "prune_pack_many.Batch | prune_pack8_many.Batch":
    from semisparse.kernels import prune_pack8_many, prune_pack_many

    if dtype is FP8:
        return prune_pack8_many.Batch(members, layout, mask)
    return prune_pack_many.Batch(members, dtype, layout, mask)


def _capturing(matrices: Sequence[Tensor]) -> bool:
    return bool(matrices) and matrices[0].is_cuda and engine().runtime.capturing()


def _kernel_layout(matrices: Sequence[Tensor], dtype: torch.dtype) -> MetadataLayout | None:
    """What the kernel writes on the device of matrices; None where it does not pack."""
    if not matrices or not matrices[0].is_cuda:
        return None
    found = packed_format(matrices[0].get_device(), dtype, engine())
    return found.layout if found.packer == "kernel" else None
