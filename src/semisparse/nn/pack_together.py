"""Packing the weights of many layers at once, into buffers that they keep."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from semisparse import calls, masks, ops
from semisparse.formats.layout import FP8, PADDING, packed_bytes
from semisparse.formats.packed import PackedMatrix
from semisparse.nn.packed_weight import PackedWeight, PackingLayer
from semisparse.nn.whole_weights import capturing

Keep = Literal["both", "forward"]
"""What is held of a packed weight: W~ and W~^T, or W~ alone."""


class Member(NamedTuple):
    """A layer whose weight can be packed now.

    Attributes:
        layer: The layer.
        record: Its packed weight.
        weight: What is packed.
        dtype: The compute dtype to pack it for, or FP8 for one in fp8, which is packed alike for all of them.
    """

    layer: PackingLayer
    record: PackedWeight
    weight: Tensor
    dtype: torch.dtype

    @property
    def fits(self) -> bool:
        """Whether the record already holds the weight as it is."""
        return self.record.dtype is self.dtype and self.record.fits(self.layer, self.weight)


def pack_together(
    members: Iterable[Member], buffers: Callable[[Member], PackedMatrix], *, waited_for: bool
) -> list[Callable[[], None] | None]:
    """Pack the members, in one launch for all of one device, stored dtype, compute dtype (or fp8) and mask.

    While a CUDA graph is captured the records are left as they are, because the launch is not run then.

    Args:
        members: What to pack.
        buffers: Gives the buffers of a member.
        waited_for: Whether forwards on other streams must wait for the launch.

    Returns:
        For each launch: what ops.pack_many returns.
    """
    groups: dict[tuple[object, ...], list[Member]] = defaultdict(list)
    for member in members:
        weight = member.weight
        groups[weight.device, weight.dtype, member.dtype, member.layer._mask].append(member)
    # Buffers are ordinary tensors also under inference_mode, so that a later training step can use them.
    with torch.inference_mode(False), torch.no_grad(), calls.unnoticed():
        return [_pack_group(group, [buffers(member) for member in group], waited_for) for group in groups.values()]


def _pack_group(group: list[Member], buffers: list[PackedMatrix], waited_for: bool) -> Callable[[], None] | None:
    first = group[0]
    versions = [member.weight._version for member in group]  # a write from now on makes the record old
    again = ops.pack_many(
        [member.weight for member in group],
        buffers,
        first.dtype,
        first.layer._mask,
        [member.layer.held_codes for member in group],
        [member.layer.held_scale for member in group],
    )
    if capturing(first.weight):
        return None
    pending = None
    if waited_for and first.weight.is_cuda:
        pending = torch.cuda.Event()
        pending.record(torch.cuda.current_stream(first.weight.device))
    for member, packed, version in zip(group, buffers, versions, strict=True):
        record = member.record
        record.note(member.layer, member.weight, version)
        record.packed, record.dtype, record.pending = packed, member.dtype, pending
    return again


def new_buffers(weight: Tensor, dtype: torch.dtype, both_ways: bool) -> PackedMatrix:
    """Buffers for a packed weight, full of padding, which kernels leave behind the last metadata block.

    Args:
        weight: N x K.
        dtype: Of the packed values; FP8 has a scale, too.
        both_ways: Whether the transpose is packed, too; its buffer is empty otherwise.
    """
    # All of it, because where the last block ends depends on the layout, which belongs to the device.
    buffers = [
        torch.empty(size, dtype=torch.uint8, device=weight.device).fill_(PADDING)
        for size in _sizes(weight, dtype, both_ways)
    ]
    buffers[0]._packs = weight.shape  # type: ignore[attr-defined]
    if dtype is FP8:
        buffers.append(torch.empty((), dtype=torch.float32, device=weight.device))
    for buffer in buffers:
        # As torch._dynamo.mark_static_address does, without importing the compiler: CUDA graphs of compiled code read
        # the buffer where it is, instead of copying it at each replay.
        buffer._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]
    return PackedMatrix(*buffers)


def fit(buffers: PackedMatrix, weight: Tensor, dtype: torch.dtype, both_ways: bool) -> bool:
    """Whether buffers are such as new_buffers would give.

    They must be made for this shape: where its last metadata block ends earlier than that of another one with as many
    bytes, some metadata of that one would be left.
    """
    return (
        buffers.matrix.device == weight.device
        and getattr(buffers.matrix, "_packs", None) == weight.shape
        and (buffers.matrix.numel(), buffers.transposed.numel()) == _sizes(weight, dtype, both_ways)
        and (buffers.scale is not None) is (dtype is FP8)
    )


def _sizes(weight: Tensor, dtype: torch.dtype, both_ways: bool) -> tuple[int, int]:
    (rows, columns), size = weight.shape, dtype.itemsize
    return packed_bytes(rows, columns, size), packed_bytes(columns, rows, size) if both_ways else 0


def both_ways(member: Member, keep: Keep) -> bool:
    """Whether the transpose is held, too: where it is wanted and the mask gives it a packed form.

    Backwards in fp8 cannot pack it again, so for them it is held always.
    """
    return (keep == "both" or member.dtype is FP8) and masks.get(member.layer._mask).both_ways
