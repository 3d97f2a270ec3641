"""The sample of "mvue" in e4m3: that of 16 bits, scaled by a power of two and rounded without bias."""

import pytest
import torch
from torch import Tensor

from semisparse.errors import ShapeError, TensorError
from semisparse.reference import fp8, mvue, mvue_fp8
from semisparse.sampling import ROUNDING_BITS
from tests.reference.test_mvue import GROUPS

DRAWS = 60_000
ERRORS = 4
"""Standard errors that a mean of many draws may be off."""

EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def gradient_of(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    made = torch.randn(rows, columns, generator=generator)
    return (made * torch.rand(rows, columns, generator=generator).mul(8).exp2()).to(dtype)


def decoded(drawn: mvue_fp8.QuantisedSample) -> Tensor:
    return fp8.dequantise(drawn.codes, drawn.scale).double()


def neighbours(values: Tensor) -> tuple[Tensor, Tensor]:
    """The e4m3 numbers (fp64) next to values of at most 448, below and above in magnitude, by search."""
    numbers = fp8.decode(torch.arange(0x7F, dtype=torch.uint8)).double()
    size = values.double().abs().contiguous()
    above = torch.searchsorted(numbers, size)
    below = torch.where(numbers[above] == size, above, above - 1)
    return values.sign() * numbers[below], values.sign() * numbers[above]


@EACH_DTYPE
def test_it_keeps_what_the_sample_in_16_bits_keeps(dtype: torch.dtype) -> None:
    gradient = gradient_of(203, 32, dtype)
    drawn = mvue_fp8.sample(gradient, -5)
    assert torch.equal(drawn.kept, mvue.sample(gradient, -5).kept)
    assert torch.equal(drawn.kept.view(-1, 4, 32).sum(1), torch.full((51, 32), 2))
    assert not drawn.codes[~drawn.kept[:203]].any()
    assert drawn.scale == 2 / fp8.multiplier_for(fp8.largest_magnitude(gradient))


@EACH_DTYPE
def test_a_kept_value_becomes_one_of_its_neighbours(dtype: torch.dtype) -> None:
    gradient = gradient_of(400, 32, dtype)
    drawn = mvue_fp8.sample(gradient, 5)
    words = mvue.random_words(gradient, 5)
    _, _, scaled = mvue.choose(gradient.float().view(-1, 4, 32), mvue.as_uniforms(words))
    values = scaled.view(400, 32)[drawn.kept] / drawn.scale
    below, above = neighbours(values)
    found = fp8.decode(drawn.codes[drawn.kept]).double()
    assert ((found == below) | (found == above)).all()
    assert (found != below).any()
    assert (found != above).any()


@pytest.mark.parametrize("name", GROUPS)
def test_the_mean_of_many_draws_is_the_gradient_rounding_included(name: str) -> None:
    """And the variance is the closed form of the sample before rounding, plus that of rounding."""
    group = torch.tensor(GROUPS[name])
    gradient = group.repeat(DRAWS // 4)[:, None].repeat(1, 4)  # every position draws anew
    drawn = mvue_fp8.sample(gradient, 7)
    found = decoded(drawn).view(-1, 4, 4).transpose(1, 2).reshape(-1, 4)
    deviation = found - group.double()
    # A mean is off by the resolution of u, and by half a step of the random numbers of the rounding.
    largest = found.abs().amax(0)
    step = (largest * 2.0**-3).maximum(drawn.scale * 2.0**-9)
    resolution = 2.0**-23 * largest + 2.0 ** -(ROUNDING_BITS + 1) * step
    assert (deviation.mean(0).abs() <= ERRORS * deviation.std(0) / DRAWS**0.5 + resolution).all()
    chance = mvue.probabilities(group[:, None])[:, 0]
    kept = torch.where(chance > 0, group.double() / chance.clamp(min=1e-300), 0) / drawn.scale
    below, above = neighbours(kept)
    rounding = chance * (kept - below).abs() * (above - kept).abs() * drawn.scale.double() ** 2
    wanted = mvue.variance(group[:, None])[:, 0] + rounding
    error = deviation.square().std(0) / DRAWS**0.5
    assert ((deviation.square().mean(0) - wanted).abs() <= ERRORS * error + 2 * resolution * largest).all()


def test_four_equal_entries_become_twice_as_large_and_stay_in_range() -> None:
    for size in (1.75, 1.7499, 3e-30, 448.0, 449.0):
        gradient = torch.full((400, 8), size)
        drawn = mvue_fp8.sample(gradient, 1)
        assert ((drawn.codes & 0x7F) != fp8.NAN).all()
        values = decoded(drawn)[drawn.kept]
        assert ((values / (2 * size) - 1).abs() <= 2.0**-3).all()
    exact = decoded(mvue_fp8.sample(torch.full((400, 8), 1.75), 1))
    assert exact.unique().tolist() == [0.0, 3.5]


@EACH_DTYPE
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_an_entry_that_is_not_finite_makes_the_scale_nan(dtype: torch.dtype, bad: str) -> None:
    gradient = gradient_of(16, 8, dtype)
    gradient[5, 3] = float(bad)
    drawn = mvue_fp8.sample(gradient, 9)
    assert drawn.scale.isnan()
    assert (drawn.codes[drawn.kept] == fp8.NAN).all()
    assert torch.equal(drawn.kept, mvue.sample(gradient, 9).kept)


def test_a_sum_beyond_the_largest_number_is_nan_in_its_group_alone() -> None:
    gradient = torch.ones(8, 4)
    gradient[:4] = 3e38
    drawn = mvue_fp8.sample(gradient, 0)
    assert (drawn.codes[:4][drawn.kept[:4]] == fp8.NAN).all()
    assert fp8.decode(drawn.codes[4:]).isfinite().all()


def test_all_random_numbers_round_as_often_up_as_the_fraction_says() -> None:
    count = 1 << ROUNDING_BITS
    numbers = fp8.decode(torch.arange(0x7E, dtype=torch.uint8)).double()
    upper = fp8.decode(torch.arange(1, 0x7F, dtype=torch.uint8)).double()
    for eighths in (0, 1, 3, 4, 7):
        values = (numbers + (upper - numbers) * eighths / 8).float()
        for sign in (1, -1):
            every = (sign * values)[:, None].expand(-1, count).contiguous()
            random = torch.arange(count).expand(len(values), -1)
            mean = fp8.decode(fp8.encode_at_random(every, random, ROUNDING_BITS)).double().mean(1)
            torch.testing.assert_close(mean, sign * values.double(), rtol=0, atol=0)


def test_the_ends_of_the_range_are_rounded_into_it() -> None:
    values = torch.tensor([0.0, -0.0, 448.0, -448.1, 1e30, 2.0**-6 * (1 - 2.0**-24), 1e-45])
    for random in (0, 255, 511):
        found = fp8.encode_at_random(values, torch.full((7,), random), ROUNDING_BITS)
        assert found.tolist() == [0, 0x80, 0x7E, 0xFE, 0x7E, 8, 0]


def test_what_has_no_groups_or_no_such_dtype_is_refused() -> None:
    with pytest.raises(ShapeError, match="multiple of 4"):
        mvue_fp8.sample(torch.zeros(4, 6), 0)
    with pytest.raises(TensorError, match=r"float64; fp8 takes"):
        mvue_fp8.sample(torch.zeros(4, 4, dtype=torch.float64), 0)
