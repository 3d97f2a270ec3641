"""Layers that something replaced, made dense or gave a computed weight after the swap."""

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

from semisparse import MaskMetrics, SparseSchedule, densify
from semisparse.errors import ConfigError, ScheduleError
from tests.schedule.models import net, train

REPLACED = {
    "another layer": lambda m: m.__setitem__(0, nn.Linear(16, 32)),
    "deleted": lambda m: m.__delitem__(2),
    "densified": lambda m: densify(m),
    "weight_norm": lambda m: nn.utils.parametrizations.weight_norm(m[0]),
    "old weight_norm": lambda m: nn.utils.spectral_norm(m[0]),
    "pruned": lambda m: nn.utils.prune.l1_unstructured(m[0], "weight", 0.5),
}


@pytest.mark.parametrize("how", REPLACED)
@pytest.mark.parametrize("when", ["before the first step", "before the switch"])
def test_layers_that_are_not_what_they_were_stop_the_schedule(how: str, when: str) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = SparseSchedule.sparse_then_dense(model, 4, 0.5)
    if when == "before the switch":
        train(model, optimizer)
        assert schedule.step()
    name = "2" if how == "deleted" else "0"
    REPLACED[how](model)
    with pytest.raises(ScheduleError, match=rf"^{name} is scheduled, but it"):
        schedule.step()
    assert schedule.applied_steps == (when == "before the switch")


def test_metrics_of_replaced_layers_are_refused() -> None:
    model = net()
    metrics = MaskMetrics(model, interval=2)
    model[0] = nn.Linear(16, 32)
    with pytest.raises(ConfigError, match=r"^0 is measured, but it is no longer in the model"):
        metrics.update()


@pytest.mark.parametrize("wrong", [None, 3, "model"])
def test_what_is_no_module_is_named(wrong: object) -> None:
    schedule = SparseSchedule.sparse_then_dense(net(), 4)
    for call in (
        lambda: SparseSchedule.sparse_then_dense(wrong, 4),
        lambda: schedule.follow(wrong),
        lambda: schedule.unfollow(wrong),
        lambda: MaskMetrics(wrong),
    ):
        with pytest.raises(ConfigError, match=r"pass a torch\.nn\.Module"):
            call()
    with pytest.raises(ScheduleError, match="must be a list of Phase"):
        SparseSchedule(net(), 5)


@pytest.mark.parametrize("how", ["weight_norm", "prune"])
def test_metrics_of_computed_weights_are_refused(how: str) -> None:
    model = net()
    metrics = MaskMetrics(model, interval=2)
    if how == "prune":
        nn.utils.prune.l1_unstructured(model[0], "weight", 0.5)
    else:
        nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(ConfigError, match=r"^0 is measured, but it"):
        metrics.update()
