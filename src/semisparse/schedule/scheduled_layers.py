"""The layers that a schedule switches, the copies that follow them, and what may have happened to them meanwhile."""

import warnings
from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

from torch import nn

from semisparse import calls
from semisparse.errors import NoLayerMatchedError, ScheduleError
from semisparse.nn import SemiSparseBase, SemiSparseLinear
from semisparse.nn.copies import copies_of
from semisparse.schedule.applied_steps import StepEvidence
from semisparse.schedule.ranks import Group, called_anywhere
from semisparse.surgery.layers import changed_since, semi_sparse_layers

# Layers that some schedule switches: none of them is a copy that nobody follows.
_SCHEDULED: WeakSet[nn.Module] = WeakSet()


class ScheduledLayers:
    """The semi-sparse layers of model when the schedule began, by name; NoLayerMatchedError if there are none."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.by_name = semi_sparse_layers(model)
        if not self.by_name:
            raise NoLayerMatchedError(
                f"model={type(model).__name__} has no semi-sparse layer to schedule; call sparsify first"
            )
        self._reset()

    def __getstate__(self) -> dict[str, Any]:
        """Model and layers. Who follows stays with the original."""
        return {"model": self.model, "by_name": self.by_name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def _reset(self) -> None:
        self._followers: WeakSet[SemiSparseBase] = WeakSet()
        self._left: WeakSet[SemiSparseBase] = WeakSet()
        self._watch: calls.Watch | None = calls.Watch()  # until calls were checked

    def claim(self) -> None:
        """Mark the layers as switched by a schedule."""
        for layer in self.by_name.values():
            _SCHEDULED.add(layer)

    def switch(self, sparse: bool) -> None:
        """Set the phase on the layers and on the copies that follow them."""
        for layer in (*self.by_name.values(), *self._followers):
            layer.sparse_enabled = sparse

    @property
    def awaits_calls(self) -> bool:
        """Whether calls have not been checked yet."""
        return self._watch is not None

    def trust_calls(self) -> None:
        """Look no more whether layers were called."""
        self._watch = None

    @property
    def followers(self) -> int:
        """How many layers of copies follow."""
        return len(self._followers)

    def follow(self, copy: nn.Module) -> list[tuple[SemiSparseBase, SemiSparseBase]]:
        """Let the semi-sparse layers of copy follow; returns pairs (ours, theirs). Raises NoLayerMatchedError."""
        theirs = semi_sparse_layers(copy)
        if not theirs:
            raise NoLayerMatchedError(
                f"copy={type(copy).__name__} has no semi-sparse layer that could follow; copy the model after sparsify"
            )
        originals = {id(copied): layer for layer in self.by_name.values() for copied in copies_of(layer)}
        # By name where a copy was loaded from a file, perhaps inside a wrapper of its own.
        named = {name: self.by_name.get(name) or self.by_name.get(name.partition(".")[2]) for name in theirs}
        pairs = [
            (ours, layer)
            for name, layer in theirs.items()
            if (ours := originals.get(id(layer)) or named[name]) is not None and ours is not layer
        ]
        if not pairs:
            raise NoLayerMatchedError(
                f"copy={type(copy).__name__} has none of the layers of this schedule; its own are {list(theirs)[:3]}"
            )
        for _, layer in pairs:
            self._left.discard(layer)
            self._followers.add(layer)
        return pairs

    def forget_frozen(self) -> None:
        """Take what a recipe held off the copies that follow."""
        for layer in self._followers:
            layer.__dict__.pop("_frozen", None)

    def unfollow(self, copy: nn.Module) -> None:
        """Let the layers of copy be: they keep the phase that they have."""
        for layer in semi_sparse_layers(copy).values():
            self._followers.discard(layer)
            self._left.add(layer)

    def adopt_copies(self) -> list[tuple[SemiSparseBase, SemiSparseBase]]:
        """Let copies that no schedule switches follow, with a warning; returns the new pairs (ours, theirs)."""
        pairs = []
        for layer in self.by_name.values():
            for copy in copies_of(layer):
                known = copy in self._followers or copy in self._left or copy in _SCHEDULED
                if isinstance(copy, SemiSparseBase) and not known:
                    pairs.append((layer, copy))
                    self._followers.add(copy)
        if pairs:
            warnings.warn(
                f"{len(pairs)} copies of scheduled layers were made (an average of the weights, a teacher); from now "
                "on they change from sparse to dense together with the originals. Call schedule.follow(copy) to say "
                "that this is meant, or schedule.unfollow(copy) to leave a copy as it is",
                stacklevel=4,
            )
        return pairs

    def check_present(self) -> None:
        """Raise ScheduleError, naming them, where layers were replaced, made dense or can no longer be pruned."""
        if changed := changed_since(self.model, self.by_name):
            raise ScheduleError(
                f"{changed[0]} is scheduled, but {changed[1]}. Convert or wrap before sparsify, and start the schedule "
                "afterwards"
            )

    def check_called(self, evidence: StepEvidence, group: Group) -> None:
        """After the first step of the first sparse phase: raise ScheduleError where somebody else trains a weight.

        A layer that was not called since the swap, on any rank of group, although others were, and whose weight got a
        gradient all the same is bypassed; so are all of them if none was called and their weights train. A layer
        without a gradient (an expert that no token chose, an unused head) is only warned of.
        """
        if self._watch is None:
            return
        layers = {name: layer for name, layer in self.by_name.items() if layer.sparse_enabled}
        if not layers:
            return
        idle = _idle(layers, self._watch)
        called = called_anywhere([name not in idle for name in layers], group)
        idle = {name: layer for (name, layer), was in zip(layers.items(), called, strict=True) if not was}
        trained = [name for name, layer in idle.items() if evidence.trained(layer.weight)]
        nothing_known = not evidence.saw_a_step() and not any(evidence.trained(x.weight) for x in layers.values())
        if not trained and len(idle) == len(layers):
            return  # neither called nor trained so far, or nothing can be told: look again at the next step
        although = ", although other layers were" if len(idle) < len(layers) else ""
        if bypassed := trained or (list(idle) if nothing_known else []):
            raise ScheduleError(
                f"{_listed(bypassed)}: swapped, but not called since{although}: "
                "somebody reads the weight itself, and it trains dense. Leave these out (sparsify(..., exclude=...)); "
                "semisparse.check shows what runs. If it is but a penalty or noise that reaches layers in waiting "
                "(experts without tokens), call schedule.trust_calls()"
            )
        self._watch = None
        evidence.watch_gradients(False)
        if idle:
            warnings.warn(
                f"{_listed(list(idle))}: swapped, but neither called nor trained in the first sparse step. If that is "
                "not meant (experts without tokens are), semisparse.check shows what runs",
                stacklevel=4,
            )


def _idle(layers: dict[str, SemiSparseBase], watch: calls.Watch) -> dict[str, SemiSparseBase]:
    """The layers that were not called, as far as that can be known.

    Eager calls set a flag. In compiled code, ops have seen the weights of layers that prune them; of other layers it
    cannot be told there: those that prune tokens, where tokens were pruned that no eager call explains, and shards,
    where any weight was seen only by an op.
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
