"""semi_sparse_linear with the masks of recipes, against autograd of F.linear on the weight that they leave."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from semisparse import ops
from semisparse.errors import ConfigError, ShapeError, TensorError
from semisparse.functional import semi_sparse_linear
from semisparse.reference import linear, masks
from semisparse.testing import DTYPES, assert_as_good_as_torch, assert_bit_equal, small_integers
from tests.support import MaskArguments

pytestmark = pytest.mark.usefixtures("poison")

SETTINGS = {
    "greedy": MaskArguments("greedy"),
    "signed_greedy": MaskArguments("signed_greedy"),
    "soft": MaskArguments("soft", scale=torch.tensor(0.5)),
    "codes": MaskArguments("transposable", ops.tile_codes(small_integers((20, 36), seed=9), "transposable")),
}
EVERY_SETTING = pytest.mark.parametrize("setting", SETTINGS)
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)
M, K, N = 13, 36, 20


def pruned_by(setting: str, weight: Tensor) -> Tensor:
    """The weight as the setting leaves it, by the reference."""
    mask, codes, scale = SETTINGS[setting]
    if scale is not None:
        return linear.soft_threshold(weight, scale)
    if codes is not None:
        return linear.prune(weight, masks.from_codes(codes))
    return linear.prune(weight, masks.greedy(weight, signed=mask == "signed_greedy"))


def results(function, tensors: list[Tensor], grad_output: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]


def ours(setting: str, tensors: list[Tensor], grad_output: Tensor) -> list[Tensor]:
    arguments = SETTINGS[setting]._asdict()
    return results(lambda *leaves: semi_sparse_linear(*leaves, **arguments), tensors, grad_output)


def dense(setting: str, tensors: list[Tensor], grad_output: Tensor) -> list[Tensor]:
    """Straight-through: the gradient of the pruned weight is that of the dense one."""
    x, weight, *bias = tensors
    return results(F.linear, [x, pruned_by(setting, weight), *bias], grad_output)


@EVERY_SETTING
@ALL_DTYPES
@pytest.mark.parametrize("with_bias", [True, False])
def test_whole_numbers_give_the_same_bits(setting: str, dtype: torch.dtype, with_bias: bool) -> None:
    shapes = [(M, K), (N, K), *([(N,)] if with_bias else [])]
    tensors = [small_integers(shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]
    grad_output = small_integers((M, N), seed=4, dtype=dtype)
    exact = dense(setting, [tensor.double() for tensor in tensors], grad_output.double())
    for result, expected in zip(ours(setting, tensors, grad_output), exact, strict=True):
        assert_bit_equal(result + 0, expected.to(dtype) + 0)  # + 0: the sign of a zero sum is not specified


@EVERY_SETTING
@ALL_DTYPES
def test_random_numbers_err_no_more_than_twice_as_much_as_torch(setting: str, dtype: torch.dtype) -> None:
    tensors = [torch.randn(shape).to(dtype) for shape in [(M, K), (N, K), (N,)]]
    grad_output = torch.randn(M, N).to(dtype)
    same = dense(setting, tensors, grad_output)
    exact = dense(setting, [tensor.double() for tensor in tensors], grad_output.double())
    for triple in zip(ours(setting, tensors, grad_output), same, exact, strict=True):
        assert_as_good_as_torch(*triple)


@EVERY_SETTING
def test_the_weight_gradient_reaches_what_is_pruned(setting: str) -> None:
    x, weight = small_integers((M, K), seed=1), torch.randn(N, K)
    grad_output = small_integers((M, N), seed=2)
    grad_weight = ours(setting, [x, weight], grad_output)[2]
    assert_bit_equal(grad_weight + 0, grad_output.mT @ x + 0)
    assert grad_weight[pruned_by(setting, weight) == 0].any()


def test_codes_do_not_follow_the_weight() -> None:
    arguments = SETTINGS["codes"]._asdict()
    kept = masks.from_codes(arguments["codes"])
    for seed in range(3):
        weight = small_integers((N, K), seed=seed, limit=9)
        y = semi_sparse_linear(torch.eye(K), weight, **arguments)
        assert_bit_equal(y.mT + 0, torch.where(kept, weight, 0) + 0)
        assert not torch.equal(masks.transposable(weight), kept)


@pytest.mark.parametrize("setting", ["codes", "soft"])
def test_what_is_held_is_read_at_every_call(setting: str) -> None:
    held, weight = SETTINGS[setting].held, torch.randn(N, K)
    call = partial(semi_sparse_linear, torch.eye(K), weight, mask=SETTINGS[setting].mask, **held)
    before = call()
    if held["codes"] is not None:
        held["codes"].copy_(ops.tile_codes(weight, "transposable"))
    else:
        held["scale"].fill_(2.0)
    after = call()
    expected = (
        linear.soft_threshold(weight, 2.0) if setting == "soft" else linear.prune(weight, masks.transposable(weight))
    )
    assert_bit_equal(after.mT + 0, expected + 0)
    assert not torch.equal(before, after)


@EVERY_SETTING
def test_fp32_weights_under_autocast_are_rounded_once(setting: str) -> None:
    x, weight = torch.eye(K), torch.randn(N, K, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = semi_sparse_linear(x, weight, **SETTINGS[setting]._asdict())
    assert_bit_equal(y.detach().mT + 0, pruned_by(setting, weight.detach()).bfloat16() + 0)
    y.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32


def test_what_does_not_fit_is_refused_by_name() -> None:
    x, weight, codes = torch.ones(4, K), torch.ones(N, K), SETTINGS["codes"].codes
    with pytest.raises(ConfigError, match=r"mask='soft' needs its scale: start its recipe \(semisparse\.recipes\)"):
        semi_sparse_linear(x, weight, mask="soft")
    with pytest.raises(TensorError, match=r"codes is torch\.int32"):
        semi_sparse_linear(x, weight, codes=codes.int())
    with pytest.raises(ShapeError, match=r"codes has shape \(4, 9\); for a \(20, 36\) weight it must be \(5, 9\)"):
        semi_sparse_linear(x, weight, codes=codes[:4])
    with pytest.raises(TensorError, match="start the recipe after moving the model"):
        semi_sparse_linear(x, weight, mask="soft", scale=codes)


@pytest.mark.parametrize("mask", ["row", "greedy", "signed_greedy"])
def test_only_transposable_masks_can_be_given_as_codes(mask: str) -> None:
    weight = torch.randn(16, 16)
    codes = ops.tile_codes(weight, mask)
    with pytest.raises(ConfigError, match=f"mask='{mask}' cannot be given as codes"):
        semi_sparse_linear(torch.randn(2, 16), weight, mask=mask, codes=codes)
