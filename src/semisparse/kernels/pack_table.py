"""The table by which one launch packs many matrices: what can be part of it, the checks, and its words."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from semisparse import masks
from semisparse.errors import TensorError
from semisparse.formats.layout import (
    ALIGNMENT,
    FP8,
    PACKED_DTYPES,
    SPARSE_MULTIPLE,
    MetadataLayout,
    sparse_multiple,
)
from semisparse.kernels.grid import INT32_END, LARGEST_SIZE
from semisparse.kernels.launch_checks import READ_DTYPES, check_buffers, check_choice, check_held, check_sizes

ENTRY = 16
"""64-bit words of a matrix in the table, so many that every entry is aligned: where its five tensors lie, four sizes as
prune_pack takes them, the number of the matrix's first program, and zeros."""

_PACKED = (*PACKED_DTYPES, FP8)
_TENSORS = ("matrix", "codes", "scale", "packed", "packed_t")  # in the order of an entry
_UNITS = (ALIGNMENT, ALIGNMENT, 4, ALIGNMENT, ALIGNMENT)  # bytes in which an entry counts where each of them lies


class Matrix(NamedTuple):
    """One matrix of a launch, with what prune_pack.launch takes for it.

    Attributes:
        matrix: R x C, as prune_pack.launch takes it; rows 16-byte aligned.
        packed: Its buffer.
        packed_t: Its transpose's buffer, for all matrices of a launch or for none.
        codes: Tile codes, for all or none.
        scale: For mask "soft"; for e4m3, one fp32 element that receives the scale.
    """

    matrix: Tensor
    packed: Tensor
    packed_t: Tensor | None
    codes: Tensor | None = None
    scale: Tensor | None = None


def takes(member: Matrix, dtype: torch.dtype, mask: masks.Mask) -> bool:
    """Whether a matrix can be part of a launch: all is read and written where it lies, and offsets fit into 32 bits."""
    matrix = member.matrix
    if matrix.dim() != 2 or matrix.dtype not in READ_DTYPES or dtype not in _PACKED or not matrix.numel():
        return False
    rows, columns = matrix.shape
    multiple = sparse_multiple(dtype)
    stride = matrix.stride(0) * matrix.itemsize
    return (
        mask.chosen_while_packing
        and not (rows % multiple or columns % multiple or stride % ALIGNMENT)
        and matrix.stride(1) == 1
        and max(rows, columns) <= LARGEST_SIZE
        and rows * max(stride // 8, columns // 4) < INT32_END
        and columns * rows // 4 < INT32_END
        and not any(tensor.data_ptr() % unit for _, tensor, unit in _given(member))
    )


def check_members(members: Sequence[Matrix], dtype: torch.dtype, layout: MetadataLayout, mask: masks.Mask) -> None:
    """Check each matrix of a launch as prune_pack.launch does, and that all agree.

    Args:
        members: The matrices.
        dtype: Of the packed values.
        layout: Where the metadata goes.
        mask: What is chosen.

    Raises:
        ShapeError, ConfigError: As prune_pack.launch.
        TensorError: As prune_pack.launch; or a tensor is not aligned, or matrices differ in dtype, device or in what is
            given for them.
    """
    first = members[0]
    types = first.matrix.dtype, dtype
    for member in members:
        for name, tensor, unit in _given(member):
            if tensor.device != first.matrix.device:
                raise TensorError(
                    f"{name} is on {tensor.device}, the first matrix on {first.matrix.device}: move it there"
                )
            if tensor.data_ptr() % unit:
                raise TensorError(f"{name} is not aligned to {unit} bytes: clone it, or pack this matrix alone")
        for name, ours, theirs in (("codes", member.codes, first.codes), ("packed_t", member.packed_t, first.packed_t)):
            if (ours is None) != (theirs is None):
                raise TensorError(f"{name} is given for some matrices only: pack those in a launch of their own")
        if member.matrix.dtype != first.matrix.dtype:
            raise TensorError(f"matrix is {member.matrix.dtype}, the first {first.matrix.dtype}: use a launch for each")
        rows, columns = member.matrix.shape
        if dtype is FP8 and member.scale is None:
            raise TensorError("scale is None; packing in e4m3 needs one float32 element to write the scale to")
        check_choice(mask, member.codes is not None, member.scale is not None and dtype is not FP8)
        check_sizes(rows, rows, columns, types, mask, first.packed_t is not None, _PACKED)
        check_held(member.codes, member.scale, rows, columns)
        check_buffers(member.packed, member.packed_t, rows, columns, layout, dtype.itemsize)


def write_table(members: Sequence[Matrix], height: int, width: int) -> tuple[Tensor, Tensor, bool]:
    """The table of a launch. Waits for its copies to the device of the matrices, on the current stream.

    Args:
        members: The matrices.
        height: Rows of a program's block.
        width: Columns of a program's block.

    Returns:
        ENTRY int64 words for each matrix, the number of the matrix of each program (int32), and whether all programs
        lie inside of their matrices.
    """
    device = members[0].matrix.device
    table = torch.empty(len(members), ENTRY, dtype=torch.int64, device=device)
    words: list[list[int]] = []
    programs: list[int] = []
    for number, member in enumerate(members):
        rows, columns = member.matrix.shape
        origin = table.data_ptr() + number * ENTRY * table.itemsize
        places = dict.fromkeys(_TENSORS, 0)
        places |= {name: (tensor.data_ptr() - origin) // unit for name, tensor, unit in _given(member)}
        stride = member.matrix.stride(0) * member.matrix.itemsize // ALIGNMENT
        sizes = rows, rows // SPARSE_MULTIPLE, columns // SPARSE_MULTIPLE, stride
        entry = [*places.values(), *sizes, sum(programs)]
        words.append(entry + [0] * (ENTRY - len(entry)))
        programs.append(-(-rows // height) * -(-columns // width))
    # The CPU is named because torch.set_default_device would put them elsewhere.
    table.copy_(torch.tensor(words, dtype=torch.int64, device="cpu"))
    numbers = torch.arange(len(members), dtype=torch.int32, device="cpu")
    member_of = torch.repeat_interleave(numbers, torch.tensor(programs, device="cpu")).to(device)
    whole = not any(m.matrix.shape[0] % height or m.matrix.shape[1] % width for m in members)
    return table, member_of, whole


def _given(member: Matrix) -> list[tuple[str, Tensor, int]]:
    """Name, tensor and unit of all that an entry holds the place of."""
    tensors = ((name, getattr(member, name), unit) for name, unit in zip(_TENSORS, _UNITS, strict=True))
    return [one for one in tensors if one[1] is not None]
