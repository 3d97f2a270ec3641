"""Every reason to leave a layer dense, and proof that the containers named really bypass their children."""

import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from semisparse import SemiSparseLinear, densify, sparsify, swap_linear_with_semi_sparse_linear
from semisparse.errors import LayerRefusedError, NoLayerMatchedError
from tests.surgery.models import Snapshot


class Doubled(nn.Module):
    """A parametrisation."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def with_old_hook(function_name: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(getattr(nn.utils, function_name)(nn.Linear(8, 8)))


def parametrised() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8))
    parametrize.register_parametrization(model[0], "weight", Doubled())
    return model


def pruned_by_torch() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8))
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def module_named(package: str, name: str, **children: nn.Module | None) -> nn.Module:
    """A module whose class claims to come from package; not installed, checked by name alone."""
    parent = type(name, (nn.Module,), {"__module__": package})()
    for child, value in children.items():
        setattr(parent, child, value)
    return parent


def timm_attention(q_bias: object) -> nn.Module:
    parent = module_named("timm.models.beit", "Attention", qkv=nn.Linear(8, 24, bias=False), proj=nn.Linear(8, 8))
    parent.q_bias = q_bias
    return parent


def subclass_of_swiglu() -> nn.Module:
    parent = type("SwiGLU", (nn.Module,), {"__module__": "xformers.ops.swiglu_op"})
    child = type("SwiGLUFFNFused", (parent,), {"__module__": "dinov2.layers"})()
    child.w12, child.w3 = nn.Linear(8, 32), nn.Linear(16, 8)
    return child


REFUSED = {
    "parametrised": (parametrised, "0", "remove_parametrizations first"),
    "new_weight_norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8))), "0", "parametrised"),
    "old_weight_norm": (lambda: with_old_hook("weight_norm"), "0", "computed by a hook"),
    "old_spectral_norm": (lambda: with_old_hook("spectral_norm"), "0", "computed by a hook"),
    "torch_prune": (pruned_by_torch, "0", "computed by a hook"),
    "out_features": (lambda: nn.Sequential(nn.Linear(8, 10)), "0", "in_features=8 and out_features=10"),
    "in_features": (lambda: nn.Sequential(nn.Linear(6, 8)), "0", "in_features=6 and out_features=8"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(8)), "0", "it is lazy, without sizes yet"),
    "subclass": (lambda: nn.Sequential(type("Mine", (nn.Linear,), {})(8, 8)), "0", "Mine is a subclass"),
    "attention": (lambda: nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)}), "attn.out_proj", "MultiheadAttention"),
    "encoder_linear1": (lambda: nn.TransformerEncoderLayer(8, 2, 16), "linear1", "TransformerEncoderLayer's fast path"),
    "encoder_linear2": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2),
        "layers.1.linear2",
        "TransformerEncoderLayer's fast path",
    ),
    "xformers": (
        lambda: module_named("xformers.ops.swiglu_op", "SwiGLU", w12=nn.Linear(8, 32)),
        "w12",
        "SwiGLU reads its weights",
    ),
    "xformers_subclass": (subclass_of_swiglu, "w3", "SwiGLU reads its weights"),
    "timm_qkv": (lambda: timm_attention(torch.zeros(8)), "qkv", "timm's Attention.*reads qkv.weight"),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_layer_raises_by_name_and_is_skipped_with_the_reason(case: str) -> None:
    make, name, reason = REFUSED[case]
    model = nn.ModuleDict({"refused": make(), "good": nn.Linear(8, 8)})
    snapshot = Snapshot(model)
    with pytest.raises(LayerRefusedError, match=reason):
        swap_linear_with_semi_sparse_linear(model, {f"refused.{name}": SemiSparseLinear, "good": SemiSparseLinear})
    snapshot.assert_unchanged()
    with pytest.raises(NoLayerMatchedError, match=reason):
        sparsify(model, select=f"refused.{name}")
    snapshot.assert_unchanged()
    layer = model.get_submodule(f"refused.{name}")
    kind = type(layer)
    report = sparsify(model)
    assert "good" in report.swapped
    assert type(layer) is kind
    assert re.search(reason, report.skipped[f"refused.{name}"])


@pytest.mark.parametrize("q_bias", [None, torch.zeros(8)])
def test_timm_attention_is_bypassed_only_through_qkv_with_separate_biases(q_bias: object) -> None:
    report = sparsify(timm_attention(q_bias))
    assert report.swapped == (("proj",) if q_bias is not None else ("qkv", "proj"))


def test_classes_of_the_same_name_elsewhere_are_swapped() -> None:
    assert sparsify(module_named("mymodels.ffn", "SwiGLU", w12=nn.Linear(8, 32))).swapped == ("w12",)
    parent = module_named("mymodels.attention", "Attention", qkv=nn.Linear(8, 24))
    parent.q_bias = torch.zeros(8)
    assert sparsify(parent).swapped == ("qkv",)


def test_a_decoder_layer_calls_its_linears_and_keeps_them() -> None:
    model = nn.TransformerDecoderLayer(8, 2, 16)
    assert sparsify(model).swapped == ("linear1", "linear2")


def test_a_tied_layer_that_one_of_its_homes_bypasses_stays_dense_under_all_its_names() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16)
    for names in (("mine", "encoder"), ("encoder", "mine")):
        homes = {"mine": encoder.linear1, "encoder": encoder}
        model = nn.ModuleDict({name: homes[name] for name in names} | {"other": nn.Linear(8, 8)})
        report = sparsify(model, select=["mine", "other"])
        assert report.swapped == ("other",)
        assert "TransformerEncoderLayer" in report.skipped["mine"]
        assert type(encoder.linear1) is nn.Linear
        densify(model)


def test_removing_the_parametrisation_makes_the_layer_acceptable() -> None:
    model = parametrised()
    parametrize.remove_parametrizations(model[0], "weight")
    assert sparsify(model).swapped == ("0",)


class CountCalls:
    """Counts forwards of SemiSparseLinear by replacing the method: a hook on the layer would itself end a fast path."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        forward = SemiSparseLinear.forward

        def counted(layer: SemiSparseLinear, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return forward(layer, x)

        monkeypatch.setattr(SemiSparseLinear, "forward", counted)


@pytest.mark.parametrize("batch_first", [True, False])
def test_an_encoder_layer_in_eval_never_calls_its_swapped_children(
    batch_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
    dense = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first).eval()
    dense.load_state_dict(encoder.state_dict())
    x = torch.randn(4, 5, 8)
    for child in (encoder.linear1, encoder.linear2):
        SemiSparseLinear.from_dense(child)  # what the swap refuses to do
    count = CountCalls(monkeypatch)
    trained = encoder.train()(x)
    assert count.calls == 2
    with torch.no_grad():
        evaluated, expected = encoder.eval()(x), dense(x)
    if batch_first:  # the fast path exists for this layout alone
        assert count.calls == 2
        assert torch.equal(evaluated, expected)  # silently dense
        assert not torch.allclose(evaluated, trained)
    else:
        assert count.calls == 4


@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention_never_calls_its_output_projection(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).train(training)
    replacement = SemiSparseLinear(8, 8)
    replacement.load_state_dict(attention.out_proj.state_dict())
    attention.out_proj = replacement
    count = CountCalls(monkeypatch)
    x = torch.randn(4, 5, 8)
    attention(x, x, x)
    assert count.calls == 0
