"""Layers whose weight something else trains: the first step raises, and only then."""

import gc
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semisparse import Phase, SparseConfig, SparseSchedule, sparsify
from semisparse.errors import ScheduleError
from tests.schedule.models import net, train
from tests.support import config_of


class Bypass(nn.Module):
    """`proj` is read through a list, which no source shows; `spare` is not used at all."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.proj, self.spare = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.hidden = [self.proj]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.first(x), self.hidden[0].weight)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("zeroed", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_bypassed_layer_stops_the_first_step(fused: bool, zeroed: bool, compiled: bool) -> None:
    model = Bypass()
    sparsify(model, exclude="spare")
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    schedule = SparseSchedule.sparse_then_dense(model, 4)
    train(model, optimizer, torch.compile(model, backend="aot_eager") if compiled else None)
    if zeroed:
        optimizer.zero_grad()
    with pytest.raises(ScheduleError, match=r"^proj: swapped, but not called since.*semisparse\.check"):
        schedule.step()
    assert schedule.applied_steps == 0


def test_an_untrained_layer_only_causes_a_warning() -> None:
    model = Bypass()
    model.forward = lambda x: model.proj(model.first(x))
    sparsify(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = SparseSchedule.sparse_then_dense(model, 4)
    train(model, optimizer)
    with pytest.warns(UserWarning, match=r"^spare: swapped, but neither called nor trained"):
        assert schedule.step()
    train(model, optimizer)
    assert schedule.step()  # said once


def test_zeroed_gradients_are_not_a_sign_of_training() -> None:
    model = Bypass()
    model.forward = lambda x: model.proj(model.first(x))
    sparsify(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.spare.weight.grad = torch.zeros_like(model.spare.weight)  # as zero_grad(set_to_none=False) leaves it
    schedule = SparseSchedule.sparse_then_dense(model, 4)
    model(torch.randn(4, 16)).sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="neither called nor trained"):
        assert schedule.step()


def test_calls_are_asked_for_when_the_sparse_phase_begins() -> None:
    model = Bypass()
    sparsify(model, exclude="spare")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = SparseSchedule(model, [Phase("dense", 2), Phase("sparse", 2)])
    for _ in range(2):  # in a dense phase a bypass changes nothing
        train(model, optimizer)
        assert schedule.step()
    train(model, optimizer)
    with pytest.raises(ScheduleError, match="proj: swapped, but not called"):
        schedule.step()


# torch.compile asks so of each non-leaf input whose shape a block looks at.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("how", ["whole", "blocks", "checkpointed"])
def test_compiled_models_raise_no_alarm(how: str) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(3)))
    sparsify(model)
    call = model
    if how == "whole":
        call = torch.compile(model, backend="aot_eager", fullgraph=True)
    elif how == "blocks":
        for block in model:
            block.compile(backend="aot_eager")
    else:

        def call(x):
            return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

    optimizer = torch.optim.AdamW(model.parameters())
    schedule = SparseSchedule.sparse_then_dense(model, 4)
    for _ in range(4):
        train(model, optimizer, call)
        assert schedule.step()


@pytest.mark.parametrize("start", [0, 2])
def test_compiled_models_whose_weights_move_before_the_optimizer_steps_raise_no_alarm(start: int) -> None:
    model = net()
    call, optimizer = torch.compile(model, backend="aot_eager", fullgraph=True), torch.optim.SGD(model.parameters())
    schedule = SparseSchedule(model, [Phase("dense", start), Phase("sparse", 1)][not start :])
    before = []  # kept, so that no address comes again
    for _ in range(start + 1):
        call(torch.randn(4, 16)).square().mean().backward()
        for parameter in model.parameters():
            before.append(parameter.data)
            parameter.data = parameter.data.clone()  # as SAM puts weights back
        optimizer.step()
        assert schedule.step()
    assert not schedule._layers.awaits_calls


def test_the_mark_of_a_call_costs_compiled_code_nothing() -> None:
    torch.compiler.reset()  # of what other tests compiled of the same code: there is a limit
    model = net()
    graphs = []

    def backend(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes])
        return graph.forward

    torch.compile(model, backend=backend, fullgraph=True)(torch.randn(4, 16))
    assert len(graphs) == 1
    assert not any(layer._called for layer in (model[0], model[2]))


def test_all_schedules_share_one_hook_and_leave_nothing_behind() -> None:
    from torch.optim import optimizer as torch_optimizer

    from semisparse.schedule import optimizer_steps

    schedule = SparseSchedule.sparse_then_dense(net(), 2)
    hooks, listeners = len(torch_optimizer._global_optimizer_post_hooks), len(optimizer_steps._listeners)
    more = [SparseSchedule.sparse_then_dense(net(), 2) for _ in range(3)]
    assert len(torch_optimizer._global_optimizer_post_hooks) == hooks  # taken off, they could change while torch steps
    assert len(optimizer_steps._listeners) == listeners + 3
    del schedule, more
    gc.collect()
    assert len(optimizer_steps._listeners) <= listeners - 1


def test_nothing_is_said_of_an_ordinary_run() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = SparseSchedule.sparse_then_dense(model, 3, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            train(model, optimizer)
            assert schedule.step()


def test_the_activation_operand_is_judged_in_eager_mode_too() -> None:
    model = Bypass()
    sparsify(model, SparseConfig(weight=None, activation="transposable"), exclude="spare")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = SparseSchedule.sparse_then_dense(model, 4)
    train(model, optimizer)
    with pytest.raises(ScheduleError, match="proj: swapped, but not called"):
        schedule.step()


class Spare(nn.Module):
    """`b` is not used: an expert without tokens, a pooler, a dropped layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)


