"""Converter and hook on the debug model of the real torchtitan; test_torchtitan_trainer.py runs its Trainer."""

import copy
import dataclasses
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
from torchtitan.components.optimizer.optimizer import OptimizersContainer, ParamGroupConfig, default_adamw
from torchtitan.models.common.linear import Linear
from torchtitan.models.llama3 import model_registry

from semisparse.integrations.torchtitan import ScheduleHook, SemiSparseConverter, SparseLinear

pytestmark = pytest.mark.filterwarnings("ignore")  # the host's own, which change with its versions
HALF = recipes.safest(sparse_fraction=0.5)
COUNTING, UNCOUNTED = "AdamW", "SGD"


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


def group(optimizer: str, pattern: str) -> ParamGroupConfig:
    """An optimizer for the weights with matching names."""
    settings: dict[str, Any] = {"momentum": 0.9} if optimizer == UNCOUNTED else {}
    return ParamGroupConfig(pattern=pattern, optimizer_name=optimizer, optimizer_kwargs={"lr": 1e-3, **settings})


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


@pytest.fixture
def any_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGD stands for DistMuon, whose state has no count either."""
    factory = staticmethod(lambda name: getattr(torch.optim, name))
    monkeypatch.setattr(OptimizersContainer, "_resolve_optimizer_factory", factory)


def resumed(groups: list[ParamGroupConfig], hook: ScheduleHook) -> Any:
    """Optimizers that hook counts, after three steps of another run were loaded into them."""
    config = OptimizersContainer.Config(param_groups=groups, implementation="for-loop")
    theirs, ours = block(), block()
    saved, optimizers = config.build(model_parts=[theirs]), config.build(model_parts=[ours])
    hook(optimizers, [ours], None)
    for _ in range(3):
        theirs(torch.randn(4, 256)).square().mean().backward()
        saved.step()
        saved.zero_grad()
    optimizers.state_dict()  # asked for what to load, as in a checkpoint's loading
    optimizers.load_state_dict(saved.state_dict())
    return optimizers


@pytest.mark.usefixtures("any_optimizer")
@pytest.mark.parametrize("first", [COUNTING, UNCOUNTED])
def test_loaded_optimizers_tell_where_the_run_is_if_one_of_them_counts(first: str) -> None:
    other = COUNTING if first == UNCOUNTED else UNCOUNTED
    hook = ScheduleHook(6, HALF)
    optimizers = resumed([group(first, "w1"), group(other, ".*")], hook)
    assert hook.schedule is not None
    assert (hook.schedule.applied_steps, hook.schedule.phase) == (3, "dense")
    optimizers.step()
    assert hook.schedule.applied_steps == 4


@pytest.mark.usefixtures("any_optimizer")
def test_optimizers_that_do_not_count_are_an_error_before_a_step_in_the_wrong_phase() -> None:
    hook = ScheduleHook(6, HALF)
    optimizers = resumed([group(UNCOUNTED, ".*")], hook)
    with pytest.raises(ScheduleError, match=r"do not count their steps: call ScheduleHook\.resume_at"):
        optimizers.step()
    hook.resume_at(3)
    optimizers.step()
    assert hook.schedule is not None
    assert hook.schedule.applied_steps == 4


def attached(hook: ScheduleHook, graphs: bool = False, steps: int = 4) -> ScheduleHook:
    """A hook whose trainer has parallelized the model."""
    spec = model_registry("debugmodel", converters=[SemiSparseConverter.Config()])
    spec = hook.attach(dataclasses.replace(spec, parallelize_fn=lambda model, **_: model))
    training = SimpleNamespace(steps=steps, disable_cuda_graphs=not graphs)
    spec.parallelize_fn(nn.Identity(), parallel_dims=None, training=training)
    assert spec.post_optimizer_build_fn is hook
    return hook


def test_an_attached_hook_takes_the_steps_of_the_training() -> None:
    assert trained(attached(ScheduleHook(recipe=HALF)), 4)[1] == ["sparse", "sparse", "dense", "dense"]
    with pytest.raises(ConfigError, match=r"total_steps=4 .* training\.steps=5"):
        attached(ScheduleHook(4), steps=5)
    with pytest.raises(ConfigError, match=r"total_steps=None: .*attach"):
        trained(ScheduleHook(), 0)


def test_a_seed_checkpoint_starts_nothing() -> None:
    hook = ScheduleHook()
    hook.attach(model_registry("debugmodel", converters=[SemiSparseConverter.Config()]))
    assert trained(hook, 1)[1] == ["sparse"]  # torchtitan parallelizes nothing and trains nothing then
    assert hook.schedule is None


def test_a_recorded_graph_would_not_see_the_next_phase_and_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = recipes.safest(sparse_fraction=1.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(ConfigError, match=r"--training\.disable_cuda_graphs"):
        trained(attached(ScheduleHook(), graphs=True), 0)
    parts = [block()]
    with pytest.raises(ConfigError, match=r"cannot see training\.disable_cuda_graphs"):
        ScheduleHook(4)(default_adamw().build(model_parts=parts), parts, SimpleNamespace(tp_enabled=False))
    for hook in (attached(ScheduleHook()), attached(ScheduleHook(recipe=whole), graphs=True)):
        trained(hook, 0)
        assert hook.schedule is not None


def test_what_has_no_sparse_layer_or_a_hook_already_takes_no_hook() -> None:
    with pytest.raises(NoLayerMatchedError, match="llama3 debugmodel has no semi-sparse layer"):
        ScheduleHook().attach(model_registry("debugmodel"))
    spec = ScheduleHook().attach(model_registry("debugmodel", converters=[SemiSparseConverter.Config()]))
    with pytest.raises(ScheduleError, match="a ScheduleHook already"):
        ScheduleHook().attach(spec)


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
