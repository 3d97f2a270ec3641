"""The kernel that samples a gradient and packs the sample: bit for bit the specification."""

import pytest
import torch
from torch import Tensor

from semisparse.errors import ConfigError, ShapeError, TensorError
from semisparse.formats.layout import SM90_16BIT, MetadataLayout, packed_bytes
from semisparse.kernels import bias, sample_pack
from semisparse.kernels.prune_pack import Block
from semisparse.reference import mvue, packing
from semisparse.testing import assert_as_good_as_torch, assert_bit_equal, small_integers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = {"sm90": SM90_16BIT, "other": MetadataLayout((32, 1, 0, 33, 2, 34, 3, 4))}
SEEDS = [0, 123456789, -1, 2**63 - 1, -(2**40)]
# numpy, behind Triton's interpreter, warns of Inf - Inf and of overflow in groups that are not finite.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def gradient_of(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal numbers of very different sizes, with groups of zeros, of one entry, of equal ones, with Inf and NaN."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(rows, columns, generator=generator)
    made *= torch.rand(rows, columns, generator=generator).mul(12).exp2() / 64
    made = torch.where(torch.rand(rows, columns, generator=generator) < 0.1, 0, made)
    if rows >= 8:
        made[:4, 0] = 0
        made[:4, 1] = torch.tensor([0.0, -3.0, 0.0, 0.0])
        made[:4, 2] = 2.5
        made[:4, 3] = torch.tensor([-0.0, 1.0, -0.0, 0.0])
        made[4:8, 4], made[5, 5], made[4:6, 6] = torch.inf, torch.nan, -torch.inf
    return made.to(dtype).to(DEVICE)


def run(gradient: Tensor, seed: int | None, layout: MetadataLayout = SM90_16BIT, block: Block | None = None):
    """What the kernel writes: the packed bytes that count, and the sums."""
    (_rows, columns), padded = gradient.shape, -(-gradient.shape[0] // 16) * 16
    block = block or sample_pack.BLOCK
    packed = torch.full((packed_bytes(columns, padded),), 77, dtype=torch.uint8, device=DEVICE)
    sums = torch.full((sample_pack.sum_rows(padded, block), columns), torch.nan, device=DEVICE)
    key = None if seed is None else torch.tensor(seed, device=DEVICE)
    sample_pack.launch(gradient, key, packed, sums, layout=layout, rows_padded=padded, block=block)
    assert (packed[layout.buffer_bytes(columns, padded) :] == 77).all()
    return packed[: layout.buffer_bytes(columns, padded)], sums


def expected(gradient: Tensor, seed: int, layout: MetadataLayout = SM90_16BIT) -> Tensor:
    whole = torch.nn.functional.pad(gradient, (0, 0, 0, -gradient.shape[0] % 16))
    drawn = mvue.sample(whole, seed)
    return layout.encode(packing.pack(drawn.matrix.mT.contiguous(), drawn.kept.mT.contiguous()))


def without_payloads(packed: Tensor, gradient: Tensor) -> Tensor:
    """The packed bytes with every NaN of the values the same: its payload differs between devices, as torch's does."""
    columns, padded = gradient.shape[1], -(-gradient.shape[0] // 16) * 16
    size = columns * padded
    values = packed[:size].clone().view(gradient.dtype)
    return torch.cat([values.nan_to_num(7.0, torch.inf, -torch.inf).view(torch.uint8), packed[size:]])


@EACH_DTYPE
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(16, 16), (1, 64), (50, 48), (64, 64), (128, 192), (200, 80)], ids=str)
def test_it_writes_the_sample_of_the_specification(shape, layout, dtype):
    gradient = gradient_of(*shape, dtype)
    packed, _ = run(gradient, -123456789, LAYOUTS[layout])
    wanted = expected(gradient, -123456789, LAYOUTS[layout])
    assert torch.equal(without_payloads(packed, gradient), without_payloads(wanted, gradient))


@EACH_DTYPE
@pytest.mark.parametrize("seed", SEEDS)
def test_every_bit_of_the_seed_counts(seed, dtype):
    gradient = gradient_of(32, 64, dtype)
    packed, _ = run(gradient, seed)
    assert torch.equal(without_payloads(packed, gradient), without_payloads(expected(gradient, seed), gradient))
    if seed == 0:
        assert torch.equal(packed, run(gradient, None)[0])


