"""Small inputs of ordinary use that failed once: each computes what nn.Linear leads one to expect, or says why not.

The names keep the letter of the kind of fault: A trained or computed wrong without a word, B crashed, C misled.
"""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import semisparse
from semisparse import SemiSparseActivationLinear, SemiSparseLinear, SparseConfig, SparseSchedule, recipes, routes
from semisparse.errors import LayerRefusedError, NoLayerMatchedError
from semisparse.testing import assert_bit_equal

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))


def sparse(*layers: nn.Module, config: SparseConfig | None = None) -> nn.Sequential:
    model = nn.Sequential(*layers)
    semisparse.sparsify(model, config)
    return model


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[nn.Sequential, Tensor]]:
    """Makes a model that takes the packed route on the CPU, and its input."""
    half = (torch.float16, torch.bfloat16)
    monkeypatch.setattr(routes, "packs", lambda weight, dtype, backend: dtype in half and backend != "dense")
    return lambda: (nn.Sequential(SemiSparseLinear(16, 16, bias=False, dtype=torch.bfloat16)), X.bfloat16())


def test_a1_every_parameter_of_an_exported_training_model_gets_a_gradient() -> None:
    module = torch.export.export(sparse(nn.Linear(16, 16)).train(), (X,)).module()
    module(X).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_a3_a_forward_set_on_the_instance_is_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    inner = model[0].forward
    model[0].forward = lambda *args, **keywords: inner(*args, **keywords)  # as hook libraries do
    with pytest.raises(NoLayerMatchedError, match="its forward was replaced on the instance"):
        semisparse.sparsify(model)


def test_a4_a_layer_whose_weight_its_parent_reads_is_not_swapped() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.proj.weight, self.proj.bias)

    with pytest.raises(NoLayerMatchedError, match="proj"):
        semisparse.sparsify(Attention())


def test_a5_densify_masked_does_not_prune_a_tied_embedding() -> None:
    class LanguageModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.head = nn.Embedding(32, 16), nn.Linear(16, 32, bias=False)
            self.head.weight = self.emb.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.emb(tokens))

    model = LanguageModel()
    with pytest.raises(NoLayerMatchedError, match="emb"):
        semisparse.sparsify(model)
    semisparse.sparsify(model, select=lambda name, layer: name == "head")
    embedding = model.emb.weight.detach().clone()
    with pytest.raises(LayerRefusedError, match="head"):
        semisparse.densify(model, weights="masked")
    assert_bit_equal(model.emb.weight.detach(), embedding)


@pytest.mark.parametrize("mask", ["soft", "signed_greedy"])
def test_a7_densify_masked_prunes_a_shared_weight_once(mask: str) -> None:
    first, second = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
    second.weight = first.weight
    model = sparse(first, second, config=SparseConfig(weight=mask))  # type: ignore[arg-type]
    if mask == "soft":
        recipes.RecipeSchedule(recipes.s_ste(), model, torch.optim.SGD(model.parameters(), lr=0.1), 10)
    before = model(X)
    semisparse.densify(model, weights="masked")
    assert_bit_equal(model(X), before)


