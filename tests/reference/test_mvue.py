"""The sample of "mvue": exactly two of four, unbiased, of the smallest variance, and the same numbers each time."""

import itertools

import pytest
import torch
from torch import Tensor

from semisparse.errors import ShapeError, TensorError
from semisparse.reference import mvue
from semisparse.sampling import ADVANCE, layer_seed

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
DRAWS = 100_000
ERRORS = 4
"""Standard errors that a mean of many draws may be off."""

GROUPS = {
    "normal": [0.3, -1.1, 0.7, 0.2],
    "equal": [2.0, 2.0, -2.0, 2.0],
    "one dominates": [0.1, -9.0, 0.3, 0.2],
    "one is exactly the sum of the others": [3.0, 1.0, -1.0, 1.0],
    "two equal, two small": [5.0, 1e-3, -5.0, 1e-3],
    "three": [1.0, 0.0, -2.0, 2.5],
    "two": [0.0, -3.0, 0.0, 0.5],
    "one": [0.0, 0.0, 0.0, -4.0],
    "none": [0.0, -0.0, 0.0, 0.0],
    "wide range": [1e-4, 100.0, -1.0, 1e-2],
}


def draws_of(group: list[float], count: int = DRAWS) -> Tensor:
    """count samples of one group (count x 4, fp64): the group below itself, so that every position draws anew."""
    gradient = torch.tensor(group).repeat(count)[:, None].repeat(1, 4)
    return mvue.sample(gradient, 7).matrix[:, 0].view(count, 4).double()


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter: int, key: int, words: tuple[int, ...]) -> None:
    each = torch.tensor(counter)
    assert tuple(int(word) for word in mvue.philox((each,) * 4, key)) == words
    assert tuple(int(word) for word in mvue.philox((each,) * 4, torch.tensor(key))) == words


@pytest.mark.parametrize("name", GROUPS)
def test_exactly_two_are_kept_and_zeros_stay_zeros(name: str) -> None:
    gradient = torch.tensor(GROUPS[name]).repeat(2000)[:, None].repeat(1, 8)
    drawn = mvue.sample(gradient, 1)
    assert torch.equal(drawn.kept.view(-1, 4, 8).sum(1), torch.full((2000, 8), 2))
    assert not (drawn.matrix != 0)[~drawn.kept].any()
    assert not (drawn.matrix != 0)[gradient == 0].any()
    nonzero = sum(value != 0 for value in GROUPS[name])
    assert torch.equal((drawn.matrix != 0).view(-1, 4, 8).sum(1), torch.full((2000, 8), min(nonzero, 2)))


@pytest.mark.parametrize("name", GROUPS)
def test_the_mean_of_many_draws_is_the_gradient_and_their_variance_the_closed_form(name: str) -> None:
    drawn, group = draws_of(GROUPS[name]), torch.tensor(GROUPS[name])[:, None]
    variance = mvue.variance(group)[:, 0]
    deviation = drawn - group[:, 0].double()
    # A uniform is a multiple of 2^-23: a probability is off by that at most, and a mean by that times what is kept.
    resolution = 2.0**-23 * drawn.abs().amax()
    assert ((deviation.mean(0)).abs() <= ERRORS * (variance / DRAWS).sqrt() + resolution).all()
    squares = deviation.square()
    error = squares.std(0) / DRAWS**0.5
    assert ((squares.mean(0) - variance).abs() <= ERRORS * error + resolution * drawn.abs().amax()).all()


def test_the_closed_form_is_the_smallest_variance_of_any_unbiased_sample() -> None:
    """Against every choice of probabilities on a grid that add up to 2: no other has less variance."""
    generator = torch.Generator().manual_seed(0)
    steps = [step / 20 for step in range(1, 21)]
    feasible = torch.tensor(
        [(*three, 2 - sum(three)) for three in itertools.product(steps, repeat=3) if 0 < 2 - sum(three) <= 1],
        dtype=torch.float64,
    )
    for _ in range(50):
        group = torch.randn(4, 1, generator=generator) * torch.rand(4, 1, generator=generator).exp2().square()
        chances = mvue.probabilities(group)[:, 0]
        torch.testing.assert_close(chances.sum(), torch.tensor(2.0, dtype=torch.float64))
        assert ((chances > 0) & (chances <= 1)).all()
        others = (group[:, 0].double().square() * (1 / feasible - 1)).sum(1)
        assert mvue.variance(group).sum() <= others.min() * (1 + 1e-12)


