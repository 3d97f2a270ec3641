"""The kernel that writes a gradient and its packed sample in e4m3: bit for bit the specification."""

import pytest
import torch
from torch import Tensor

from semisparse.errors import ConfigError, ShapeError, TensorError
from semisparse.formats.layout import SM90_8BIT, MetadataLayout
from semisparse.kernels import amax, bias, sample_pack8
from semisparse.kernels.prune_pack import Block
from semisparse.reference import fp8, mvue_fp8, packing
from semisparse.testing import assert_as_good_as_torch, assert_bit_equal, small_integers
from tests.kernels.test_sample_pack import gradient_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OTHER = MetadataLayout((32, 1, 0, 33, 2, 34, 3, 4))
UNTOUCHED = 77
# numpy, behind Triton's interpreter, warns of Inf - Inf and of overflow in groups that are not finite.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")


def finite(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return gradient_of(rows, columns, dtype).nan_to_num(0.0, 3.0, -3.0)


def maxima(gradient: Tensor) -> Tensor:
    partials = torch.empty(amax.programs_for(gradient), dtype=torch.int32, device=DEVICE)
    amax.launch(gradient, partials)
    return partials


def run(gradient: Tensor, seed: int | None = 3, layout: MetadataLayout = SM90_8BIT, block: Block | None = None):
    """What the kernel writes: dy in e4m3 (bytes), the packed bytes that count, the sums, and both scales."""
    (rows, columns), padded = gradient.shape, -(-gradient.shape[0] // 32) * 32
    block = block or sample_pack8.BLOCK
    size = layout.buffer_bytes(columns, padded, itemsize=1)
    packed = torch.full((size + 32,), UNTOUCHED, dtype=torch.uint8, device=DEVICE)
    rows8 = torch.full((padded, columns), UNTOUCHED, dtype=torch.uint8, device=DEVICE)
    sums = torch.full((sample_pack8.sum_rows(rows, block), columns), torch.nan, device=DEVICE)
    scales = torch.zeros((), device=DEVICE), torch.zeros((), device=DEVICE)
    key = None if seed is None else torch.tensor(seed, device=DEVICE)
    sample_pack8.launch(gradient, key, maxima(gradient), rows8, packed, sums, scales, layout=layout, block=block)
    assert (packed[size:] == UNTOUCHED).all()
    return rows8, packed[:size], sums, *scales


def expect(gradient: Tensor, seed: int, found: tuple[Tensor, ...], layout: MetadataLayout = SM90_8BIT) -> None:
    """What run gives is the specification's, byte for byte."""
    rows8, packed, _, scale, scale_sample = found
    multiplier = fp8.multiplier_for(fp8.largest_magnitude(gradient))
    wanted = fp8.quantise(gradient, multiplier).view(torch.uint8)
    missing = -gradient.shape[0] % 32
    assert torch.equal(rows8, torch.nn.functional.pad(wanted, (0, 0, 0, missing)))
    drawn = mvue_fp8.sample(torch.nn.functional.pad(gradient, (0, 0, 0, missing)), seed)
    assert torch.equal(packed, layout.encode(packing.pack(drawn.codes.mT.contiguous(), drawn.kept.mT.contiguous())))
    assert_bit_equal(scale, 1 / multiplier)
    assert_bit_equal(scale_sample, drawn.scale)


@pytest.mark.parametrize(
    ("shape", "dtype", "seed"),
    [
        ((1, 32), torch.bfloat16, 2**63 - 1),
        ((50, 96), torch.float32, -123456789),
        ((50, 96), torch.float16, -1),
        ((50, 96), torch.bfloat16, -(2**40)),
        ((64, 256), torch.bfloat16, None),
        ((72, 288), torch.bfloat16, 3),
    ],
    ids=str,
)
def test_it_writes_the_gradient_and_the_sample_of_the_specification(shape, dtype, seed):
    gradient = finite(*shape, dtype)
    expect(gradient, seed or 0, run(gradient, seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_finite_makes_all_that_is_kept_nan(dtype):
    gradient = gradient_of(50, 64, dtype)
    found = run(gradient)
    assert found[3].isnan()
    assert found[4].isnan()
    expect(gradient, 3, found)


def test_another_layout():
    gradient = finite(40, 64, torch.bfloat16)
    expect(gradient, 3, run(gradient, layout=OTHER), OTHER)


@pytest.mark.parametrize("size", [3e38, 1e-40, 0.0])
def test_sizes_at_the_ends_of_fp32(size):
    gradient = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)).clamp(-1, 1).to(DEVICE) * size
    gradient[:4, :4] = size
    expect(gradient, 3, run(gradient))


def test_another_block_writes_the_same():
    gradient = finite(112, 160, torch.bfloat16)
    expect(gradient, 3, run(gradient, block=Block(32, 16, 4)))


def test_the_sums_are_those_of_the_columns():
    whole = small_integers((72, 96), seed=1, dtype=torch.float32).to(DEVICE)
    real = torch.randn(72, 96, generator=torch.Generator().manual_seed(1)).bfloat16().to(DEVICE)
    results = []
    for gradient in (whole, real):
        results.append(torch.empty(96, dtype=gradient.dtype, device=DEVICE))
        bias.launch_sum(run(gradient)[2], results[-1])
    assert_bit_equal(results[0], whole.sum(0))
    assert_as_good_as_torch(results[1], real.sum(0), real.double().sum(0))


def test_what_is_not_asked_for_is_left_out_and_rows_apart_are_read_where_they_lie():
    gradient = finite(40, 128, torch.bfloat16)[:, 32:96]
    scales = torch.zeros((), device=DEVICE), torch.zeros((), device=DEVICE)
    packed = torch.zeros(SM90_8BIT.buffer_bytes(64, 64, itemsize=1), dtype=torch.uint8, device=DEVICE)
    key = torch.tensor(3, device=DEVICE)
    sample_pack8.launch(gradient, key, maxima(gradient), None, packed, None, scales, layout=SM90_8BIT)
    wanted = run(gradient)
    expect(gradient, 3, wanted)
    assert torch.equal(packed, wanted[1])
    assert_bit_equal(torch.stack(scales), torch.stack(wanted[3:]))


def test_bad_arguments_are_named():
    gradient = torch.zeros(32, 64, dtype=torch.bfloat16, device=DEVICE)
    packed = torch.zeros(SM90_8BIT.buffer_bytes(64, 32, itemsize=1), dtype=torch.uint8, device=DEVICE)
    rows8 = torch.zeros(32, 64, dtype=torch.uint8, device=DEVICE)
    one = torch.zeros((), device=DEVICE)

    def launch(matrix=gradient, seed=None, rows=rows8, to=packed, sums=None, scales=(one, one), **options):
        largest = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        sample_pack8.launch(matrix, seed, largest, rows, to, sums, scales, layout=SM90_8BIT, **options)

    with pytest.raises(TensorError, match=r"matrix is torch\.float64"):
        launch(gradient.double())
    with pytest.raises(ShapeError, match="grad_output is 32 x 48; columns must be a multiple of 32"):
        launch(gradient[:, :48].contiguous())
    with pytest.raises(ShapeError, match="packed has 10 bytes"):
        launch(to=packed[:10])
    with pytest.raises(ShapeError, match=r"rows8 is torch\.uint8 \(16, 64\)"):
        launch(rows=rows8[:16])
    with pytest.raises(TensorError, match=r"seed is torch\.int32"):
        launch(seed=torch.zeros((), dtype=torch.int32, device=DEVICE))
    with pytest.raises(TensorError, match="scale of the sample is"):
        launch(scales=(one, one.double()))
    with pytest.raises(ShapeError, match="sums has shape"):
        launch(sums=torch.zeros(9, 64, device=DEVICE))
    with pytest.raises(ConfigError, match="whole metadata blocks"):
        launch(block=Block(8, 8))