def test_a8_skipped_steps_do_not_count_where_the_scale_has_a_floor() -> None:
    model = sparse(nn.Linear(16, 16))
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0)
    schedule, counted = SparseSchedule.sparse_then_dense(model, 10), []
    for factor in (1.0, float("inf"), float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(model(X).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < 2:
            scaler.update(2.0)
        counted.append(schedule.step(scaler))
    assert counted == [True, False, False, True]


def test_a10_an_ema_copy_leaves_the_sparse_phase_too() -> None:
    model = sparse(nn.Linear(16, 16))
    schedule = SparseSchedule.sparse_then_dense(model, 2, 0.5)
    ema = torch.optim.swa_utils.AveragedModel(model)
    with pytest.warns(UserWarning, match="copies"):
        schedule.step()
    assert not model[0].sparse_enabled and not ema.module[0].sparse_enabled


def test_a11_a_layer_that_prunes_its_input_warns_that_it_mixes_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("semisparse.nn.activation._warned", False)
    with pytest.warns(semisparse.TokenMixingWarning, match="in a causal model a token then depends on later ones"):
        SemiSparseActivationLinear(16, 16)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_a12_weight_norm_after_the_swap_makes_densify_masked_refuse() -> None:
    model = sparse(nn.Linear(16, 16))
    nn.utils.weight_norm(model[0])
    with pytest.raises(LayerRefusedError, match="its weight is computed by a hook"):
        semisparse.densify(model, weights="masked")


def test_a14_a_copy_made_inside_reuse_packed_packs_its_own_weight(packed: Callable) -> None:
    model, x = packed()
    with semisparse.reuse_packed(model):
        other = copy.deepcopy(model)
    nn.init.zeros_(other[0].weight)
    assert not other(x).any()


def test_a15_what_was_packed_as_bf16_is_not_read_as_fp16(packed: Callable) -> None:
    model, x = packed()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        expected = model(x)
    with (
        torch.no_grad(),
        semisparse.reuse_packed(model),
        torch.autocast("cpu", dtype=torch.float16),
        pytest.warns(UserWarning, match=r"computing in torch\.bfloat16, but this forward computes in torch\.float16"),
    ):
        y = model(x)
    assert_bit_equal(y, expected)


def test_b1_packing_in_inference_mode_does_not_spoil_later_training(packed: Callable) -> None:
    model, x = packed()
    with torch.inference_mode(), semisparse.reuse_packed(model):
        expected = model(x)
    with semisparse.reuse_packed(model):
        y = model(x)
        y.sum().backward()
    assert_bit_equal(y.detach(), expected)


def test_b2_the_input_may_be_given_by_keyword() -> None:
    layer = sparse(nn.Linear(16, 16))[0]
    assert_bit_equal(layer(input=X), layer(X))


def test_b3_an_optimizer_wrapper_without_an_optimizers_init_is_unwrapped() -> None:
    class Wrapped(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.inner = inner

        param_groups = property(lambda self: self.inner.param_groups)  # type: ignore[assignment]

    recipe = recipes.sr_ste(decay=1e-4)
    model = sparse(nn.Linear(16, 16), config=recipe.config)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    recipes.RecipeSchedule(recipe, model, Wrapped(inner), 10)
    assert len(inner._optimizer_step_pre_hooks) == 1


def test_b4_the_state_of_a_data_parallel_model_loads_into_the_bare_one() -> None:
    recipe, states = recipes.fst(decay=1e-4), []
    for wrap in (nn.DataParallel, lambda model: model):
        model = sparse(nn.Linear(16, 16), config=recipe.config)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        schedule = recipes.RecipeSchedule(recipe, wrap(model), optimizer, 100)
        if states:
            schedule.load_state_dict(states[0])
        states.append(schedule.state_dict())
    assert states[0]["masks"].keys() == states[1]["masks"].keys()


@pytest.mark.parametrize("layer_class", [SemiSparseLinear, SemiSparseActivationLinear])
def test_b5_jagged_input_is_taken(layer_class: type[nn.Linear]) -> None:
    layer, parts = layer_class(16, 16), [torch.randn(3, 16), torch.randn(5, 16)]
    y = layer(torch.nested.nested_tensor(parts, layout=torch.jagged))
    assert_bit_equal(y.values(), layer(torch.cat(parts)))


def test_b6_fx_traces_a_sparse_model() -> None:
    model = sparse(nn.Linear(16, 16))
    assert_bit_equal(torch.fx.symbolic_trace(model)(X), model(X))


def test_b7_a_weight_dtype_that_no_forward_takes_is_not_swapped() -> None:
    layer = nn.Linear(16, 16, bias=False)
    layer.weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(NoLayerMatchedError, match="int8"):
        semisparse.sparsify(nn.Sequential(layer))


def test_b8_the_weight_has_a_jvp() -> None:
    layer = SemiSparseLinear(16, 16)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    _, tangent = torch.func.jvp(lambda p: torch.func.functional_call(layer, p, (X,)), (parameters,), (parameters,))
    assert_bit_equal(tangent, F.linear(X, parameters["weight"], parameters["bias"]))


def test_b9_per_sample_gradients_work() -> None:
    layer = SemiSparseLinear(16, 16)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, p, (x[None],)).sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, X)
    assert_bit_equal(found["weight"], X[:, None, :].expand(-1, 16, -1).contiguous())


def test_c2_the_report_names_large_matrices_outside_nn_linear() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.router = nn.Parameter(torch.randn(8, 64, 16)), nn.Linear(16, 8)

    assert "Parameter 'up' of Experts (8 x 64 x 16" in str(semisparse.sparsify(Experts())).splitlines()[-1]
