"""SparseSchedule: every step of it, resuming, and what is wrong with its phases."""

import copy
import json
import pickle

import pytest
import torch
from torch import Tensor, nn

from semisparse import Phase, SparseConfig, SparseSchedule, sparsify
from semisparse.errors import NoLayerMatchedError, ScheduleError
from semisparse.testing import assert_bit_equal


def network() -> nn.Sequential:
    """Two semi-sparse layers of different kinds."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4))
    sparsify(model, select="0")
    sparsify(model, SparseConfig(weight=None, activation="transposable"), select="2")
    return model


def flags(model: nn.Sequential) -> list[bool]:
    return [model[0].sparse_enabled, model[2].sparse_enabled]


def kinds(schedule: SparseSchedule, steps: int) -> str:
    """The kind of each of the next steps, as the layers themselves have it: s or d."""
    seen = ""
    for _ in range(steps):
        first, second = (layer.sparse_enabled for layer in schedule._layers.by_name.values())
        assert first == second == (schedule.phase == "sparse")
        seen += schedule.phase[0]
        assert schedule.step() is True
    return seen


PLANS = {
    "sparse_dense": ([Phase("sparse", 3), Phase("dense", 2)], "sssdd"),
    "dense_sparse_dense": ([Phase("dense", 1), Phase("sparse", 2), Phase("dense", 1)], "dssd"),
    "only_sparse": ([Phase("sparse", 2)], "ss"),
    "only_dense": ([Phase("dense", 2)], "dd"),
    "zero_first": ([Phase("sparse", 0), Phase("dense", 2)], "dd"),
    "zero_last": ([Phase("sparse", 2), Phase("dense", 0)], "ss"),
    "zero_between": ([Phase("dense", 1), Phase("sparse", 0), Phase("dense", 1)], "dd"),
    "zeros_around": ([Phase("dense", 0), Phase("dense", 0), Phase("sparse", 1), Phase("dense", 0)], "s"),
    "one_each": ([Phase(kind, 1) for kind in ("sparse", "dense", "sparse", "dense")], "sdsd"),
}


@pytest.mark.parametrize("plan", PLANS)
def test_every_step_runs_in_its_phase_and_the_last_kind_stays(plan: str) -> None:
    phases, expected = PLANS[plan]
    schedule = SparseSchedule(network(), phases, total_steps=len(expected))
    assert kinds(schedule, len(expected) + 5) == expected + 5 * expected[-1]
    assert schedule.applied_steps == len(expected) + 5
    assert schedule.phases == tuple(phases)


@pytest.mark.parametrize(("total", "fraction", "sparse"), [
    (10, 0.7, 7), (10, 0.0, 0), (10, 1.0, 10), (125_000, 0.7, 87_500), (3, 0.5, 2), (1, 0.4, 0), (1, 0.6, 1),
    (10, 1, 10),
])  # fmt: skip
def test_sparse_then_dense_splits_the_steps(total: int, fraction: float, sparse: int) -> None:
    schedule = SparseSchedule.sparse_then_dense(network(), total_steps=total, sparse_fraction=fraction)
    assert schedule.phases == (Phase("sparse", sparse), Phase("dense", total - sparse))
    assert schedule.phase == ("sparse" if sparse else "dense")


def test_seventy_percent_is_the_default() -> None:
    assert SparseSchedule.sparse_then_dense(network(), 100).phases == (Phase("sparse", 70), Phase("dense", 30))


@pytest.mark.parametrize(("total", "start", "sparse", "steps"), [
    (10, 0.2, 0.5, (2, 5, 3)), (10, 0.0, 1.0, (0, 10, 0)), (10, 0.3, 0.7, (3, 7, 0)), (3, 0.5, 0.5, (2, 1, 0)),
    (7, 0.35, 0.65, (2, 5, 0)), (1, 0.5, 0.5, (0, 1, 0)), (10, 0.5, 0.0, (5, 0, 5)),
])  # fmt: skip
def test_dense_sparse_dense_splits_the_steps(total: int, start: float, sparse: float, steps: tuple[int, ...]) -> None:
    phases = SparseSchedule.dense_sparse_dense(network(), total, start, sparse).phases
    assert [phase.kind for phase in phases] == ["dense", "sparse", "dense"]
    assert tuple(phase.steps for phase in phases) == steps
    assert sum(phase.steps for phase in phases) == total


def test_switching_is_a_flag_and_touches_neither_types_nor_parameters_nor_modes() -> None:
    model = network()
    parameters = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    types, dense_layer = [type(module) for module in model], dict(vars(model[4]))
    schedule = SparseSchedule(model, [Phase("dense", 1), Phase("sparse", 1)])
    model.eval()
    schedule.step()
    model.train()
    assert flags(model) == [True, True]
    assert [type(module) for module in model] == types
    assert vars(model[4]).keys() == dense_layer.keys()
    for name, parameter in model.named_parameters():
        assert id(parameter) == parameters[name][0]
        assert_bit_equal(parameter, parameters[name][1])


def test_a_dense_phase_applies_no_mask() -> None:
    model, dense = network(), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4))
    dense.load_state_dict(model.state_dict())
    x = torch.randn(8, 8)
    schedule = SparseSchedule(model, [Phase("dense", 1), Phase("sparse", 1), Phase("dense", 1)])
    assert_bit_equal(model(x), dense(x))
    schedule.step()
    assert not torch.equal(model(x), dense(x))
    schedule.step()
    assert_bit_equal(model(x), dense(x))


class Run:
    """A short training that can be saved and resumed."""

    PHASES = (Phase("dense", 2), Phase("sparse", 4), Phase("dense", 3))

    def __init__(self) -> None:
        self.model = network()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.schedule = SparseSchedule(self.model, self.PHASES)

    def steps(self, first: int, last: int) -> list[Tensor]:
        losses = []
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            self.optimizer.zero_grad()
            loss = self.model(torch.randn(8, 8, generator=generator)).square().mean()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            losses.append(loss.detach())
        return losses

    def save(self, path) -> None:
        parts = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        torch.save({name: part.state_dict() for name, part in parts.items()}, path)

    def load(self, path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


@pytest.mark.parametrize("stop", range(10))
def test_resuming_after_any_step_continues_bit_for_bit(stop: int, tmp_path) -> None:
    whole, first, second = Run(), Run(), Run()
    losses = whole.steps(0, 9)
    begun = first.steps(0, stop)
    first.save(tmp_path / "run.pt")
    second.load(tmp_path / "run.pt")
    assert flags(second.model) == flags(first.model)
    assert second.schedule.phase == first.schedule.phase
    continued = second.steps(stop, 9)
    assert torch.equal(torch.stack(losses), torch.stack(begun + continued))
    for ours, other in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert_bit_equal(ours, other)
    assert flags(second.model) == flags(whole.model)


def test_the_state_is_plain_data_and_survives_json_and_copies() -> None:
    schedule = SparseSchedule(network(), PLANS["dense_sparse_dense"][0])
    schedule.step()
    state = schedule.state_dict()
    for copied in (json.loads(json.dumps(state)), copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        other = SparseSchedule(network(), PLANS["dense_sparse_dense"][0])
        other.load_state_dict(copied)
        assert (other.applied_steps, other.phase) == (1, "sparse")
        assert other.state_dict() == state
    assert not any(isinstance(value, Tensor) for value in state.values())


def test_the_model_holds_no_schedule_state() -> None:
    model = network()
    before = list(model.state_dict())
    SparseSchedule(model, [Phase("sparse", 5)]).step()
    assert list(model.state_dict()) == before


BAD_STATES = {
    "phases": (lambda state: state | {"phases": [{"kind": "sparse", "steps": 9}]}, "build it with the same phases"),
    "no_phases": (lambda state: {"applied_steps": 1, "last_scale": None}, "not a saved SparseSchedule"),
    "no_counter": (lambda state: {key: state[key] for key in ("phases", "last_scale")}, "not a saved SparseSchedule"),
    "no_scale": (lambda state: {key: state[key] for key in ("phases", "applied_steps")}, "not a saved SparseSchedule"),
    "not_a_dict": (lambda state: [1, 2], "not a saved SparseSchedule"),
    "none": (lambda state: None, "not a saved SparseSchedule"),
    "unknown_field": (
        lambda state: state | {"phases": [{"kind": "sparse", "length": 9}]},
        "not a saved SparseSchedule",
    ),
    "bad_phase": (lambda state: state | {"phases": [{"kind": "sparse", "steps": -1}]}, "steps=-1"),
    "negative": (lambda state: state | {"applied_steps": -1}, r"state\['applied_steps'\]=-1"),
    "fraction": (lambda state: state | {"applied_steps": 1.5}, r"state\['applied_steps'\]=1\.5"),
    "bool": (lambda state: state | {"applied_steps": True}, r"state\['applied_steps'\]=True"),
    "scale": (lambda state: state | {"last_scale": "65536"}, r"state\['last_scale'\]='65536'"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(case: str) -> None:
    damage, message = BAD_STATES[case]
    model = network()
    schedule = SparseSchedule(model, [Phase("dense", 1), Phase("sparse", 3)])
    schedule.step()
    state = schedule.state_dict()
    with pytest.raises(ScheduleError, match=message):
        schedule.load_state_dict(damage(dict(state)))
    assert schedule.state_dict() == state
    assert flags(model) == [True, True]


BAD_PLANS = {
    "empty": (lambda model: SparseSchedule(model, []), r"phases=\(\) hold no step"),
    "no_steps": (lambda model: SparseSchedule(model, [Phase("sparse", 0)]), "hold no step"),
    "total": (
        lambda model: SparseSchedule(model, [Phase("sparse", 3)], total_steps=4),
        "phases hold 3 steps, but total_steps=4",
    ),
    "not_phases": (lambda model: SparseSchedule(model, ["sparse"]), "phases holds 'sparse'"),
    "kind": (lambda model: Phase("spare", 3), "kind='spare' is not one of 'sparse', 'dense'"),
    "steps": (lambda model: Phase("sparse", -1), "steps=-1"),
    "half_a_step": (lambda model: Phase("sparse", 1.5), r"steps=1\.5"),
    "true_steps": (lambda model: Phase("sparse", True), "steps=True"),
    "fraction_above": (lambda model: SparseSchedule.sparse_then_dense(model, 10, 1.2), r"sparse_fraction=1\.2"),
    "fraction_below": (lambda model: SparseSchedule.sparse_then_dense(model, 10, -0.1), r"sparse_fraction=-0\.1"),
    "fraction_nan": (lambda model: SparseSchedule.sparse_then_dense(model, 10, float("nan")), "sparse_fraction=nan"),
    "fraction_text": (lambda model: SparseSchedule.sparse_then_dense(model, 10, "0.7"), "sparse_fraction='0.7'"),
    "no_total": (lambda model: SparseSchedule.sparse_then_dense(model, 0), "total_steps=0"),
    "float_total": (lambda model: SparseSchedule.sparse_then_dense(model, 1e3), r"total_steps=1000\.0"),
    "too_much": (
        lambda model: SparseSchedule.dense_sparse_dense(model, 10, 0.5, 0.6),
        r"dense_start_fraction=0\.5 and sparse_fraction=0\.6 exceed 1",
    ),
    "start": (lambda model: SparseSchedule.dense_sparse_dense(model, 10, 1.5, 0.1), r"dense_start_fraction=1\.5"),
}


@pytest.mark.parametrize("case", BAD_PLANS)
def test_phases_that_do_not_fit_are_refused_and_change_no_layer(case: str) -> None:
    make, message = BAD_PLANS[case]
    model = network()
    before = [dict(vars(module)) for module in model]
    with pytest.raises(ScheduleError, match=message):
        make(model)
    assert [vars(module).keys() for module in model] == [attributes.keys() for attributes in before]
    assert flags(model) == [True, True]


def test_a_model_without_semi_sparse_layers_is_refused() -> None:
    with pytest.raises(
        NoLayerMatchedError, match="model=Linear has no semi-sparse layer to schedule; call sparsify first"
    ):
        SparseSchedule(nn.Linear(8, 8), [Phase("sparse", 1)])


def test_the_repr_tells_the_plan_and_the_place() -> None:
    schedule = SparseSchedule(network(), [Phase("sparse", 3), Phase("dense", 2)])
    schedule.step()
    assert repr(schedule) == "SparseSchedule(3 sparse -> 2 dense; 1 applied, now sparse)"
