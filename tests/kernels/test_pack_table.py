"""What can be part of a launch of many matrices, what is refused, and the table of a launch."""

import pytest
import torch

from semisparse import ops
from semisparse.errors import ConfigError, TensorError
from semisparse.formats.layout import FP8, SM90_16BIT
from semisparse.kernels.pack_table import ENTRY, Matrix, check_members, takes, write_table
from semisparse.masks import MASKS
from tests.kernels.test_prune_pack import buffers

BF16 = torch.bfloat16
MASK = MASKS["transposable"]


def matrix_of(rows: int = 48, columns: int = 64, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.zeros(rows, columns, dtype=dtype)


def member(matrix: torch.Tensor | None = None, **others: torch.Tensor | None) -> Matrix:
    matrix = matrix_of() if matrix is None else matrix
    packed, packed_t = (buffer.cpu() for buffer in buffers(*matrix.shape))
    return Matrix(matrix, packed, packed_t)._replace(**others)


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same content, one element off an aligned address."""
    room = tensor.new_empty(tensor.numel() + 1)
    room[1:] = tensor.flatten()
    return room[1:].view(tensor.shape)


NOT_TAKEN = {
    "mask": lambda: (member(), BF16, MASKS["greedy"]),
    "packed dtype": lambda: (member(), torch.float32, MASK),
    "dtype": lambda: (member(matrix_of().double()), BF16, MASK),
    "column stride": lambda: (member(matrix_of(64, 64).mT), BF16, MASK),
    "row stride": lambda: (member(torch.zeros(48, 68, dtype=BF16)[:, :64]), BF16, MASK),
    "start of the matrix": lambda: (member(torch.zeros(48, 72, dtype=BF16)[:, 1:65]), BF16, MASK),
    "rows": lambda: (member(matrix_of(40)), BF16, MASK),
    "columns": lambda: (member(matrix_of(48, 72)), BF16, MASK),
    "no rows": lambda: (member(matrix_of(0)), BF16, MASK),
    "start of packed": lambda: (member(packed=shifted(buffers(48, 64)[0].cpu())), BF16, MASK),
    "start of packed_t": lambda: (member(packed_t=shifted(buffers(48, 64)[1].cpu())), BF16, MASK),
    "rows in e4m3": lambda: (member(), FP8, MASK),
    "start of codes": lambda: (member(codes=shifted(torch.zeros(12, 16, dtype=torch.int16))), BF16, MASK),
}


@pytest.mark.parametrize("case", NOT_TAKEN)
def test_what_a_launch_cannot_take(case: str) -> None:
    assert not takes(*NOT_TAKEN[case]())


def test_what_a_launch_takes() -> None:
    assert takes(member(), BF16, MASK)
    assert takes(member(packed_t=None), torch.float16, MASKS["row"])
    assert takes(member(torch.zeros(48, 256, dtype=BF16)[:, 32:96]), BF16, MASK)
    assert takes(member(codes=torch.zeros(12, 16, dtype=torch.int16)), BF16, MASK)
    assert takes(member(matrix_of(64, 96), scale=torch.ones(())), FP8, MASK)


REFUSED = {
    "packed": (TensorError, "packed is not aligned to 16", lambda: [member(packed=shifted(buffers(48, 64)[0].cpu()))]),
    "codes": (
        TensorError,
        "codes is not aligned to 16",
        lambda: [member(codes=shifted(torch.zeros(12, 16, dtype=torch.int16)))],
    ),
    "device": (TensorError, "packed_t is on meta", lambda: [member(), member(packed_t=buffers(48, 64)[1].to("meta"))]),
    "dtype": (TensorError, r"matrix is torch\.float16", lambda: [member(), member(matrix_of().half())]),
    "one way": (TensorError, "packed_t is given for some", lambda: [member(), member(packed_t=None)]),
    "some codes": (
        TensorError,
        "codes is given for some",
        lambda: [member(), member(codes=torch.zeros(12, 16, dtype=torch.int16))],
    ),
    "a scale": (ConfigError, "takes no scale", lambda: [member(), member(scale=torch.ones(()))]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_members_that_do_not_fit_are_refused_by_name(case: str) -> None:
    error, message, made = REFUSED[case]
    with pytest.raises(error, match=message):
        check_members(made(), BF16, SM90_16BIT, MASK)


def test_each_member_must_have_its_scale() -> None:
    first = member(packed_t=None, scale=torch.ones(()))
    with pytest.raises(ConfigError, match="needs a scale"):
        check_members([first, member(packed_t=None)], BF16, SM90_16BIT, MASKS["soft"])


def test_an_entry_leads_to_its_tensors_and_each_program_to_its_entry() -> None:
    codes = ops.tile_codes(torch.randn(48, 64), "transposable")
    wide = torch.zeros(48, 256, dtype=BF16)
    members = [member(matrix_of(64, 128), codes=None), member(wide[:, 32:96], packed_t=None, codes=codes)]
    table, member_of, whole = write_table(members, 64, 64)
    assert not whole
    assert member_of.tolist() == [0, 0, 1]
    assert table.shape == (2, ENTRY)
    for one, entry in zip(members, table, strict=True):
        tensors = (one.matrix, one.codes, one.scale, one.packed, one.packed_t)
        for place, tensor, unit in zip(entry.tolist(), tensors, (16, 16, 4, 16, 16), strict=False):
            if tensor is not None:
                assert entry.data_ptr() + place * unit == tensor.data_ptr()
    assert table[:, 5:10].tolist() == [[64, 4, 8, 16, 0], [48, 3, 4, 32, 2]]
    assert write_table(members[:1], 64, 64)[2]
