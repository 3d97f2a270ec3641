"""Both layer classes in training, against autograd of masked-dense F.linear with brute-force masks."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from semisparse import SemiSparseActivationLinear, SemiSparseLinear, SparseConfig
from semisparse.nn import SemiSparseBase
from semisparse.reference import masks
from semisparse.testing import DTYPES, assert_as_good_as_torch, assert_bit_equal, small_integers
from tests.support import LAYER_CLASSES, Result, brute_mask, brute_token_mask, make_layer, masked_dense, run_layer

pytestmark = pytest.mark.usefixtures("poison")

CLASSES = pytest.mark.parametrize("layer_class", LAYER_CLASSES, ids=lambda cls: cls.operand)
K, N = 20, 12


def problem(
    layer_class: type[SemiSparseBase], *leading: int, dtype: torch.dtype = torch.float32, bias: bool = True
) -> tuple[SemiSparseBase, Tensor, Tensor]:
    """A layer, an input and an output gradient."""
    layer = make_layer(layer_class, torch.randn(N, K).to(dtype), torch.randn(N).to(dtype) if bias else None)
    return layer, torch.randn(*leading, K).to(dtype), torch.randn(*leading, N).to(dtype)


def assert_same(ours: Result, expected: Result) -> None:
    for result, other in zip(ours, expected, strict=True):
        assert (result is None) == (other is None)
        if result is not None:
            assert_bit_equal(result, other)


@CLASSES
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("leading", [(), (0,), (1,), (7,), (2, 3), (2, 0, 3), (1, 2, 2, 2)])
def test_any_leading_sizes(layer_class: type, leading: tuple[int, ...], dtype: torch.dtype, bias: bool) -> None:
    layer, x, grad = problem(layer_class, *leading, dtype=dtype, bias=bias)
    ours = run_layer(layer, x, grad)
    same = masked_dense(layer_class, x, layer.weight, layer.bias, grad)
    bias64 = None if layer.bias is None else layer.bias.double()
    exact = masked_dense(layer_class, x.double(), layer.weight.double(), bias64, grad.double())
    assert ours.output.shape == (*leading, N)
    for result, plain, truth in zip(ours, same, exact, strict=True):
        assert (result is None) == (plain is None)
        if result is not None:
            assert_as_good_as_torch(result, plain, truth)


@CLASSES
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_output_is_the_same(layer_class: type, mode: type) -> None:
    layer, x, _ = problem(layer_class, 7)
    expected = layer(x)
    with mode():
        output = layer(x)
    assert not output.requires_grad
    assert_bit_equal(output, expected)


@CLASSES
def test_a_frozen_weight_gets_no_gradient_and_the_rest_is_unchanged(layer_class: type) -> None:
    layer, x, grad = problem(layer_class, 7)
    expected = masked_dense(layer_class, x, layer.weight, layer.bias, grad)
    layer.weight.requires_grad_(False)
    assert_same(run_layer(layer, x, grad), expected._replace(grad_weight=None))
    layer.bias.requires_grad_(False)
    assert_same(run_layer(layer, x, grad), expected._replace(grad_weight=None, grad_bias=None))


@CLASSES
def test_a_frozen_input_gets_no_gradient_and_the_rest_is_unchanged(layer_class: type) -> None:
    layer, x, grad = problem(layer_class, 7)
    expected = masked_dense(layer_class, x, layer.weight, layer.bias, grad)
    output = layer(x)
    output.backward(grad)
    assert x.grad is None
    assert_same(Result(output.detach(), expected.grad_input, layer.weight.grad, layer.bias.grad), expected)


@CLASSES
def test_one_layer_used_twice_in_a_graph_adds_its_gradients(layer_class: type) -> None:
    layer, first, grad = problem(layer_class, 8)
    second = torch.randn(8, K)
    parts = [masked_dense(layer_class, x, layer.weight, layer.bias, grad) for x in (first, second)]
    (layer(first) + layer(second)).backward(grad)
    assert_bit_equal(layer.weight.grad, parts[0].grad_weight + parts[1].grad_weight)
    assert_bit_equal(layer.bias.grad, parts[0].grad_bias + parts[1].grad_bias)


@CLASSES
def test_a_layer_fed_by_itself(layer_class: type) -> None:
    layer = make_layer(layer_class, torch.randn(K, K), None)
    x, grad = torch.randn(8, K), torch.randn(8, K)
    inner = masked_dense(layer_class, x, layer.weight, None, grad).output
    outer = masked_dense(layer_class, inner, layer.weight, None, grad)
    first = masked_dense(layer_class, x, layer.weight, None, outer.grad_input)
    leaf = x.clone().requires_grad_()
    layer(layer(leaf)).backward(grad)
    assert_bit_equal(leaf.grad, first.grad_input)
    assert_bit_equal(layer.weight.grad, outer.grad_weight + first.grad_weight)


@CLASSES
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_changes_no_bit(layer_class: type, use_reentrant: bool) -> None:
    block = nn.Sequential(
        make_layer(layer_class, torch.randn(N, K), torch.randn(N)),
        nn.GELU(),
        make_layer(layer_class, torch.randn(K, N), None),
    )
    x = torch.randn(7, K)
    results = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=use_reentrant)):
        block.zero_grad()
        leaf = x.clone().requires_grad_()
        output = run(leaf)
        output.square().sum().backward()
        results.append([output, leaf.grad, *(parameter.grad for parameter in block.parameters())])
    for plain, checkpointed in zip(*results, strict=True):
        assert_bit_equal(checkpointed, plain)


@CLASSES
@pytest.mark.parametrize("steps", [2, 3, 8])
def test_gradient_accumulation_is_the_sum_of_the_parts(layer_class: type, steps: int) -> None:
    layer, _, _ = problem(layer_class, 4)
    total = torch.zeros(N, K)
    for _ in range(steps):
        x, grad = torch.randn(4, K), torch.randn(4, N)
        total += masked_dense(layer_class, x, layer.weight, None, grad).grad_weight
        layer(x).backward(grad)
    assert_bit_equal(layer.weight.grad, total)


WRITES = {
    "in_place": lambda weight, new: weight.copy_(new),
    "data": lambda weight, new: setattr(weight, "data", new.clone()),
    "data_copy": lambda weight, new: weight.data.copy_(new),
    "storage": lambda weight, new: weight.untyped_storage().copy_(new.untyped_storage()),
}


@pytest.mark.parametrize("write", WRITES)
def test_every_forward_sees_the_current_weight(write: str) -> None:
    layer, x, grad = problem(SemiSparseLinear, 7)
    layer(x)
    new = torch.randn(N, K)
    with torch.no_grad():
        WRITES[write](layer.weight, new)
    assert_same(run_layer(layer, x, grad), masked_dense(SemiSparseLinear, x, new, layer.bias, grad))
    assert_bit_equal(layer.pruned_weight(), torch.where(brute_mask(new), new, 0))


@CLASSES
@pytest.mark.parametrize("enabled", [True, False])
def test_train_and_eval_never_change_the_mask_or_the_phase(layer_class: type, enabled: bool) -> None:
    layer, x, _ = problem(layer_class, 8)
    layer.sparse_enabled = enabled
    expected = layer(x)
    for training in (False, True):
        assert_bit_equal(layer.train(training)(x), expected)
        assert layer.sparse_enabled is enabled


@CLASSES
def test_a_dense_phase_is_exactly_nn_linear(layer_class: type) -> None:
    layer, x, grad = problem(layer_class, 7)
    dense = nn.Linear(K, N)
    dense.load_state_dict(layer.state_dict())
    layer.sparse_enabled = False
    assert_same(run_layer(layer, x, grad), run_layer(dense, x, grad))
    layer.sparse_enabled = True
    assert not torch.equal(layer(x), dense(x))


def strided_copies(tensor: Tensor) -> list[Tensor]:
    """Views of the same shape and values with other strides: transposed, every second entry, with an offset."""
    doubled = tensor.new_full((2 * tensor.shape[0], 2 * tensor.shape[1]), float("nan"))
    doubled[::2, ::2] = tensor
    offset = torch.cat([tensor[:1], tensor])[1:]
    return [tensor.mT.contiguous().mT, doubled[::2, ::2], offset]


@CLASSES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_of_input_weight_and_gradient_change_no_bit(layer_class: type, dtype: torch.dtype) -> None:
    # Whole numbers: torch itself sums strided operands in another order.
    weight, x, grad = (small_integers(shape, seed=shape[1], limit=3, dtype=dtype) for shape in [(N, K), (8, K), (8, N)])
    expected = run_layer(make_layer(layer_class, weight, weight[:, 0]), x, grad)
    for other_weight, other_x, other_grad in product(*([t, *strided_copies(t)] for t in (weight, x, grad))):
        layer = make_layer(layer_class, weight, weight[:, 0])
        layer.weight = nn.Parameter(other_weight)
        assert layer.weight.stride() == other_weight.stride()
        assert_same(run_layer(layer, other_x, other_grad), expected)


@CLASSES
def test_an_expanded_input_and_gradient(layer_class: type) -> None:
    layer = make_layer(layer_class, small_integers((N, K), seed=1), small_integers((N,), seed=2))
    x, grad = small_integers((1, K), seed=3).expand(8, K), torch.ones(1, 1).expand(8, N)
    assert_same(run_layer(layer, x, grad), run_layer(layer, x.contiguous(), grad.contiguous()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_negative_zeros_in_pruned_slots_change_no_bit(dtype: torch.dtype) -> None:
    weight, x = torch.randn(N, K).to(dtype), torch.randn(8, K).to(dtype)
    grad = torch.randn(8, N).to(dtype)
    for layer_class, operand in ((SemiSparseLinear, weight), (SemiSparseActivationLinear, x)):
        mask = brute_mask(operand)
        runs = []
        for fill in (0.0, -0.0):
            filled = torch.where(mask, operand, fill)
            used_weight, used_x = (filled, x) if operand is weight else (weight, filled)
            runs.append(run_layer(make_layer(layer_class, used_weight, None), used_x, grad))
        assert runs[0].output.abs().sum() > 0
        assert_same(runs[1], runs[0])


@pytest.mark.parametrize("broken", [float("inf"), -float("inf"), float("nan")])
def test_a_pruned_broken_value_does_not_poison_its_row(broken: float) -> None:
    operand = torch.ones(4, 8)
    operand[0, :4] = broken  # four broken neighbours: two of them must go
    layer = make_layer(SemiSparseLinear, operand, None)
    pruned = layer.pruned_weight()
    assert_bit_equal(pruned, torch.where(brute_mask(operand), operand, 0))
    assert (pruned[0, :4] == 0).sum() == 2
    output = layer(torch.ones(3, 8))
    assert_bit_equal(output[:, 0], torch.full((3,), broken))
    assert_bit_equal(output[:, 1:], torch.full((3, 3), 4.0))
    tokens = make_layer(SemiSparseActivationLinear, torch.ones(4, 8), None)(operand)
    assert_bit_equal(tokens[0], torch.full((4,), broken))
    assert_bit_equal(tokens[1:], torch.full((3, 4), 4.0))


def test_a_broken_weight_that_is_kept_shows_in_the_output() -> None:
    layer, x, _ = problem(SemiSparseLinear, 4)
    with torch.no_grad():
        layer.weight[5, 7] = float("nan")
    output = layer(x)
    assert output[:, 5].isnan().all()
    assert output.isfinite().sum() == 4 * (N - 1)


def test_the_row_mask_layer() -> None:
    layer = SemiSparseLinear(K, N, config=SparseConfig(weight="row"))
    x, grad = torch.randn(8, K), torch.randn(8, N)
    pruned = torch.where(masks.row(layer.weight), layer.weight, 0).detach().requires_grad_()
    expected = F.linear(x, pruned, layer.bias)
    expected.backward(grad)
    ours = run_layer(layer, x, grad)
    assert_bit_equal(ours.output, expected)
    assert_bit_equal(ours.grad_input, grad @ pruned)
    assert_bit_equal(ours.grad_weight, pruned.grad)
    assert_bit_equal(layer.pruned_weight(), pruned)


def test_the_weight_gradient_is_straight_through_and_reaches_pruned_entries() -> None:
    layer, x, grad = problem(SemiSparseLinear, 8)
    ours = run_layer(layer, x, grad)
    assert_bit_equal(ours.grad_weight, grad.mT @ x)
    assert (ours.grad_weight[~brute_mask(layer.weight)] != 0).all()


def test_the_input_gradient_of_the_activation_layer_is_straight_through() -> None:
    layer, x, grad = problem(SemiSparseActivationLinear, 8)
    ours = run_layer(layer, x, grad)
    assert_bit_equal(ours.grad_input, grad @ layer.weight.detach())
    assert (ours.grad_input[~brute_token_mask(x)] != 0).all()
    assert_bit_equal(layer.pruned_weight(), layer.weight.detach())


@CLASSES
def test_a_forward_writes_neither_to_its_input_nor_to_its_weight(layer_class: type) -> None:
    layer, x, grad = problem(layer_class, 8)
    copies = x.clone(), layer.weight.detach().clone()
    run_layer(layer, x, grad)
    assert_bit_equal(x, copies[0])
    assert_bit_equal(layer.weight, copies[1])


@CLASSES
def test_the_repr_says_what_the_layer_does(layer_class: type) -> None:
    layer = layer_class(K, N)
    text = repr(layer)
    for part in (
        layer_class.__name__,
        f"in_features={K}",
        f"{layer_class.operand}=transposable",
        "backend=auto",
        "sparse=on",
    ):
        assert part in text
    layer.sparse_enabled = False
    assert "sparse=off (dense phase)" in repr(layer)
