"""Layers with precision="fp8": the equations of reference/linear.py, whichever way a layer is called."""

import inspect
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from semisparse import SemiSparseLinear, SparseConfig
from semisparse.errors import ConfigError, EngineError, ShapeError, TensorError
from semisparse.formats.layout import packed_bytes
from semisparse.functional import semi_sparse_linear
from semisparse.ops import sac_save_ops
from semisparse.reference import fp8, masks
from semisparse.testing import assert_bit_equal, small_integers
from tests.functional.counting import CountOps
from tests.nn.fp8 import MASKS, Fp8Result, K, N, assert_results_equal, by_equations, fp8_inputs, fp8_layer, run

BF16 = torch.bfloat16


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("leading", [(0,), (1,), (13,), (16,), (2, 8), (3, 0, 2), ()], ids=str)
def test_it_computes_the_equations(leading: tuple[int, ...], mask: str | None, bias: bool) -> None:
    layer, (x, dy) = fp8_layer(mask, bias=bias), fp8_inputs(*leading)
    assert_results_equal(run(layer, x, dy), by_equations(layer, x, dy))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_dtype_is_rounded_from_itself(dtype: torch.dtype, mask: str | None) -> None:
    layer, (x, dy) = fp8_layer(mask, dtype), fp8_inputs(13, dtype=dtype)
    x, dy = x / 64, dy / 64  # so that fp16 holds the results
    with torch.no_grad():
        layer.weight.div_(64)
    assert_results_equal(run(layer, x, dy), by_equations(layer, x, dy))


@pytest.mark.parametrize("dense_phase", [False, True])
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_fp32_parameters_under_autocast_keep_their_dtype(dtype: torch.dtype, dense_phase: bool) -> None:
    layer, (x, dy) = fp8_layer(dtype=torch.float32), fp8_inputs(13, dtype=torch.float32, grad_dtype=dtype)
    x, dy = x / 1024, dy / 1024
    layer.sparse_enabled = not dense_phase
    with torch.autocast("cpu", dtype):
        found = run(layer, x, dy)
    assert [one.dtype for one in found if one is not None] == [dtype, *[torch.float32] * 3]
    assert_results_equal(found, by_equations(layer, x, dy, dense=dense_phase))


def test_a_dense_phase_stays_in_fp8() -> None:
    layer, (x, dy) = fp8_layer(), fp8_inputs(13)
    layer.sparse_enabled = False
    found = run(layer, x, dy)
    assert_results_equal(found, by_equations(layer, x, dy, dense=True))
    assert not torch.equal(found.output, nn.functional.linear(x, layer.weight, layer.bias))
    assert "sparse=off (dense phase)" in repr(layer)


def test_held_codes_are_used() -> None:
    layer, (x, dy) = fp8_layer(), fp8_inputs(13)
    layer.hold(codes=masks.to_codes(layer.chosen_mask().flip(0)).to(torch.int16))
    assert_results_equal(run(layer, x, dy), by_equations(layer, x, dy))