def test_a_kept_entry_is_the_entry_over_its_probability() -> None:
    gradient = torch.randn(400, 64, generator=torch.Generator().manual_seed(3))
    drawn = mvue.sample(gradient, 5)
    expected = gradient.double() / mvue.probabilities(gradient)
    roundings = 4  # of sums of magnitudes, which cannot cancel
    error = (drawn.matrix[drawn.kept].double() - expected[drawn.kept]).abs() / expected[drawn.kept].abs()
    assert error.max() <= roundings * torch.finfo(torch.float32).eps / 2


@EACH_DTYPE
def test_the_result_is_rounded_once(dtype: torch.dtype) -> None:
    gradient = torch.randn(64, 32, generator=torch.Generator().manual_seed(3)).to(dtype)
    drawn = mvue.sample(gradient, 5)
    assert drawn.matrix.dtype == dtype
    wide = gradient.to(torch.promote_types(dtype, torch.float32))
    groups = wide.view(16, 4, 32)
    _, _, scaled = mvue.choose(groups, mvue.uniforms(gradient, 5).to(wide.dtype))
    assert torch.equal(drawn.matrix, torch.where(drawn.kept, scaled.view(64, 32), 0).to(dtype))


def test_what_is_kept_at_most_doubles_the_largest() -> None:
    drawn = draws_of([2.0, 2.0, -2.0, 2.0], 1000)
    assert drawn.abs().amax() == 4.0


@EACH_DTYPE
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_an_entry_that_is_not_finite_is_always_kept(dtype: torch.dtype, bad: str) -> None:
    gradient = torch.randn(400, 8, generator=torch.Generator().manual_seed(3)).to(dtype)
    gradient[1::4, 3] = float(bad)
    drawn = mvue.sample(gradient, 9)
    assert drawn.kept[1::4, 3].all()
    torch.testing.assert_close(drawn.matrix[1::4, 3], gradient[1::4, 3], equal_nan=True)
    rest = drawn.matrix.clone()
    rest[1::4, 3] = 0
    assert rest.isfinite().all()
    grad_weight = drawn.matrix.double().mT @ torch.ones(400, 4, dtype=torch.float64)
    assert not grad_weight[3].isfinite().any()
    assert grad_weight[[0, 1, 2, 4, 5, 6, 7]].isfinite().all()


@pytest.mark.parametrize("bad", [[0, 1], [1, 3], [0, 1, 2], [0, 1, 2, 3], [2, 3]], ids=str)
def test_of_several_entries_that_are_not_finite_one_is_kept(bad: list[int]) -> None:
    gradient = torch.ones(4, 4)
    gradient[bad] = torch.inf
    drawn = mvue.sample(gradient, 9)
    assert torch.equal(drawn.kept.sum(0), torch.full((4,), 2))
    assert torch.equal(drawn.matrix.isinf().sum(0), torch.full((4,), 2))
    assert drawn.kept[min(bad[0], 2)].all()


def test_a_sum_beyond_the_largest_number_counts_as_infinite() -> None:
    gradient = torch.full((4, 4), 3e38)
    assert mvue.sample(gradient, 0).matrix.isinf().sum(0).eq(2).all()


@EACH_DTYPE
def test_the_smallest_numbers_are_sampled_as_all_others(dtype: torch.dtype) -> None:
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    smallest = torch.ones(1, dtype=whole).view(dtype)
    gradient = smallest.repeat(4000)[:, None].repeat(1, 4)
    drawn = mvue.sample(gradient, 2)
    assert (drawn.matrix == 2 * smallest).sum() == drawn.kept.sum() == 2 * 4000
    assert (drawn.kept.view(-1, 4, 4).sum(1) == 2).all()


