"""FLOPs of the packed ops: FlopCounterMode counts what it counts for nn.Linear of the same sizes."""

import pytest
import torch
from torch import nn
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

from semisparse import SemiSparseActivationLinear, SemiSparseLinear, ops, routes
from semisparse.flops import flop_formulas, register_flop_formulas
from semisparse.formats.layout import FP8
from tests import fresh

M, K, N = 24, 48, 80
LAYERS = [SemiSparseLinear, SemiSparseActivationLinear]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(flop_counter, "flop_registry", dict(flop_counter.flop_registry))
    register_flop_formulas()


@pytest.fixture
def packed_on_cpu(monkeypatch):
    monkeypatch.setattr(routes, "packs", lambda weight, dtype, backend: True)


def flops_of_a_step(layer, x):
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    return counter.get_total_flops(), {str(op) for op in counter.get_flop_counts()["Global"]}


@pytest.mark.parametrize("bias", [None, torch.zeros(N, dtype=torch.bfloat16)], ids=["no_bias", "bias"])
def test_each_product_counts_as_the_dense_one(bias):
    x, weight = torch.randn(M, K, dtype=torch.bfloat16), torch.randn(N, K, dtype=torch.bfloat16)
    packed, packed_t = ops.pack(weight, torch.bfloat16, "transposable")
    tokens, tokens_t = ops.pack_tokens(x, torch.bfloat16)
    for product in (
        lambda: ops.packed_matmul(x, packed, bias, N, "auto"),
        lambda: ops.packed_linear(x, weight, bias, packed, packed_t, "transposable", "auto"),
        lambda: ops.packed_tokens_matmul(tokens, weight, bias, M, "auto"),
        lambda: ops.packed_tokens_linear(x, weight, bias, tokens, tokens_t, "auto"),
        lambda: ops.packed_tokens_grad_weight(tokens_t, x.new_zeros(M, N), K, "auto"),
        lambda: ops.sampled_linear(x, weight, bias, None),
        lambda: ops.sampled_grad_weight(x.new_zeros(M, N), x, None, bias is not None, "auto"),
        lambda: ops.fp8_dense_product(x.to(FP8), weight.to(FP8), torch.bfloat16),
    ):
        with FlopCounterMode(display=False) as counter:
            product()
        assert counter.get_total_flops() == 2 * M * N * K


def test_the_sampled_product_in_fp8_counts_tokens_as_padded_to_16():
    sample = ops.sample_fp8(torch.zeros(M, 64), None, False, None)[1]
    x8t = ops.quantise(torch.zeros(M, K), False, True)[1]
    whole = torch.zeros(M, 64), x8t, torch.ones(()), None, True, None, "auto", torch.bfloat16
    for product in (
        lambda: ops.fp8_sampled_product(sample, x8t, 64, "auto", torch.bfloat16),
        lambda: ops.fp8_sampled_grad_weight(*whole),
    ):
        with FlopCounterMode(display=False) as counter:
            product()
        assert counter.get_total_flops() == 2 * 32 * 64 * K


@pytest.mark.filterwarnings("ignore:a layer with a pruned activation")
@pytest.mark.parametrize("layer_class", LAYERS)
@pytest.mark.parametrize("leading", [(M,), (2, 3, 5), (0,)], ids=str)
@pytest.mark.parametrize("input_grad", [True, False])
def test_a_packed_step_counts_as_nn_linears(packed_on_cpu, layer_class, leading, input_grad):
    x = torch.randn(*leading, K, dtype=torch.bfloat16, requires_grad=input_grad)
    ours, names = flops_of_a_step(layer_class(K, N, dtype=torch.bfloat16), x)
    expected, _ = flops_of_a_step(nn.Linear(K, N, dtype=torch.bfloat16), x)
    assert any("pack" in name for name in names)
    assert ours == expected == (3 if input_grad else 2) * 2 * x[..., 0].numel() * N * K


def test_without_the_formulas_the_products_count_nothing(packed_on_cpu, monkeypatch):
    theirs = {op: formula for op, formula in flop_counter.flop_registry.items() if op not in flop_formulas()}
    layer = SemiSparseLinear(K, N, dtype=torch.bfloat16)  # building one registers them
    monkeypatch.setattr(flop_counter, "flop_registry", theirs)
    x = torch.randn(M, K, dtype=torch.bfloat16, requires_grad=True)
    assert flops_of_a_step(layer, x)[0] == 2 * M * N * K  # the weight gradient, which is a dense product
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * M * N * K


def test_masks_and_packing_count_nothing():
    matrix = torch.randn(N, K)
    with FlopCounterMode(display=False) as counter:
        ops.tile_codes(matrix, "transposable")
        ops.prune(matrix, torch.bfloat16, "transposable")
        ops.prune_tokens(matrix, torch.bfloat16)
        ops.pack_tokens(matrix, torch.bfloat16)
        packed, _ = ops.pack(matrix, torch.bfloat16, "transposable")
        ops.unpack(packed, N, K, torch.bfloat16)
    assert counter.get_total_flops() == 0


def test_a_model_on_meta_counts_too():
    x, weight = torch.randn(M, K, device="meta"), torch.randn(N, K, device="meta")
    packed, _ = ops.pack(weight.bfloat16(), torch.bfloat16, "transposable")
    with FlopCounterMode(display=False) as counter:
        ops.packed_matmul(x.bfloat16(), packed, None, N, "auto")
    assert counter.get_total_flops() == 2 * M * N * K


def test_registering_again_changes_nothing_and_a_formula_that_was_registered_before_stays(monkeypatch):
    before = dict(flop_counter.flop_registry)
    register_flop_formulas()
    assert flop_counter.flop_registry == before
    mine = {torch.ops.semisparse.packed_linear: lambda *args, **kwargs: 7}
    monkeypatch.setattr(flop_counter, "flop_registry", dict(mine))
    register_flop_formulas()
    assert flop_counter.flop_registry[torch.ops.semisparse.packed_linear] is next(iter(mine.values()))
    assert len(flop_counter.flop_registry) == 13


def test_importing_registers_nothing_and_does_not_import_the_counter():
    code = "import sys, semisparse.flops; print('torch.utils.flop_counter' in sys.modules, 'triton' in sys.modules)"
    result = fresh.run("-c", code)
    assert result.stdout.split() == ["False", "False"], result.stderr