@pytest.mark.parametrize(
    "block", [Block(16, 16, 8), Block(8, 8, 2, None), Block(32, 8, 4, None), Block(16, 8, 4, None)], ids=str
)
def test_every_block_writes_the_same(block):
    gradient = gradient_of(112, 144, torch.bfloat16)
    packed, sums = run(gradient, 3, block=block)
    assert torch.equal(packed, run(gradient, 3)[0])
    assert torch.equal(sums.isnan().any(0), gradient.isnan().any(0) | (gradient.isinf().sum(0) > 9))


def test_launches_with_and_without_a_seed_or_sums_of_one_size_are_prepared_apart():
    gradient = gradient_of(48, 80, torch.bfloat16)
    prepared = set()
    for key in (None, torch.tensor(3, device=DEVICE)):
        for sums in (None, torch.empty(sample_pack.sum_rows(48), 80, device=DEVICE)):
            packed = torch.full((packed_bytes(80, 48),), 77, dtype=torch.uint8, device=DEVICE)
            prepared.add(sample_pack.launch(gradient, key, packed, sums, layout=SM90_16BIT, rows_padded=48))
            written = packed[: SM90_16BIT.buffer_bytes(80, 48)]
            again = run(gradient, 0 if key is None else 3)[0]
            assert torch.equal(without_payloads(written, gradient), without_payloads(again, gradient))
    assert len(prepared) == 4


@EACH_DTYPE
def test_the_sums_are_those_of_the_columns(dtype):
    whole = small_integers((200, 80), seed=1, dtype=dtype).to(DEVICE)
    real = torch.randn(200, 80, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)
    results = []
    for gradient in (whole, real):
        results.append(torch.empty(80, dtype=dtype, device=DEVICE))
        bias.launch_sum(run(gradient, 3)[1], results[-1])
    assert_bit_equal(results[0], whole.sum(0))
    assert_as_good_as_torch(results[1], real.sum(0), real.double().sum(0))


@pytest.mark.parametrize("view", ["wide rows", "transposed", "misaligned"])
def test_any_strides(view):
    whole = gradient_of(64, 96, torch.bfloat16)
    gradient = {
        "wide rows": whole[:, :48],
        "transposed": whole.mT.contiguous().mT,
        "misaligned": whole.flatten()[1:4097].view(64, 64),
    }[view]
    packed, _ = run(gradient, 3)
    assert torch.equal(packed, run(gradient.contiguous().clone(), 3)[0])


def test_without_a_bias_there_are_no_sums():
    gradient = gradient_of(64, 64, torch.bfloat16)
    packed = torch.zeros(packed_bytes(64, 64), dtype=torch.uint8, device=DEVICE)
    sample_pack.launch(
        gradient, torch.tensor(3, device=DEVICE), packed, None, layout=SM90_16BIT, rows_padded=64
    )  # fmt: skip
    wanted = run(gradient, 3)[0]
    assert torch.equal(packed[: wanted.numel()], wanted)


def test_bad_arguments_are_named():
    gradient = torch.zeros(32, 64, dtype=torch.bfloat16, device=DEVICE)
    packed = torch.zeros(packed_bytes(64, 32), dtype=torch.uint8, device=DEVICE)

    def launch(matrix=gradient, seed=None, to=packed, sums=None, rows=32, **options):
        sample_pack.launch(matrix, seed, to, sums, layout=SM90_16BIT, rows_padded=rows, **options)

    with pytest.raises(TensorError, match=r"grad_output is torch\.float32"):
        launch(gradient.float())
    with pytest.raises(ShapeError, match="grad_output is 32 x 24"):
        launch(gradient[:, :24].contiguous())
    with pytest.raises(ShapeError, match="padded to 24 rows"):
        launch(gradient[:20], rows=24)
    with pytest.raises(ShapeError, match="packed has 10 bytes"):
        launch(to=packed[:10])
    with pytest.raises(TensorError, match=r"seed is torch\.int32"):
        launch(seed=torch.zeros((), dtype=torch.int32, device=DEVICE))
    with pytest.raises(ShapeError, match="sums has shape"):
        launch(sums=torch.zeros(9, 64, device=DEVICE))
    with pytest.raises(ConfigError, match="whole metadata blocks"):
        launch(block=Block(3, 8))
    with pytest.raises(TensorError, match="contiguous"):
        bias.launch_sum(gradient, gradient[0])
    with pytest.raises(ShapeError, match=r"out has shape \(32,\)"):
        bias.launch_sum(gradient.float(), gradient[0, :32])
