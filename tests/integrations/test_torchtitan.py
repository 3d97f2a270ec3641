"""Converter and hook on the debug model of the real torchtitan; its Trainer, which needs a GPU, is not run."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import semisparse
from semisparse import SparseConfig, recipes
from semisparse.errors import ConfigError, NoLayerMatchedError, ScheduleError

pytest.importorskip("torchtitan", reason="make test installs it")

from torchtitan.components.lora import LoRAConverter
from torchtitan.components.optimizer.optimizer import default_adamw
from torchtitan.models.common.linear import Linear
from torchtitan.models.llama3 import model_registry

from semisparse.integrations.torchtitan import ScheduleHook, SemiSparseConverter, SparseLinear

pytestmark = pytest.mark.filterwarnings("ignore")  # the host's own, which change with its versions
HALF = recipes.safest(sparse_fraction=0.5)


def built(*converters: Any) -> nn.Module:
    """The debug model without values."""
    with torch.device("meta"):
        return model_registry("debugmodel", converters=list(converters)).model.build()


def block() -> nn.Module:
    """One feed-forward block with values."""
    spec = model_registry("debugmodel", converters=[SemiSparseConverter.Config()])
    model = spec.model.layers[0].feed_forward.build()
    model.init_states()
    return model


def trained(hook: ScheduleHook, steps: int) -> tuple[nn.Module, list[str]]:
    """A block after some steps, and the phase of each."""
    model, phases = block(), []
    optimizers = default_adamw().build(model_parts=[model])
    hook(optimizers, [model], None)
    for _ in range(steps):
        phases.append("sparse" if model.w1.sparse_enabled else "dense")
        model(torch.randn(4, 256)).square().mean().backward()
        optimizers.step()
        optimizers.zero_grad()
        optimizers.state_dict()  # as a checkpoint does; may step an optimizer without gradients
    return model, phases


def test_every_linear_but_the_head_is_converted_and_the_protocol_holds() -> None:
    model = built(SemiSparseConverter.Config())
    model.verify_module_protocol()
    plain = [name for name, module in model.named_modules() if type(module) is Linear]
    assert plain == ["lm_head"]
    assert all(isinstance(layer, Linear) for layer in semisparse.semi_sparse_layers(model).values())
    semisparse.densify(model)
    model.verify_module_protocol()
    assert not any(isinstance(module, SparseLinear) for module in model.modules())


def test_states_are_initialised_as_without_the_converter() -> None:
    torch.manual_seed(0)
    ours = block().w1.weight
    torch.manual_seed(0)
    theirs = model_registry("debugmodel").model.layers[0].feed_forward.build()
    theirs.init_states()
    assert torch.equal(ours, theirs.w1.weight)


def test_a_copy_is_sparse_too() -> None:
    layer = block().w1
    x = torch.randn(4, 256)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_the_hook_counts_the_steps_of_the_container() -> None:
    hook = ScheduleHook(4, HALF)
    model, phases = trained(hook, 4)
    assert phases == ["sparse", "sparse", "dense", "dense"]
    semisparse.densify(model)
    assert type(model.w1) is Linear


def test_a_run_continues_at_a_step() -> None:
    hook = ScheduleHook(4, HALF)
    trained(hook, 0)
    hook.resume_at(2)
    assert hook.schedule is not None
    assert hook.schedule.phase == "dense"


def test_a_hook_that_the_model_has_already_is_called_first() -> None:
    calls: list[Any] = []
    hook = ScheduleHook(4, before=lambda *arguments: calls.append(arguments))
    trained(hook, 0)
    assert len(calls) == 1
    with pytest.raises(ScheduleError, match="another trainer"):
        trained(hook, 0)


@pytest.mark.parametrize(
    ("settings", "count"),
    [({"select": ["feed_forward"]}, 18), ({"exclude": ["*.wo", "w2"]}, 18), ({"select": ["lm_head"]}, 1)],
)
def test_names_select_layers_as_in_sparsify(settings: dict[str, list[str]], count: int) -> None:
    assert len(semisparse.semi_sparse_layers(built(SemiSparseConverter.Config(**settings)))) == count


def test_a_name_that_matches_nothing_is_an_error_with_the_closest_ones() -> None:
    with pytest.raises(NoLayerMatchedError, match=r"'feedforward' matches no Linear; closest names: .*feed_forward"):
        built(SemiSparseConverter.Config(select=["feedforward"]))
    with pytest.raises(NoLayerMatchedError, match="no Linear of the model would change"):
        built(SemiSparseConverter.Config(exclude=["*"]))


def test_lora_comes_after_the_converter() -> None:
    lora = LoRAConverter.Config(target_modules=["wo"])
    model = built(SemiSparseConverter.Config(), lora)
    assert isinstance(model.layers["0"].attention.wo, SparseLinear)
    with pytest.raises(NoLayerMatchedError, match="another converter's"):
        built(lora, SemiSparseConverter.Config())


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not prune the weight"):
        built(SemiSparseConverter.Config(sparse=SparseConfig(weight=None, activation="transposable")))
    with pytest.raises(ConfigError, match="more state than a counter"):
        ScheduleHook(4, recipes.fst())
    with pytest.raises(ConfigError, match="tensor_parallel_degree"):
        ScheduleHook(4)(None, [], SimpleNamespace(tp_enabled=True))
    with pytest.raises(ConfigError, match="total_steps=0"):
        trained(ScheduleHook(0), 0)