def unit(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def bounded(a: Tensor, b: Tensor, bias: Tensor | None, sums: torch.dtype, result: torch.dtype) -> tuple[Tensor, Tensor]:
    """a b^T + bias in fp64, and what its fp8 form may err: one rounding of each operand, then those of the sums."""
    wide, errors = [], []
    for matrix in (a, b):
        size, scale = matrix.double().abs(), 1 / fp8.multiplier_for(fp8.largest_magnitude(matrix)).double()
        # Normal numbers have 3 bits behind the first one; subnormal ones are 2^-9 apart.
        errors.append(torch.where(size == 0, 0, (size * 2.0**-4).maximum(scale * 2.0**-10)))
        wide.append(matrix.double())
    sizes = [matrix.abs() for matrix in wide]
    rounding = (sizes[0] + errors[0]) @ (sizes[1] + errors[1]).mT - sizes[0] @ sizes[1].mT
    exact = wide[0] @ wide[1].mT + (0 if bias is None else bias.double())
    terms = (sizes[0] + errors[0]) @ (sizes[1] + errors[1]).mT + (0 if bias is None else bias.double().abs())
    # fp32: a sum of as many terms, the scale, the bias.
    several = (1 + unit(torch.float32)) ** (a.shape[1] + 2) * (1 + unit(sums)) * (1 + unit(result)) - 1
    return exact, rounding + several * terms


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_errors_are_those_of_the_counted_roundings(dtype: torch.dtype, mask: str | None) -> None:
    layer = SemiSparseLinear(K, N, dtype=dtype, config=SparseConfig(weight=mask, precision="fp8"))  # type: ignore[arg-type]
    x, dy = torch.randn(40, K, dtype=dtype), 1e-4 * torch.randn(40, N, dtype=dtype)
    found, weight = run(layer, x, dy), layer.weight.detach()
    pruned = layer.pruned_weight()
    assert pruned.abs().max() == weight.abs().max()  # else its scale is not that of the bound
    sums = BF16 if dtype is BF16 else torch.float32
    for ours, operands in (
        (found.output, (x, pruned, layer.bias)),
        (found.grad_input, (dy, pruned.mT, None)),
        (found.grad_weight, (dy.mT, x.mT, None)),
    ):
        exact, allowed = bounded(*operands, sums, dtype)  # type: ignore[arg-type]
        error = (ours.double() - exact).detach().abs()
        assert (error <= allowed).all()
        assert error.max() > allowed.max() / 1000  # that is, it was rounded


@pytest.mark.parametrize("frozen", ["weight", "bias", "input", "weight and input"])
def test_what_is_frozen_costs_nothing(frozen: str) -> None:
    layer, (x, dy) = fp8_layer(), fp8_inputs(13)
    expected = by_equations(layer, x, dy)
    x = x.clone().requires_grad_("input" not in frozen)
    layer.weight.requires_grad_("weight" not in frozen)
    layer.bias.requires_grad_(frozen != "bias")
    with CountOps() as forward:
        y = layer(x)
    with CountOps() as backward:
        y.backward(dy)
    assert_bit_equal(y.detach(), expected.output)
    for place, leaf in enumerate((x, layer.weight, layer.bias), 1):
        assert (leaf.grad is None) is not leaf.requires_grad
        if leaf.grad is not None:
            assert_bit_equal(leaf.grad + 0.0, expected[place] + 0.0)
    assert forward.counts == {"quantise": 1, "pack_fp8": 1, "fp8_product": 1, "rescale": 1}
    wanted = {"fp8_product": x.requires_grad, "fp8_dense_product": layer.weight.requires_grad}
    products = sum(wanted.values())
    wanted |= {"quantise": products > 0, "rescale": x.requires_grad}
    assert backward.counts == {name: count for name, count in wanted.items() if count}


def test_only_what_the_backward_needs_is_kept() -> None:
    layer, (x, _) = fp8_layer(), fp8_inputs(13)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x.requires_grad_())
    shapes = sorted((tuple(t.shape) for t in kept), key=math.prod)
    assert shapes == [(), (), (K, 16), (packed_bytes(K, N, 1),)]
    assert {t.dtype for t in kept} == {torch.float32, torch.float8_e4m3fn, torch.uint8}


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", ["x", "weight", "dy"])
@pytest.mark.parametrize("mask", ["transposable", None])
def test_what_is_not_finite_stays_visible(mask: str | None, place: str, bad: float) -> None:
    layer, (x, dy) = fp8_layer(mask), fp8_inputs(13)
    with torch.no_grad():
        {"x": x, "weight": layer.weight, "dy": dy}[place][5, 6] = bad
    found = run(layer, x, dy)
    affected = {"x": (0, 2), "weight": (0, 1), "dy": (1, 2)}[place]
    for at in range(3):
        assert bool(found[at].isfinite().any()) is (at not in affected)


