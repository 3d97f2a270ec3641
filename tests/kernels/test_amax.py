"""The kernels of the largest magnitude against the specification, in Triton's interpreter or on a GPU."""

import pytest
import torch
from torch import Tensor

from semisparse.errors import ShapeError, TensorError
from semisparse.kernels import amax, amax_many
from semisparse.reference import fp8
from semisparse.testing import assert_bit_equal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# One row, edges, whole blocks, rows of more than one block.
SHAPES = [(1, 32), (13, 16), (50, 352), (64, 512), (9, 1040)]


def random(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def largest(matrix: Tensor) -> Tensor:
    """By the kernel, as fp32."""
    partials = torch.empty(amax.programs_for(matrix), dtype=torch.int32, device=DEVICE)
    amax.launch(matrix, partials)
    return partials.max().view(torch.float32)


def scale(matrix: Tensor) -> Tensor:
    """By the kernels."""
    partials = torch.empty(amax.programs_for(matrix), dtype=torch.int32, device=DEVICE)
    amax.launch(matrix, partials)
    found = torch.empty((), device=DEVICE)
    amax.launch_scale(partials, found)
    return found


def specified_scale(matrix: Tensor) -> Tensor:
    return 1 / fp8.multiplier_for(fp8.largest_magnitude(matrix))


@EACH_DTYPE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_specification(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = random(shape, dtype)
    assert_bit_equal(largest(matrix), fp8.largest_magnitude(matrix))
    assert_bit_equal(scale(matrix), specified_scale(matrix))


@pytest.mark.parametrize("programs", [1, 3])
def test_a_program_takes_as_many_blocks_as_there_are(monkeypatch: pytest.MonkeyPatch, programs: int) -> None:
    monkeypatch.setattr(amax, "MOST_PROGRAMS", programs)
    amax._prepare.cache_clear()
    matrix = random((83, 1040), torch.bfloat16)  # 22 blocks
    for place in ((0, 0), (40, 520), (82, 1039)):
        matrix[place] = 100 + place[0]
        assert amax.programs_for(matrix) == programs
        assert_bit_equal(largest(matrix), fp8.largest_magnitude(matrix))
    amax._prepare.cache_clear()


@EACH_DTYPE
@pytest.mark.parametrize("value", [float("nan"), -float("inf"), -65504.0, 6e-8, -0.0])
def test_every_place_counts(dtype: torch.dtype, value: float) -> None:
    for place in ((0, 0), (0, 1), (12, 46), (12, 47), (7, 31)):
        matrix = torch.zeros(13, 48, dtype=dtype, device=DEVICE)
        matrix[place] = value
        assert_bit_equal(largest(matrix), fp8.largest_magnitude(matrix))
        assert_bit_equal(scale(matrix), specified_scale(matrix))


@EACH_DTYPE
def test_nan_is_above_inf_and_inf_above_numbers(dtype: torch.dtype) -> None:
    matrix = random((9, 64), dtype)
    matrix[3, 3] = -float("inf")
    assert largest(matrix) == float("inf")
    matrix[8, 63] = float("nan")
    assert largest(matrix).isnan()


@EACH_DTYPE
def test_what_lies_between_rows_is_not_read(dtype: torch.dtype) -> None:
    wide = torch.full((13, 96), float("nan"), dtype=dtype, device=DEVICE)
    matrix = wide[:, 32:64]
    matrix.copy_(random((13, 32), dtype))
    assert amax.is_readable(matrix)
    assert_bit_equal(largest(matrix), fp8.largest_magnitude(matrix))


def test_other_strides_are_copied() -> None:
    matrix = random((32, 48), torch.bfloat16)
    assert amax.readable(matrix) is matrix and amax.readable(matrix[::3]).data_ptr() == matrix.data_ptr()
    for other in (matrix.mT, matrix[:, 1:33], matrix[:, ::3], random((32, 49), torch.bfloat16)[:, :48]):
        with pytest.raises(TensorError, match="multiples of 16 bytes"):
            largest(other)
        assert_bit_equal(amax.readable(other), other)
        assert_bit_equal(largest(amax.readable(other)), fp8.largest_magnitude(other))


def test_bad_arguments_are_named() -> None:
    words = torch.empty(1, dtype=torch.int32)
    for shape in ((4, 24), (0, 16), (4, 0)):
        with pytest.raises(ShapeError, match="K a multiple of 16"):
            amax.launch(torch.zeros(shape), words)
    with pytest.raises(TensorError, match=r"torch\.float64"):
        amax.launch(torch.zeros(4, 16, dtype=torch.float64), words)
    with pytest.raises(ShapeError, match=r"partials has shape \(2,\)"):
        amax.launch(torch.zeros(4, 16), torch.empty(2, dtype=torch.int32))
    with pytest.raises(TensorError, match="partials is"):
        amax.launch(torch.zeros(4, 16), torch.empty(1))
    with pytest.raises(TensorError, match="scale is"):
        amax.launch_scale(words, torch.empty(2))


# ---- many matrices


@EACH_DTYPE
def test_many_matrices_get_the_scales_that_each_gets_alone(dtype: torch.dtype) -> None:
    matrices = [random(shape, dtype) * 10**power for power, shape in enumerate(SHAPES)]
    matrices.append(random((40, 96), dtype)[::2, 32:64])
    matrices.append(torch.zeros(16, 32, dtype=dtype, device=DEVICE))
    matrices.append(torch.full((3, 16), float("inf"), dtype=dtype, device=DEVICE))
    scales = torch.full((len(matrices),), -1.0, device=DEVICE)
    batch = amax_many.Batch(matrices, scales)
    for _ in range(2):
        batch.launch()
        assert_bit_equal(scales, torch.stack([specified_scale(matrix) for matrix in matrices]))
        matrices[0] *= 1000
        matrices[5][2, 5] = 4000


def test_matrices_that_do_not_belong_together_are_refused() -> None:
    matrix = random((4, 32), torch.bfloat16)
    with pytest.raises(TensorError, match="use a batch for each"):
        amax_many.Batch([matrix, matrix.half()], torch.empty(2))
    with pytest.raises(TensorError, match="multiples of 16 bytes"):
        amax_many.Batch([matrix, random((32, 16), torch.bfloat16).mT], torch.empty(2))
    with pytest.raises(ShapeError, match=r"scales has shape \(1,\)"):
        amax_many.Batch([matrix, matrix], torch.empty(1))
    with pytest.raises(TensorError, match="scales is"):
        amax_many.Batch([matrix], torch.empty(1, dtype=torch.float64))
