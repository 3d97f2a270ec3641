"""The unpack kernel gives back the pruned matrix, for every packer."""

import pytest
import torch

from semisparse.errors import ShapeError, TensorError
from semisparse.formats.layout import SM90_16BIT, MetadataLayout
from semisparse.kernels import unpack
from semisparse.reference import masks, packing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = {"sm90": SM90_16BIT, "other": MetadataLayout((32, 1, 0, 33, 2, 34, 3, 4))}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(16, 16), (48, 80), (80, 336), (64, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_unpack_is_exact(dtype, shape, layout):
    matrix = torch.randn(shape, device=DEVICE).to(dtype)
    matrix[0, :3] = torch.tensor([float("inf"), float("nan"), -0.0], device=DEVICE)
    packed = packing.pack(matrix, masks.row(matrix))
    out = torch.full(shape, 7.0, dtype=dtype, device=DEVICE)
    unpack.launch(LAYOUTS[layout].encode(packed), out, layout=LAYOUTS[layout])
    assert torch.equal(out.view(torch.int16), packing.unpack(packed).view(torch.int16))


def test_a_group_that_keeps_fewer_than_two_is_read_too():
    matrix = torch.zeros(16, 64, dtype=torch.float16, device=DEVICE)
    matrix[:, 3::8] = 5.0
    out = torch.empty_like(matrix)
    unpack.launch(SM90_16BIT.encode(packing.pack(matrix, matrix != 0)), out, layout=SM90_16BIT)
    assert torch.equal(out, matrix)


def test_bad_arguments_are_named():
    out = torch.zeros(16, 64, dtype=torch.float16, device=DEVICE)
    packed = SM90_16BIT.encode(packing.pack(out, out != 0))
    with pytest.raises(ShapeError, match="needs"):
        unpack.launch(packed[:-1], out, layout=SM90_16BIT)
    with pytest.raises(TensorError, match=r"torch\.float32"):
        unpack.launch(packed, out.float(), layout=SM90_16BIT)
    with pytest.raises(ShapeError, match="out is 16 x 24; its columns must be a multiple of 16"):
        unpack.launch(packed, out[:, :24].contiguous(), layout=SM90_16BIT)


def test_a_matrix_of_one_row_is_unpacked():
    matrix = torch.randn(1, 64, device=DEVICE).half()
    packed, out = packing.pack(matrix, masks.row(matrix)), torch.empty_like(matrix)
    unpack.launch(SM90_16BIT.encode(packed), out, layout=SM90_16BIT)
    assert torch.equal(out, packing.unpack(packed))
