"""Layers with precision="fp8" and grad_output="mvue": the equations, whichever way a layer is called."""

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from semisparse import Phase, SemiSparseLinear, SparseConfig, SparseSchedule, ops
from semisparse.reference import mvue, mvue_fp8
from semisparse.testing import assert_bit_equal, small_integers
from tests.functional.counting import CountOps
from tests.nn.fp8 import K, N, assert_results_equal, by_equations, fp8_inputs, fp8_layer, run

BF16 = torch.bfloat16


def layer_of(mask: str = "transposable", dtype: torch.dtype = BF16, bias: bool = True, seed: int | None = -5):
    layer = fp8_layer(mask, dtype, bias, grad_output="mvue")
    layer.held_seed = None if seed is None else torch.tensor(seed)
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mask", ["transposable", "row"])
@pytest.mark.parametrize("leading", [(0,), (1,), (13,), (2, 16), (3, 0, 2), ()], ids=str)
def test_it_computes_the_equations(leading: tuple[int, ...], mask: str, bias: bool) -> None:
    layer, (x, dy) = layer_of(mask, bias=bias), fp8_inputs(*leading)
    assert_results_equal(run(layer, x, dy), by_equations(layer, x, dy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_dtype_is_sampled_from_itself(dtype: torch.dtype) -> None:
    layer, (x, dy) = layer_of(dtype=dtype, seed=None), fp8_inputs(13, dtype=dtype)
    x, dy = x / 64, dy / 64
    with torch.no_grad():
        layer.weight.div_(64)
    assert_results_equal(run(layer, x, dy), by_equations(layer, x, dy))


def test_fp32_parameters_under_autocast_keep_their_dtype() -> None:
    layer, (x, dy) = layer_of(dtype=torch.float32), fp8_inputs(13, dtype=torch.float32, grad_dtype=BF16)
    with torch.autocast("cpu", BF16):
        found = run(layer, x / 1024, dy / 1024)
    assert [one.dtype for one in found if one is not None] == [BF16, *[torch.float32] * 3]
    assert_results_equal(found, by_equations(layer, x / 1024, dy / 1024))


def test_output_and_input_gradient_are_those_without_sampling() -> None:
    x, dy = torch.randn(40, K).to(BF16), torch.randn(40, N).to(BF16)
    sampled, plain = run(layer_of(), x, dy), run(fp8_layer(), x, dy)
    for place in (0, 1, 3):
        assert_bit_equal(sampled[place], plain[place])
    assert not torch.equal(sampled[2], plain[2])


def test_the_mean_of_many_seeds_is_the_gradient_without_sampling() -> None:
    layer, x, dy = layer_of(dtype=torch.float32, bias=False), torch.randn(32, K), torch.randn(32, N)
    draws = []
    for seed in range(60):
        layer.held_seed = torch.tensor(seed)
        draws.append(run(layer, x, dy).grad_weight.double())
    found, x8, (_, _, scale) = torch.stack(draws), ops.quantise(x, True, False)[0], ops.quantise(x, True, False)
    exact = dy.double().mT @ (x8.float().double() * scale)[:32]
    # N K entries at a time: of their squared deviations the mean is 1 in squares of the standard error.
    deviation = (found.mean(0) - exact).square() / (found.var(0) / 60).clamp(min=1e-30)
    errors = deviation.std() / deviation.numel() ** 0.5 * N**0.5  # the entries of a row share their samples
    assert (deviation.mean() - 1).abs() < 4 * errors


def test_a_dense_phase_samples_nothing() -> None:
    layer, (x, dy) = layer_of(), fp8_inputs(13)
    layer.sparse_enabled = False
    assert_results_equal(run(layer, x, dy), by_equations(layer, x, dy, dense=True))


# Dynamo instantiates autograd.Function and records the warning, which the suite's "error" turns into a failure.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning")
def test_compiled_without_graph_breaks_and_following_the_seed() -> None:
    torch._dynamo.reset()
    layer, x, dy = layer_of(), torch.randn(13, K).to(BF16), torch.randn(13, N).to(BF16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for seed in (-5, 6):
        layer.held_seed.fill_(seed)
        with torch._dynamo.config.patch(error_on_recompile=seed != -5):
            found = run(layer, x, dy, compiled)
        assert_results_equal(found, run(layer, x, dy))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_step_repeats_its_sample(reentrant: bool) -> None:
    layer, x, dy = layer_of(), torch.randn(13, K).to(BF16), torch.randn(13, N).to(BF16)
    again = run(layer, x, dy, lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    assert_results_equal(again, run(layer, x, dy))


def test_an_exported_layer_samples_too() -> None:
    layer, (x, dy) = layer_of(), fp8_inputs(16)
    program = torch.export.export(layer, (x.clone().requires_grad_(),)).module()
    y = program(leaf := x.clone().requires_grad_())
    y.backward(dy)
    expected = run(layer, x, dy)
    assert_bit_equal(y.detach(), expected.output)
    assert_bit_equal(leaf.grad, expected.grad_input)
    assert_bit_equal(dict(program.named_parameters())["weight"].grad, expected.grad_weight)


def test_torch_func_agrees_with_autograd_and_vmap_samples_in_the_dtype_of_the_call() -> None:
    layer, (x, dy) = layer_of(dtype=torch.float32), fp8_inputs(16, dtype=torch.float32)
    parameters = {name: value.detach() for name, value in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, dy: Tensor) -> Tensor:
        return (functional_call(layer, parameters, (x,)) * dy).sum()

    assert_bit_equal(grad(loss)(parameters, x, dy)["weight"] + 0.0, run(layer, x, dy).grad_weight + 0.0)
    each = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x[None], dy[None])["weight"]
    assert_bit_equal(each[0] + 0.0, mvue.sample(dy, -5).matrix.mT @ x + 0.0)


@pytest.mark.parametrize("frozen", ["weight", "bias", "input"])
def test_what_is_frozen_costs_nothing(frozen: str) -> None:
    layer, (x, dy) = layer_of(), fp8_inputs(13)
    expected = by_equations(layer, x, dy)
    x = x.clone().requires_grad_(frozen != "input")
    layer.weight.requires_grad_(frozen != "weight")
    layer.bias.requires_grad_(frozen != "bias")
    with CountOps() as counter:
        layer(x).backward(dy)
    for place, leaf in enumerate((x, layer.weight, layer.bias), 1):
        assert (leaf.grad is None) is not leaf.requires_grad
        if leaf.grad is not None:
            assert_bit_equal(leaf.grad + 0.0, expected[place] + 0.0)
    assert counter.counts["fp8_sampled_grad_weight"] == (frozen != "weight")


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_makes_all_of_dw_not_finite(bad: float) -> None:
    layer, (x, dy) = layer_of(), fp8_inputs(16)
    dy[6, 3] = bad
    assert run(layer, x, dy).grad_weight.isnan().all()


@pytest.mark.parametrize("dtype", [BF16, torch.float64], ids=str)
def test_where_fp8_cannot_run_the_sample_is_that_of_the_calls_dtype(dtype: torch.dtype) -> None:
    rows, columns = (48, 80) if dtype is BF16 else (N, K)
    config = SparseConfig(precision="fp8", grad_output="mvue")
    layer = SemiSparseLinear(columns, rows, dtype=dtype, config=config)
    x, dy = small_integers((16, columns), dtype=dtype), small_integers((16, rows), seed=2, dtype=dtype)
    layer(x).backward(dy)
    assert_bit_equal(layer.weight.grad + 0.0, mvue.sample(dy, 0).matrix.mT @ x + 0.0)
    assert "not in fp8" in repr(layer)


def test_a_schedule_gives_and_advances_the_seed() -> None:
    layer = layer_of(seed=None)
    schedule = SparseSchedule(torch.nn.Sequential(layer), [Phase("sparse", 9)], seed=3)
    schedule.trust_calls()
    x, dy = torch.randn(32, K).to(BF16), torch.randn(32, N).to(BF16)
    first = run(layer, x, dy).grad_weight
    assert layer.held_seed is not None
    schedule._advance()
    second = run(layer, x, dy).grad_weight
    assert not torch.equal(first, second)
    kept = mvue_fp8.sample(dy, int(layer.held_seed)).kept
    assert torch.equal(kept, mvue.sample(dy, int(layer.held_seed)).kept)
