"""Whether the scheduled layers are called: a layer whose weight is read elsewhere would train dense without notice."""

import warnings
from collections.abc import Iterable

from semisparse import calls
from semisparse.errors import ScheduleError
from semisparse.nn import SemiSparseBase, SemiSparseLinear
from semisparse.schedule.applied_steps import StepEvidence
from semisparse.schedule.ranks import Group, called_anywhere
from semisparse.schedule.scheduled_layers import ScheduledLayers


def check_called(scheduled: ScheduledLayers, evidence: StepEvidence, group: Group) -> None:
    """After a step of the first sparse phase: raise if a weight is trained although its layer is not called.

    A layer is bypassed if it was not called since the swap, on any rank of group, and its weight got a gradient all the
    same. If no layer was called and no optimizer step was seen, all count as bypassed. A layer that is neither called
    nor trained (an expert that no token chose, an unused head) only causes a warning. Does nothing once this is known.

    Args:
        scheduled: The layers.
        evidence: What is known of optimizer steps.
        group: The ranks that share what they saw.

    Raises:
        ScheduleError: Layers are bypassed.
    """
    _check(scheduled, evidence, group)
    scheduled.place()


def _check(scheduled: ScheduledLayers, evidence: StepEvidence, group: Group) -> None:
    watch = scheduled.watch
    layers = {name: layer for name, layer in scheduled.by_name.items() if layer.sparse_enabled}
    if watch is None or not layers:
        return
    idle = _idle(layers, watch)
    called = called_anywhere([name not in idle for name in layers], group)
    idle = {name: layer for (name, layer), was in zip(layers.items(), called, strict=True) if not was}
    trained = [name for name, layer in idle.items() if evidence.trained(layer.weight)]
    nothing_known = not evidence.saw_a_step() and not any(evidence.trained(x.weight) for x in layers.values())
    if not trained and len(idle) == len(layers):
        return  # neither called nor trained so far, or unknown: check again at the next step
    although = ", although other layers were" if len(idle) < len(layers) else ""
    if bypassed := trained or (list(idle) if nothing_known else []):
        raise ScheduleError(
            f"{_listed(bypassed)}: swapped, but not called since{although}: something else reads the weight, and it "
            "trains dense. Leave these layers out (sparsify(..., exclude=...)); semisparse.check shows what runs. If "
            "only a penalty or noise reaches the weights of idle layers (experts without tokens), call "
            "schedule.trust_calls()"
        )
    scheduled.trust_calls()
    evidence.watch_gradients(False)
    if idle:
        warnings.warn(
            f"{_listed(list(idle))}: swapped, but neither called nor trained in the first sparse step. Unless that is "
            "intended (experts without tokens), semisparse.check shows what runs",
            stacklevel=3,
        )


def _idle(layers: dict[str, SemiSparseBase], watch: calls.Watch) -> dict[str, SemiSparseBase]:
    """The layers that were not called, as far as that can be known.

    Eager calls set a flag. In compiled code, ops have seen the weights of layers that prune them. Of other layers it is
    unknown there: those that prune tokens, if tokens were pruned that no eager call explains, and shards, if any weight
    was seen only by an op.
    """
    called = {id(layer.weight) for layer in layers.values() if layer._called}  # a tied one trains through the other
    idle = {
        name: layer for name, layer in layers.items() if id(layer.weight) not in called and not watch.saw(layer.weight)
    }
    compiled = watch.tokens_unexplained or any(watch.saw(x.weight) for x in layers.values() if not x._called)
    return {
        name: layer
        for name, layer in idle.items()
        if not (hasattr(layer.weight, "full_tensor") and (compiled or len(idle) == len(layers)))
        and not (not isinstance(layer, SemiSparseLinear) and watch.tokens_unexplained)
    }


def _listed(names: Iterable[str], most: int = 5) -> str:
    names = [name or "(root)" for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
