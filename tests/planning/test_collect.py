"""What one forward tells about the linear layers of a model, and that it leaves no trace."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semisparse import Plan
from semisparse._plan import planned, uses_of
from semisparse.errors import ConfigError, NoLayerMatchedError
from semisparse.planning.collect import NEVER_CALLED, from_forward, from_tokens
from semisparse.planning.problems import LinearProblem
from tests.planning.simulated import measurer
from tests.surgery.models import LINEAR_NAMES, Network, Snapshot


class Attention(nn.Module):
    """Three layers that share an input, one that is called twice with different M, one without a call."""

    def __init__(self, **factory: Any) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(16, 16, **factory), nn.Linear(16, 16, bias=False, **factory)
        self.out, self.unused = nn.Linear(16, 32, **factory), nn.Linear(16, 16, **factory)

    def forward(self, x: Tensor) -> Tensor:
        y = self.q(x) + self.k(input=x)
        return torch.cat([self.out(y), self.out(y[:2]), self.out(y[2:4])])


def test_sizes_counts_gradients_and_shared_inputs() -> None:
    uses = {use.name: use for use in from_forward(Attention(), (torch.randn(2, 4, 16)[0],), {})}
    plain = {"dtype": "float32", "weight_dtype": "float32", "input_dtype": "float32"}
    assert uses["q"].calls == ((LinearProblem(4, 16, 16, **plain, grad_input=False), 1.0),)
    assert uses["k"].calls == ((LinearProblem(4, 16, 16, **plain, grad_input=False, bias=False), 1.0),)
    assert uses["out"].calls == ((LinearProblem(4, 16, 32, **plain), 1.0), (LinearProblem(2, 16, 32, **plain), 2.0))
    assert uses["q"].reads == uses["k"].reads != uses["out"].reads
    assert len(set(uses["out"].reads)) == 3
    assert {name: use.stays for name, use in uses.items() if use.stays} == {"unused": NEVER_CALLED}


def test_an_input_that_was_written_to_is_another_one() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            first = self.a(x)
            return first.detach() + self.b(x.add_(1))

    first, second = from_forward(Writes(), (torch.ones(4, 16),), {})
    assert first.reads != second.reads


def test_frozen_layers_and_autocast() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).requires_grad_(False)
    model[1].weight.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        uses = from_forward(model, (torch.ones(4, 16),), {})
    first, second = (use.calls[0][0] for use in uses)
    assert (first.grad_input, first.grad_weight) == (False, False)
    assert (second.grad_input, second.grad_weight) == (False, True)
    assert (second.dtype, second.weight_dtype, second.input_dtype) == ("bfloat16", "float32", "bfloat16")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_same_on_meta_as_on_the_cpu(device: str) -> None:
    on_cpu = from_forward(Attention(dtype=torch.bfloat16), (torch.ones(4, 16, dtype=torch.bfloat16),), {})
    factory: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    assert from_forward(Attention(**factory), (torch.ones(4, 16, **factory),), {}) == on_cpu


def test_roles_refusals_and_selections_stay_dense_with_their_reasons() -> None:
    uses = {use.name: use for use in from_forward(Network(), (torch.ones(2, 3, 8),), {})}
    assert "must both be multiples of 4" in uses["head"].stays and uses["head"].calls
    assert [name for name, use in uses.items() if not use.stays] == LINEAR_NAMES
    uses = {use.name: use for use in from_forward(Network(), (torch.ones(2, 3, 8),), {}, "mlp", "fc1")}
    assert [name for name, use in uses.items() if not use.stays] == ["blocks.0.mlp.fc2", "blocks.1.mlp.fc2"]
    assert (uses["blocks.0.mlp.fc1"].stays, uses["blocks.0.attn.qkv"].stays) == ("excluded", "not selected")
    model = Network()
    model.head = nn.Linear(8, 12)
    assert "output head" in {use.name: use for use in from_forward(model, (torch.ones(2, 3, 8),), {})}["head"].stays


def test_a_bypassed_layer_is_named() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.hidden = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.layer(x), self.hidden.weight)

    uses = from_forward(Reads(), (torch.ones(4, 16),), {})
    assert "reads its weight itself and never calls the layer" in uses[1].stays


def test_the_error_of_the_model_comes_through_and_nothing_stays_behind() -> None:
    model = Network()
    before = Snapshot(model)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        from_forward(model, (torch.ones(2, 3, 9),), {})
    before.assert_unchanged()
    assert not any(module._forward_pre_hooks for module in model.modules())
    from_forward(model, (torch.ones(2, 3, 8),), {})
    before.assert_unchanged()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_numbers_of_tokens_by_hand() -> None:
    model = Attention(device="meta", dtype=torch.bfloat16)
    uses = {use.name: use for use in from_tokens(model, {"*": 8, "out": {4: 1, 2: 2}})}
    assert uses["q"].calls == ((LinearProblem(8, 16, 16), 1.0),)
    assert uses["out"].calls == ((LinearProblem(4, 16, 32), 1.0), (LinearProblem(2, 16, 32), 2.0))
    uses = {use.name: use for use in from_tokens(model, {"q": 8})}
    assert [name for name, use in uses.items() if not use.stays] == ["q"]
    assert all(use.calls[0][0].tokens == 64 for use in from_tokens(model, 64))


@pytest.mark.parametrize("tokens", [0, -1, 1.5, "8", {"q": 0}, {"q": {}}, {"q": {8: 0}}, {"q": {"8": 1}}, {3: 8}, True])
def test_wrong_numbers_of_tokens_are_refused(tokens: Any) -> None:
    with pytest.raises(ConfigError, match="tokens"):
        from_tokens(Attention(), tokens)


def test_wrong_names_are_refused() -> None:
    with pytest.raises(NoLayerMatchedError, match="tokens: 'quux' matches no"):
        from_tokens(Attention(), {"quux": 8})
    with pytest.raises(NoLayerMatchedError, match=r"contains no nn\.Linear"):
        from_forward(nn.ReLU(), (torch.ones(4),), {})


def test_a_tied_layer_is_one_row() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
    model.append(model[0])
    (use,) = from_forward(model, (torch.ones(4, 16),), {})
    assert use.name == "0"
    assert sum(count for _, count in use.calls) == 2


def test_layers_in_inference_mode_are_seen_as_those_that_need_no_gradient() -> None:
    """As a frozen teacher runs."""

    class Taught(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher, self.student = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            with torch.inference_mode():
                target = self.teacher(self.teacher(x))
            return self.student(x) - target

    teacher, student = from_forward(Taught(), (torch.ones(4, 16),), {})
    ((problem, count),) = teacher.calls
    assert (count, problem.grad_input, problem.grad_weight) == (2, False, False)
    assert student.calls[0][0].grad_weight and teacher.reads[0] == student.reads[0] != teacher.reads[1]


class Stored4Bit(nn.Linear):
    """As quantising libraries store weights."""

    def __init__(self) -> None:
        super().__init__(16, 16)
        self.weight = nn.Parameter(torch.zeros(128, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    "layer",
    [Stored4Bit(), nn.Linear(16, 16, dtype=torch.complex64), pytest.param((16, 0), id="empty")],
    ids=lambda one: type(one).__name__,
)
@pytest.mark.parametrize("tokens", [None, 4])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_of_dtypes_or_sizes_that_are_not_timed_stays_dense_and_its_plan_can_be_read(
    layer: Any, tokens: int | None, tmp_path: Path
) -> None:
    model = nn.Sequential(layer if isinstance(layer, nn.Linear) else nn.Linear(*layer))
    dtype = model[0].weight.dtype if model[0].weight.is_complex() else torch.float32
    inputs = (torch.ones(4, 16, dtype=dtype),) if tokens is None else ()
    plan = planned(uses_of(model, inputs, {}, tokens), measurer())
    (row,) = plan
    assert row.choice == "dense" and not row.calls and row.why not in ("", "never called in this forward")
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_lazy_layers_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.LazyLinear(16))
    with pytest.raises(ConfigError, match=r"model: 1\.weight is lazy, without a size yet: run one forward first"):
        from_forward(model, (torch.ones(4, 16),), {})
    assert isinstance(model[1], nn.LazyLinear)