def spare() -> Spare:
    model = Spare()
    sparsify(model)
    return model


NOT_TRAINED = r"^(module\.|0\.)?b: swapped, but neither called nor trained"


def test_a_first_step_that_overflows_decides_nothing() -> None:
    model = spare()
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu")
    schedule = SparseSchedule.sparse_then_dense(model, 4)
    for factor in (float("inf"), 1.0):
        scaler.scale(model(torch.randn(4, 16)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if factor == 1.0:
            with pytest.warns(UserWarning, match=NOT_TRAINED):
                assert schedule.step(scaler)
        else:
            assert not schedule.step(scaler)


def test_a_frozen_sparse_base_raises_no_alarm() -> None:
    model = nn.Sequential(spare().requires_grad_(False), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model[1].parameters(), 0.1)
    schedule = SparseSchedule.sparse_then_dense(model, 4)
    train(model, optimizer)
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match=NOT_TRAINED):
        assert schedule.step()


def test_a_compiled_optimizer_raises_no_alarm() -> None:
    model = spare()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = SparseSchedule.sparse_then_dense(model, 4)
    model(torch.randn(4, 16)).sum().backward()
    torch.compile(optimizer.step, backend="eager")()
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match=NOT_TRAINED):
        assert schedule.step()


def test_parameters_that_were_assigned_anew_are_followed() -> None:
    model = spare()
    schedule = SparseSchedule.sparse_then_dense(model, 4)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    train(model, optimizer)
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match=NOT_TRAINED):
        assert schedule.step()


class AllBypassed(nn.Module):
    """Every layer is read through a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.linear(x, layer.weight, layer.bias)
        return x


@pytest.mark.parametrize("early", [False, True])
def test_a_model_whose_layers_are_all_bypassed_is_stopped(early: bool) -> None:
    model = AllBypassed()
    sparsify(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = SparseSchedule.sparse_then_dense(model, 10)
    if early:
        schedule.step()  # before any forward: nothing to be told yet, and nothing decided
    train(model, optimizer)
    with pytest.raises(ScheduleError, match=r"layers\.0, layers\.1, layers\.2: swapped, but not called since: "):
        schedule.step()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("which", ["one block", "all blocks", "an eager look first"])
def test_activation_layers_compiled_by_block_raise_no_alarm(which: str, backend: str) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16)) for _ in range(3)))
    sparsify(model, SparseConfig(weight=None, activation="transposable"))
    schedule = SparseSchedule.sparse_then_dense(model, 10)
    if which == "an eager look first":
        model[0](torch.randn(4, 16))
    for block in model if which == "all blocks" else model[1:2]:
        block.compile(backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        train(model, optimizer)
        optimizer.zero_grad()
        assert schedule.step()


def test_a_replica_of_data_parallel_calls_for_its_original() -> None:
    model = net()
    replica = model[0]._replicate_for_data_parallel()
    replica.weight, replica.bias = model[0].weight.detach(), None
    replica(torch.randn(4, 16))
    assert model[0]._called
    assert "_stands_for" not in dict(replica.named_modules())


def test_a_penalty_on_an_expert_in_waiting_can_be_trusted() -> None:
    model = spare()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = SparseSchedule.sparse_then_dense(model, 4)
    penalty = sum(parameter.square().sum() for parameter in model.parameters())
    (model(torch.randn(4, 16)).square().mean() + penalty).backward()
    optimizer.step()
    with pytest.raises(ScheduleError, match=r"b: swapped, but not called.*schedule\.trust_calls\(\)"):
        schedule.step()
    schedule.trust_calls()
    optimizer.step()
    assert schedule.step()


@pytest.mark.parametrize("operand", ["weight", "activation"])
def test_a_tied_layer_trains_through_the_other(operand: str) -> None:
    model = Spare()
    model.b.weight = model.a.weight
    sparsify(model, config_of(operand))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = SparseSchedule.sparse_then_dense(model, 4)
    train(model, optimizer)
    assert schedule.step()


def test_a_check_in_another_thread_hides_no_step() -> None:
    import threading

    from semisparse import calls

    inside, done = threading.Event(), threading.Event()

    def look() -> None:
        with calls.unnoticed():
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=look)
    thread.start()
    inside.wait(10)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = SparseSchedule.sparse_then_dense(model, 4)
    train(model, optimizer)
    assert schedule.step()
    done.set()
    thread.join()


def test_trusting_calls_ends_the_look_at_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would wait for the device once per layer at every step."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    sparsify(model)
    schedule = SparseSchedule.sparse_then_dense(model, 10)
    schedule.trust_calls()
    monkeypatch.setattr("semisparse.schedule.applied_steps._has_gradient", None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.randn(4, 16)).sum().backward()
        optimizer.step()
        assert schedule.step()
