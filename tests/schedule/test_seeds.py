"""The random numbers of grad_output="mvue" under a schedule: set, advanced, saved and resumed."""

import copy

import pytest
import torch
from torch import nn

from semisparse import SparseConfig, SparseSchedule, sparsify
from semisparse.errors import ConfigError, ScheduleError
from semisparse.nn import SemiSparseLinear
from semisparse.sampling import layer_seed
from semisparse.schedule import Phase
from semisparse.testing import assert_bit_equal
from tests.schedule.models import train
from tests.support import COPIES

SAMPLED = SparseConfig(grad_output="mvue")
PHASES = [Phase("sparse", 3), Phase("dense", 2), Phase("sparse", 4)]


def net(config: SparseConfig | dict[str, SparseConfig] = SAMPLED) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    sparsify(model, config)
    return model


def started(seed: int = 5) -> tuple[nn.Sequential, torch.optim.Optimizer, SparseSchedule]:
    model = net()
    return model, torch.optim.AdamW(model.parameters(), 1e-2), SparseSchedule(model, PHASES, seed=seed)


def keys_of(model: nn.Module) -> list[int]:
    return [int(layer.held_seed) for layer in model.modules() if isinstance(layer, SemiSparseLinear)]


def wanted(seed: int, steps: int) -> list[int]:
    return [layer_seed(seed, name, 0, steps) for name in ("0", "2")]


def test_each_layer_has_a_key_that_an_applied_step_advances_in_place() -> None:
    model, optimizer, schedule = started()
    tensors = [model[0].held_seed, model[2].held_seed]
    assert keys_of(model) == wanted(5, 0)
    for step in range(1, 8):  # through all phases
        train(model, optimizer)
        assert keys_of(model) == wanted(5, step - 1)
        assert schedule.step()
        assert keys_of(model) == wanted(5, step)
    assert not schedule.step() and keys_of(model) == wanted(5, 7)  # nothing was applied
    assert model[0].held_seed is tensors[0] and model[2].held_seed is tensors[1]
    assert all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


def test_a_layer_that_does_not_sample_has_no_key() -> None:
    model = net({"0": SAMPLED, "2": SparseConfig()})
    schedule = SparseSchedule(model, PHASES)
    assert model[0].held_seed is not None and model[2].held_seed is None
    assert "seed" in schedule.state_dict()


def test_a_resumed_run_continues_bit_for_bit(tmp_path) -> None:
    model, optimizer, schedule = started()
    batches = [torch.randn(12, 16) for _ in range(7)]

    def steps(parts, first: int, last: int) -> None:
        model, optimizer, schedule = parts
        for x in batches[first:last]:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            assert schedule.step()

    steps((model, optimizer, schedule), 0, 2)
    torch.save([part.state_dict() for part in (model, optimizer, schedule)], tmp_path / "state.pt")
    steps((model, optimizer, schedule), 2, 7)
    other = started(seed=99)
    for part, state in zip(other, torch.load(tmp_path / "state.pt"), strict=True):
        part.load_state_dict(state)
    assert keys_of(other[0]) == wanted(5, 2)
    steps(other, 2, 7)
    for ours, theirs in zip(model.parameters(), other[0].parameters(), strict=True):
        assert_bit_equal(ours, theirs)
    different = started(seed=99)
    different[0].load_state_dict(torch.load(tmp_path / "state.pt")[0])
    steps(different, 2, 7)
    assert not torch.equal(different[0][0].weight, model[0].weight)


def test_resume_at_sets_the_keys() -> None:
    model, _, schedule = started()
    schedule.resume_at(6)
    assert keys_of(model) == wanted(5, 6)


@pytest.mark.parametrize("seed", [None, 1.0, True, "1"], ids=repr)
def test_a_seed_that_is_no_whole_number_is_refused(seed: object) -> None:
    with pytest.raises(ConfigError, match=r"seed=.*must be a whole number"):
        SparseSchedule(net(), PHASES, seed=seed)  # type: ignore[arg-type]
    _, _, schedule = started()
    state = schedule.state_dict()
    with pytest.raises(ScheduleError, match=r"state\['seed'\]="):
        schedule.load_state_dict({**state, "seed": seed})
    assert schedule.state_dict() == state


def test_a_state_without_a_seed_is_refused() -> None:
    model, _, schedule = started()
    state = {name: value for name, value in schedule.state_dict().items() if name != "seed"}
    with pytest.raises(ScheduleError, match=r"not a saved SparseSchedule.*seed"):
        schedule.load_state_dict(state | {"applied_steps": 2})
    assert keys_of(model) == wanted(5, 0)


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_a_copy_of_model_and_schedule_has_keys_of_its_own(make_copy) -> None:
    model, _, schedule = started()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    train(model, optimizer)
    schedule.step()
    other, again = make_copy((model, schedule))
    train(model, optimizer)
    schedule.step()
    assert keys_of(model) == wanted(5, 2) and keys_of(other) == wanted(5, 1)
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    train(other, optimizer)
    assert again.step()
    assert keys_of(other) == wanted(5, 2)
    assert copy.deepcopy(model)[0].held_seed is not model[0].held_seed


def test_a_layer_made_dense_is_left_alone() -> None:
    model, _, schedule = started()
    SemiSparseLinear.to_dense(model[0])
    assert "held_seed" not in vars(model[0])
    schedule._seeds.advance(1)
    assert "held_seed" not in vars(model[0])
    assert int(model[2].held_seed) == layer_seed(5, "2", 0, 1)


def test_a_layer_that_was_moved_gets_its_key_anew() -> None:
    model, _, schedule = started()
    model[0].held_seed = model[0].held_seed.to("meta")  # as if the layer were on another device than its key
    schedule._seeds.advance(1)
    assert keys_of(model) == wanted(5, 1)


def test_loading_writes_the_keys_where_a_captured_graph_reads_them() -> None:
    model, optimizer, schedule = started()
    tensors, state = [model[0].held_seed, model[2].held_seed], schedule.state_dict()
    train(model, optimizer)
    schedule.step()
    schedule.load_state_dict(state | {"seed": 8})
    assert keys_of(model) == wanted(8, 0)
    assert [id(layer.held_seed) for layer in (model[0], model[2])] == [id(tensor) for tensor in tensors]


def test_layers_on_the_meta_device_get_their_keys_once_they_have_data() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        sparsify(model, SAMPLED)
        schedule = SparseSchedule(model, PHASES, seed=5)
    assert model[0].held_seed is None
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(8, 16)
    model(x).sum().backward()
    assert model[2].weight.grad.isfinite().all()
    schedule._seeds.advance(1)
    assert keys_of(model) == wanted(5, 1)


def test_a_schedule_that_starts_without_autograd_can_train() -> None:
    model = net()
    with torch.inference_mode():
        SparseSchedule(model, PHASES)
    model(torch.randn(8, 16)).sum().backward()
