"""What is special to a pruned input: tiles run over tokens, and the last one may be partial."""

import pytest
import torch
from torch import Tensor

from semisparse import SemiSparseActivationLinear
from semisparse.testing import DTYPES, assert_bit_equal, small_integers
from tests.reference import brute
from tests.support import make_layer, run_layer

pytestmark = pytest.mark.usefixtures("poison")

K, N = 12, 8


def layer_and_identity() -> tuple[SemiSparseActivationLinear, SemiSparseActivationLinear]:
    """A layer with random weights, and one whose output is its pruned input."""
    return make_layer(SemiSparseActivationLinear, torch.randn(N, K), torch.randn(N)), make_layer(
        SemiSparseActivationLinear, torch.eye(K), None
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", range(14))
def test_any_token_count_is_pruned_as_if_zero_rows_followed(tokens: int, dtype: torch.dtype) -> None:
    identity = make_layer(SemiSparseActivationLinear, torch.eye(K, dtype=dtype), None)
    x = torch.randn(tokens, K).to(dtype)
    padded = torch.cat([x.float(), torch.zeros(-tokens % 4, K)])
    kept = torch.from_numpy(brute.transposable_matrix(padded.numpy()))
    assert_bit_equal(identity(x) + 0, torch.where(kept[:tokens], x, 0))


@pytest.mark.parametrize("tokens", range(1, 14))
def test_output_and_gradients_equal_the_zero_padded_definition(tokens: int) -> None:
    weight = small_integers((N, K), seed=2)
    x, grad = small_integers((tokens, K), seed=3, limit=4), small_integers((tokens, N), seed=4)
    layer = make_layer(SemiSparseActivationLinear, weight, None)
    padded = torch.cat([x, torch.zeros(-tokens % 4, K)])
    pruned = torch.where(torch.from_numpy(brute.transposable_matrix(padded.numpy())), padded, 0)[:tokens]
    ours = run_layer(layer, x, grad)
    assert_bit_equal(ours.output + 0, (pruned.double() @ weight.double().mT).float() + 0)
    assert_bit_equal(ours.grad_weight + 0, (grad.double().mT @ pruned.double()).float() + 0)
    assert_bit_equal(ours.grad_input + 0, (grad.double() @ weight.double()).float() + 0)


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 6, 7])
@pytest.mark.parametrize("lurking", [float("nan"), 1e30])
def test_rows_behind_the_last_token_are_never_read(tokens: int, lurking: float) -> None:
    layer, identity = layer_and_identity()
    buffer = torch.full((8, K), lurking)
    buffer[:tokens] = torch.randn(tokens, K)
    view = buffer[:tokens]
    grads = torch.full((8, N), lurking)
    grads[:tokens] = torch.randn(tokens, N)
    ours = run_layer(layer, view, grads[:tokens])
    alone = run_layer(layer, view.clone(), grads[:tokens].clone())
    for result, expected in zip(ours, alone, strict=True):
        assert_bit_equal(result, expected)
    assert_bit_equal(identity(view), identity(view.clone()))


def test_a_lone_token_keeps_its_two_largest_of_four() -> None:
    _, identity = layer_and_identity()
    x = torch.randn(1, K)
    kept = torch.from_numpy(brute.row(x.numpy()[0, :4]))
    assert_bit_equal(identity(x)[0, :4], torch.where(kept, x[0, :4], 0))


def test_tokens_are_the_leading_sizes_flattened_in_order() -> None:
    layer, identity = layer_and_identity()
    x = torch.randn(2, 3, 5, K)
    for used in (layer, identity):
        assert_bit_equal(used(x), used(x.reshape(30, K)).view(2, 3, 5, -1))
    assert not torch.equal(identity(x)[0], identity(x[0]))  # 15 tokens: the second sample shares a tile with the first


def pruned_tokens(x: Tensor) -> Tensor:
    return layer_and_identity()[1](x)


def test_the_pruned_input_is_two_of_four_along_tokens_and_features() -> None:
    kept = pruned_tokens(torch.randn(16, K)) != 0
    assert (kept.view(16, K // 4, 4).sum(2) == 2).all()
    assert (kept.view(4, 4, K).sum(1) == 2).all()
