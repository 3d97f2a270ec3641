"""The limits on noise: what correct rounding reaches, and what they find."""

import math

import pytest
import torch

from semisparse.config import SparseConfig
from semisparse.reference import linear as reference
from semisparse.reference import mvue
from tests.trust import noise
from tests.trust.cases import BF16, FP16, Case

PLAIN = Case("2:4", BF16, SparseConfig())
ACTIVATION = Case("2:4 activation", BF16, SparseConfig(weight=None, activation="transposable"))
SAMPLED = Case("2:4 + mvue", BF16, SparseConfig(grad_output="mvue"))
FP8 = Case("fp8 + 2:4", BF16, SparseConfig(precision="fp8"))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("dtype", "reached"), [(BF16, 55.6), (FP16, 73.65)])
def test_correct_rounding_is_above_the_limit_by_what_is_written(dtype: torch.dtype, reached: float) -> None:
    for octave in range(4):
        exact = normal(1 << 18, seed=octave) * 2 ** (octave / 4)
        assert noise.decibels(exact.to(dtype), exact) == pytest.approx(reached, abs=0.1)
        few = exact[: noise.MANY]
        assert noise.decibels(few.to(dtype), few) > noise.ONCE[dtype]
        bias = (normal(1 << 18, seed=9) / 4).to(dtype)
        twice = noise.decibels((exact - bias.double()).to(dtype) + bias, exact)
        assert twice > noise.ONCE[dtype] - noise.AGAIN


def test_what_is_equal_and_what_is_not_finite() -> None:
    exact = normal(8)
    assert noise.decibels(exact, exact) == math.inf
    assert noise.decibels(exact, exact * 0) == -math.inf
    assert math.isnan(noise.decibels(exact * math.nan, exact))


def test_the_worst_of_a_level_stays() -> None:
    lowest = noise.Level("x", 54.0)
    for value in (math.inf, 55.0, 60.0):
        lowest.add(value, "here")
    assert lowest.row("y").passed and lowest.row("y").figure == 55.0 and lowest.count == 3
    lowest.add(53.0, "there")
    assert not lowest.row("y").passed and lowest.faults == ["there: 53.00 dB"]
    most = noise.Level("x", 2.0, "at most")
    for value in (0.1, math.nan, 0.2):
        most.add(value, "here")
    assert not most.row("y").passed and math.isnan(most.figure)


def test_one_wrong_group_of_a_large_result_is_below_the_limit() -> None:
    found = noise.Noise(PLAIN)
    weight, x = normal(64, 1024) / 32, normal(64, 1024, seed=1)
    exact = x @ weight.mT
    found.own_dtype("dx", exact.bfloat16(), exact, None, "right")
    assert all(row.passed for row in found.rows())
    weight[3, 8:12] = weight[3, 8:12].roll(1)
    found.own_dtype("dx", (x @ weight.mT).bfloat16(), exact, None, "wrong")
    assert [row.faults[0].split(":")[0] for row in found.rows() if not row.passed] == ["wrong", "wrong"]


def test_a_result_of_few_values_is_compared_with_correct_rounding_alone() -> None:
    found, exact = noise.Noise(PLAIN), normal(8, 8)
    found.own_dtype("y", exact.bfloat16() * 1.01, exact, None, "wrong")
    assert [row.what for row in found.rows()] == ["2:4: most dB that a result is below correct rounding"]
    assert not any(row.passed for row in found.rows())


def test_a_bias_behind_the_product_has_a_limit_of_its_own() -> None:
    found, exact, bias = noise.Noise(ACTIVATION), normal(64, 64), normal(64, seed=1).bfloat16()
    found.own_dtype("y", exact.bfloat16() + bias, exact + bias.double(), bias, "right")
    assert all(row.passed for row in found.rows())
    assert "2:4 activation: lowest SQNR in dB of y, rounded before and after the bias" in [
        row.what for row in found.rows()
    ]


def test_fp8_is_measured_against_operands_in_16_bits() -> None:
    found, x, dy = noise.Noise(FP8), normal(256, 128).bfloat16(), normal(256, 96, seed=1).bfloat16()
    exact = dy.double().mT @ x.double()
    found.in_fp8(reference.fp8_grad_weight(dy, x, BF16), exact, (dy, x), "right")
    assert found.fp8.count == 1 and not found.fp8.faults
    found.in_fp8(exact * 1.04, exact, (dy, x), "scaled")
    assert found.fp8.faults == ["scaled: 27.96 dB"]
    found.in_fp8(exact[:8] * 2, exact[:8], (dy, x), "small")
    assert found.fp8.count == 2


def test_the_variance_of_a_sample_is_neither_more_nor_less() -> None:
    x, dy = normal(512, 128), normal(512, 96, seed=1)
    exact = dy.mT @ x
    expected = 10 * math.log10(float(dy.square().sum() / mvue.variance(dy).sum()))
    assert expected == pytest.approx(3.24, abs=0.1)
    for drawn, passed in (
        (mvue.sample(dy, 3).matrix, True),
        (torch.where(mvue.sample(dy, 3).kept, dy, 0), False),  # not scaled: less noise, with a bias
        (2 * dy * (torch.rand(512, 96) < 0.5), False),
    ):
        found = noise.Noise(SAMPLED)
        found.sampled(drawn.mT @ x, exact, dy, "here")
        assert all(row.passed for row in found.rows()) is passed, passed
