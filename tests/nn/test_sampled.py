"""Layers with grad_output="mvue": dW = S(dy)^T x with the specification's sample, everything else as without it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

from semisparse import PackedWeights, SemiSparseLinear, SparseConfig
from semisparse.errors import ConfigError, TensorError
from semisparse.functional import semi_sparse_linear
from semisparse.reference import mvue
from semisparse.testing import assert_bit_equal, small_integers
from tests.functional.counting import CountOps

K, N = 48, 32
BF16 = torch.bfloat16
Route = str
MASKS = ["transposable", "row", "soft"]


@pytest.fixture(params=["masked dense", "packed"])
def route(request: pytest.FixtureRequest) -> Route:
    """Both routes run on the CPU; for the packed one only the choice of route is forced."""
    if request.param == "packed":
        request.getfixturevalue("packed_on_cpu")
    return request.param


def layer_of(
    sampled: bool = True, mask: str = "transposable", dtype: torch.dtype = BF16, bias: bool = True
) -> SemiSparseLinear:
    config = SparseConfig(weight=mask, grad_output="mvue" if sampled else None)  # type: ignore[arg-type]
    layer = SemiSparseLinear(K, N, bias=bias, dtype=dtype, config=config)
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_(small_integers(parameter.shape, seed=seed, dtype=dtype))
    if mask == "soft":
        layer.hold(scale=torch.tensor(0.5))
    layer.held_seed = torch.tensor(-5)
    return layer


def inputs(*leading: int, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor]:
    return small_integers((*leading, K), seed=7, dtype=dtype), small_integers((*leading, N), seed=8, dtype=dtype)


def results(layer: nn.Module, x: Tensor, gradient: Tensor, call: Callable[..., Any] | None = None) -> list[Tensor]:
    """y, dx, dW and, where there is one, db."""
    layer.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y = (layer if call is None else call)(x)
    y.backward(gradient)
    return [y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]


def sampled_weight(gradient: Tensor, x: Tensor, seed: int = -5) -> Tensor:
    """dW by the equation; exact for whole numbers."""
    drawn = mvue.sample(gradient.reshape(-1, N), seed).matrix
    return (drawn.double().mT @ x.reshape(-1, K).double()).to(x.dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("leading", [(0,), (1,), (13,), (2, 8), ()], ids=str)
def test_only_the_weight_gradient_is_sampled(route: Route, leading: tuple[int, ...], mask: str, bias: bool) -> None:
    x, gradient = inputs(*leading)
    ours, plain = (results(layer_of(sampled, mask, bias=bias), x, gradient) for sampled in (True, False))
    for place, (found, expected) in enumerate(zip(ours, plain, strict=True)):
        wanted = sampled_weight(gradient, x) if place == 2 else expected
        assert_bit_equal(found + 0.0, wanted + 0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_every_dtype_samples_its_own_bits(route: Route, dtype: torch.dtype) -> None:
    x, gradient = inputs(16, dtype=dtype)
    found = results(layer_of(dtype=dtype), x, gradient)[2]
    assert_bit_equal(found + 0.0, sampled_weight(gradient, x) + 0.0)


def test_fp32_parameters_under_autocast(route: Route) -> None:
    x, gradient = inputs(16, dtype=torch.float32)
    layer = layer_of(dtype=torch.float32)
    with torch.autocast("cpu", BF16):
        found = results(layer, x, gradient.to(BF16))
    assert [one.dtype for one in found] == [BF16, torch.float32, torch.float32, torch.float32]
    assert_bit_equal(found[2] + 0.0, sampled_weight(gradient.to(BF16), x.to(BF16)).float() + 0.0)


# Dynamo instantiates autograd.Function and records the warning, which the suite's "error" turns into a failure.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_without_graph_breaks_and_following_the_seed(route: Route, backend: str) -> None:
    torch._dynamo.reset()
    layer, (x, gradient) = layer_of(), inputs(16)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for seed in (-5, 6, 7):
        layer.held_seed.fill_(seed)
        with torch._dynamo.config.patch(error_on_recompile=seed != -5):
            found = results(layer, x, gradient, compiled)
        for ours, expected in zip(found, results(layer, x, gradient), strict=True):
            assert_bit_equal(ours + 0.0, expected + 0.0)
        assert_bit_equal(found[2] + 0.0, sampled_weight(gradient, x, seed) + 0.0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_step_repeats_its_sample(route: Route, reentrant: bool) -> None:
    layer, (x, gradient) = layer_of(), inputs(16)
    again = results(layer, x, gradient, lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    for ours, expected in zip(again, results(layer, x, gradient), strict=True):
        assert_bit_equal(ours, expected)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_layer_samples_too(route: Route, strict: bool) -> None:
    layer, (x, gradient) = layer_of(), inputs(16)
    program = torch.export.export(layer, (x.clone().requires_grad_(),), strict=strict).module()
    for ours, expected in zip(results(program, x, gradient), results(layer, x, gradient), strict=True):
        assert_bit_equal(ours + 0.0, expected + 0.0)


def test_weights_packed_per_step_sample_in_both_ways(packed_on_cpu) -> None:
    x, gradient = inputs(16)
    expected = results(layer_of(), x, gradient)
    for keep in ("both", "forward"):
        layer = layer_of()
        weights = PackedWeights(layer, keep=keep)  # type: ignore[arg-type]
        weights.pack()
        with CountOps() as counter:
            for ours, wanted in zip(results(layer, x, gradient), expected, strict=True):
                assert_bit_equal(ours, wanted)
        assert counter.counts["sampled_grad_weight"] == 1


def test_what_needs_no_gradient_draws_nothing(route: Route) -> None:
    layer, (x, gradient) = layer_of(), inputs(16)
    layer.weight.requires_grad_(False)
    with CountOps() as counter:
        x.requires_grad_()
        layer(x).backward(gradient)
        assert_bit_equal(layer.bias.grad, gradient.sum(0))
        with torch.no_grad():
            layer(x)
    assert not counter.counts["sample"] + counter.counts["sampled_grad_weight"] + counter.counts["pack_sample"]


def test_micro_batches_differ_and_accumulate(route: Route) -> None:
    layer = layer_of()
    (x, gradient), other = inputs(16), small_integers((16, N), seed=9, dtype=BF16)
    total = results(layer, x, gradient)[2].clone()
    leaf = x.clone().requires_grad_()
    layer(leaf).backward(other)
    assert_bit_equal(layer.weight.grad + 0.0, total + sampled_weight(other, x) + 0.0)
    assert not torch.equal(mvue.sample(gradient, -5).kept, mvue.sample(other, -5).kept)


def test_a_jagged_batch_is_sampled_row_by_row(route: Route) -> None:
    layer, (x, gradient) = layer_of(), inputs(12)
    nested = torch.nested.nested_tensor_from_jagged(x.clone(), torch.tensor([0, 5, 12])).requires_grad_()
    layer(nested).values().backward(gradient)
    assert_bit_equal(layer.weight.grad + 0.0, sampled_weight(gradient, x) + 0.0)


def test_a_non_finite_gradient_makes_the_weight_gradient_non_finite(route: Route) -> None:
    layer, (x, gradient) = layer_of(), inputs(16)
    x = x.abs() + 1
    for bad in (torch.inf, torch.nan):
        gradient[6, 3] = bad
        found = results(layer, x, gradient)[2]
        assert not found[3].isfinite().any()
        assert found[[0, 1, 2, *range(4, N)]].isfinite().all()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # used by torch 2.15's jvp
def test_functorch_agrees_with_autograd(route: Route) -> None:
    layer, (x, gradient) = layer_of(dtype=torch.float32), inputs(16, dtype=torch.float32)
    parameters = {name: value.detach() for name, value in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, gradient: Tensor) -> Tensor:
        return (functional_call(layer, parameters, (x,)) * gradient).sum()

    expected = results(layer, x, gradient)
    found = grad(loss)(parameters, x, gradient)
    assert_bit_equal(found["weight"] + 0.0, expected[2] + 0.0)
    assert_bit_equal(found["bias"], expected[3])
    xs, gradients = torch.stack([x, x + 1, 2 * x]), torch.stack([gradient, -gradient, gradient + 2])
    each = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, xs, gradients)
    for place in range(3):
        alone = grad(loss)(parameters, xs[place], gradients[place])
        assert_bit_equal(each["weight"][place] + 0.0, alone["weight"] + 0.0)
    tangents = {name: torch.ones_like(value) for name, value in parameters.items()}
    pushed = []
    for one in (layer, layer_of(sampled=False, dtype=torch.float32)):

        def forward(parameters: dict[str, Tensor], x: Tensor, one: nn.Module = one) -> Tensor:
            return functional_call(one, parameters, (x,))

        pushed.append(jvp(forward, (parameters, x), (tangents, torch.ones_like(x))))
    torch.testing.assert_close(*pushed)


def test_a_compiled_transform_is_refused(route: Route) -> None:
    torch._dynamo.reset()
    layer, (x, _) = layer_of(dtype=torch.float32), inputs(16, dtype=torch.float32)
    parameters = {name: value.detach() for name, value in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(layer, parameters, (x,)).sum()

    with pytest.raises(Exception, match=r"cannot run inside a compiled torch\.func transform") as caught:
        torch.compile(grad(loss), backend="eager", fullgraph=True)(parameters)
    assert caught.type is ConfigError or "ConfigError" in str(caught.value)


def test_a_second_derivative_is_refused(route: Route) -> None:
    layer, (x, _) = layer_of(dtype=torch.float32), inputs(16, dtype=torch.float32)
    x.requires_grad_()
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_bad_arguments_are_named(route: Route) -> None:
    layer, (x, gradient) = layer_of(), inputs(16)
    layer.held_seed = torch.tensor([1, 2])
    with pytest.raises(TensorError, match=r"seed is .*start the schedule after moving the model"):
        results(layer, x, gradient)
    with pytest.raises(ConfigError, match="grad_output='random' is not one of None, 'mvue'"):
        semi_sparse_linear(x, layer.weight, grad_output="random")  # type: ignore[arg-type]