def test_any_number_of_tokens_is_completed_by_zeros() -> None:
    gradient = torch.randn(13, 8, generator=torch.Generator().manual_seed(3))
    whole = mvue.sample(torch.cat([gradient, torch.zeros(3, 8)]), 4)
    cut = mvue.sample(gradient, 4)
    assert torch.equal(cut.matrix, whole.matrix[:13])
    assert torch.equal(cut.kept, whole.kept)
    assert mvue.sample(gradient[:0], 4).matrix.shape == (0, 8)


def test_the_same_inputs_draw_the_same_sample_and_any_other_input_another() -> None:
    gradient = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    first = mvue.sample(gradient, 4).kept
    assert torch.equal(first, mvue.sample(gradient, torch.tensor(4)).kept)
    assert torch.equal(first, mvue.sample(gradient.mT.contiguous().mT, 4).kept)
    for other in (mvue.sample(gradient, 5), mvue.sample(gradient, 4 + 2**32)):
        assert 0.2 < (first != other.kept).float().mean() < 0.6
    changed = gradient.clone()
    changed[0, 0] = changed[0, 0].nextafter(torch.tensor(9.0))  # one bit in one tile: all of the tile draws anew
    different = first != mvue.sample(changed, 4).kept
    assert not different[4:].any() and not different[:, 4:].any()
    many = [mvue.uniforms(gradient + torch.tensor(step) * 1e-3, 4)[0, :4] for step in range(50)]
    assert len(torch.stack(many).unique()) == 200


def test_the_smallest_and_the_largest_word_give_uniforms_inside_0_and_1() -> None:
    ends = mvue.as_uniforms(torch.tensor([0, 2**32 - 1]))
    assert ends.tolist() == [2.0**-24, 1 - 2.0**-24]


def test_uniforms_are_uniform_and_independent_of_each_other() -> None:
    drawn = mvue.uniforms(torch.ones(4000, 64), 1)
    assert drawn.min() > 0 and drawn.max() < 1
    counts = torch.histc(drawn, 32, 0, 1).double()
    expected = drawn.numel() / 32
    assert ((counts - expected).square() / expected).sum() < 31 + ERRORS * (2 * 31) ** 0.5
    correlation = torch.corrcoef(drawn.mT)
    off = correlation - torch.eye(64)
    assert off.abs().max() < 5 / 1000**0.5


@pytest.mark.parametrize(
    ("gradient", "error", "message"),
    [
        (torch.zeros(4, 6), ShapeError, "multiple of 4"),
        (torch.zeros(4), ShapeError, "exactly 2 dimensions"),
        (torch.zeros(4, 4, dtype=torch.int32), TensorError, "int32"),
    ],
)
def test_what_has_no_groups_is_refused(gradient: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mvue.sample(gradient, 0)


def test_a_layers_seed_depends_on_all_that_it_is_made_of() -> None:
    first = layer_seed(1, "a.b", 0, 0)
    assert len({first, layer_seed(2, "a.b", 0, 0), layer_seed(1, "a.c", 0, 0), layer_seed(1, "a.b", 1, 0)}) == 4
    advanced = torch.tensor(first)
    for step in range(1, 5):
        advanced += ADVANCE
        assert int(advanced) == layer_seed(1, "a.b", 0, step)


def test_what_is_not_finite_is_kept_for_every_uniform_beside_numbers_of_any_size() -> None:
    group = torch.tensor([0.2451171875, torch.nan, 6.07222318649292e-07, 0.0]).bfloat16().float()
    wide = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0)).mul(30).exp2().bfloat16().float()
    places = torch.arange(20_000) % 4
    wide[torch.arange(20_000), places] = torch.inf
    for k in (0, 1, 2**22, 8388586, 2**23 - 2, 2**23 - 1):
        uniform = torch.full((1, 20_000), (2 * k + 1) * 2.0**-24)
        first, second, _ = mvue.choose(group.view(1, 4, 1), uniform[:, :1])
        assert 1 in (first.item(), second.item())
        first, second, scaled = mvue.choose(wide.mT[None].contiguous(), uniform)
        assert ((first[0] == places) | (second[0] == places)).all()
        assert scaled[0].mT[torch.arange(20_000), places].isinf().all()