def test_a_scaler_skips_a_step_that_is_not_finite() -> None:
    layer, (x, _) = fp8_layer(dtype=torch.float32), fp8_inputs(13, dtype=torch.float32)
    before, optimizer = layer.weight.detach().clone(), torch.optim.SGD(layer.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu")
    x[2, 3] = math.inf
    scaler.scale(layer(x).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_bit_equal(layer.weight.detach(), before)
    assert scaler.get_scale() == 2.0**15


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant: bool) -> None:
    layer, (x, dy) = fp8_layer(), fp8_inputs(13)
    found = run(layer, x, dy, lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    assert_results_equal(found, by_equations(layer, x, dy))


def test_checkpointing_that_saves_the_products_changes_nothing() -> None:
    layer, (x, dy) = fp8_layer(), fp8_inputs(16)
    contexts = partial(create_selective_checkpoint_contexts, sac_save_ops())

    def call(x: Tensor) -> Tensor:
        return layer(x).sin()  # whose backward reads the layer's result again

    expected = run(layer, x, dy, call)
    found = run(layer, x, dy, lambda x: checkpoint(call, x, use_reentrant=False, context_fn=contexts))
    assert_results_equal(found, expected)


def test_strides_and_jagged_batches_are_their_rows() -> None:
    layer, (x, dy) = fp8_layer(), fp8_inputs(12)
    expected = by_equations(layer, x, dy)
    assert_results_equal(run(layer, x.mT.contiguous().mT, dy.mT.contiguous().mT), expected)
    nested = torch.nested.nested_tensor_from_jagged(x.clone(), torch.tensor([0, 5, 12])).requires_grad_()
    y = layer(nested)
    y.values().backward(dy)
    found = Fp8Result(y.values().detach(), nested.grad.values(), layer.weight.grad, layer.bias.grad)
    assert_results_equal(found, expected._replace(grad_weight=found.grad_weight, grad_bias=found.grad_bias))


@pytest.mark.parametrize("leading", [(13,), (2, 8)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mask", ["transposable", None])
def test_the_output_may_be_written_to_in_place(mask: str | None, bias: bool, leading: tuple[int, ...]) -> None:
    layer, (x, dy) = fp8_layer(mask, bias=bias), fp8_inputs(*leading)
    expected = run(layer, x, dy, lambda x: layer(x) * 2)
    assert_results_equal(run(layer, x, dy, lambda x: layer(x).mul_(2)), expected)
    if mask is None and not bias:  # the one that no pass over the sums comes after
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: layer(x).mul_(2), backend="aot_eager", fullgraph=True)
        assert_results_equal(run(layer, x, dy, compiled), expected)


def test_the_state_dict_is_nn_linears() -> None:
    assert list(fp8_layer().state_dict()) == list(nn.Linear(K, N).state_dict())


def test_a_second_derivative_is_refused() -> None:
    layer, (x, _) = fp8_layer(dtype=torch.float32), fp8_inputs(13, dtype=torch.float32)
    x.requires_grad_()
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # used by torch 2.15's jvp
def test_grad_is_in_fp8_and_other_transforms_are_not() -> None:
    layer, (x, dy) = fp8_layer(dtype=torch.float32), fp8_inputs(13, dtype=torch.float32)
    parameters = {name: value.detach() for name, value in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return (functional_call(layer, parameters, (x,)) * dy).sum()

    expected = by_equations(layer, x, dy)
    found = grad(loss, argnums=(0, 1))(parameters, x)
    assert_bit_equal(found[0]["weight"] + 0.0, expected.grad_weight + 0.0)
    assert_bit_equal(found[1] + 0.0, expected.grad_input + 0.0)
    pruned = nn.functional.linear(x, layer.pruned_weight(), layer.bias)
    torch.testing.assert_close(vmap(layer)(x), pruned)
    torch.testing.assert_close(jvp(layer, (x,), (torch.zeros_like(x),))[0], pruned)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("mask", ["transposable", "row", None])
def test_an_exported_layer_trains(mask: str | None, strict: bool) -> None:
    layer, (x, dy) = fp8_layer(mask), fp8_inputs(16)
    program = torch.export.export(layer, (x.clone().requires_grad_(),), strict=strict).module()
    assert_results_equal(run(program, x, dy), by_equations(layer, x, dy))


@pytest.mark.parametrize("mask", ["transposable", None])
def test_every_attribute_can_be_read_as_torch_jit_trace_does(mask: str | None) -> None:
    assert dict(inspect.getmembers(fp8_layer(mask)))["has_mask"] is (mask is not None)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("mask", ["transposable", None])
def test_other_sizes_and_fp64_compute_as_without_fp8(mask: str | None, enabled: bool) -> None:
    for rows, columns, dtype in ((40, K, BF16), (N, 36, BF16), (N, K, torch.float64)):
        config = SparseConfig(weight=mask, precision="fp8")  # type: ignore[arg-type]
        layer = SemiSparseLinear(columns, rows, dtype=dtype, config=config)
        layer.sparse_enabled = enabled
        x = small_integers((5, columns), dtype=dtype)
        weight = layer.pruned_weight() if enabled else layer.weight
        assert_bit_equal(layer(x), nn.functional.linear(x, weight, layer.bias))
        reason = "not in fp8: computed in torch.float64" if dtype is torch.float64 else "needs multiples of 32"
        assert reason in repr(layer)
    assert "not in fp8" not in repr(fp8_layer(mask))


def test_bad_arguments_are_named_and_change_nothing() -> None:
    layer, (x, _) = fp8_layer(), fp8_inputs(13)
    weight, before = layer.weight, layer.weight.detach().clone()
    for arguments, message in (
        ({"mask": None}, "mask=None prunes nothing"),
        ({"precision": "fp16"}, "precision='fp16' is not one of None, 'fp8'"),
        ({"precision": "fp8", "mask": None, "grad_output": "mvue"}, "takes no grad_output"),
        ({"precision": "fp8", "mask": "soft"}, "mask='soft'"),
        ({"precision": "fp8", "mask": "soft", "scale": torch.tensor(1.0)}, "does not work together with scale"),
        ({"precision": "fp8", "mask": None, "codes": torch.zeros(24, 16, dtype=torch.int16)}, "takes no codes"),
        ({"precision": "fp8", "backend": "other"}, "backend='other' is not one of"),
    ):
        with pytest.raises(ConfigError, match=message):
            semi_sparse_linear(x, weight, **arguments)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="needs a CUDA weight"):
        semi_sparse_linear(x, weight, precision="fp8", backend="cusparselt")
    with pytest.raises(ShapeError, match="input has shape"):
        layer(x[:, 1:])
    with pytest.raises(TensorError, match=r"layout torch\.sparse_coo.*to_dense"):
        layer(x.to_sparse())
    with pytest.raises(ConfigError, match="has no mask"):
        fp8_layer(None).chosen_mask()
    assert_bit_equal(layer.weight.detach(), before)
