"""The layers that a schedule switches, the copies that follow them, and what may have happened to them meanwhile."""

import warnings
from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

from torch import nn

from semisparse import calls
from semisparse.applied import StepEvidence
from semisparse.errors import NoLayerMatched, ScheduleError
from semisparse.nn import SemiSparseBase, SemiSparseLinear
from semisparse.nn.copies import copies_of
from semisparse.nn.refusals import weight_refusal
from semisparse.ranks import Group, called_anywhere
from semisparse.swap import semi_sparse_layers

# Layers that some schedule switches: none of them is a copy that nobody follows.
_SCHEDULED: WeakSet[nn.Module] = WeakSet()


class ScheduledLayers:
    """The semi-sparse layers of model when the schedule began, by name. Raises NoLayerMatched when there is none."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.by_name = semi_sparse_layers(model)
        if not self.by_name:
            raise NoLayerMatched(
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

    @property
    def followers(self) -> int:
        """How many layers of copies follow."""
        return len(self._followers)

    def follow(self, copy: nn.Module) -> list[tuple[SemiSparseBase, SemiSparseBase]]:
        """Let the semi-sparse layers of copy follow; returns pairs (ours, theirs). Raises NoLayerMatched."""
        theirs = semi_sparse_layers(copy)
        if not theirs:
            raise NoLayerMatched(
                f"copy={type(copy).__name__} has no semi-sparse layer that could follow; copy the model after sparsify"
            )
        pairs = [(ours, layer) for name, layer in theirs.items() if (ours := self._original(name, layer)) is not None]
        if not pairs:
            raise NoLayerMatched(
                f"copy={type(copy).__name__} has none of the layers of this schedule; its own are {list(theirs)[:3]}"
            )
        for _, layer in pairs:
            self._left.discard(layer)
            self._followers.add(layer)
        return pairs

    def unfollow(self, copy: nn.Module) -> None:
        """Let the layers of copy be: they keep the phase that they have."""
        for layer in semi_sparse_layers(copy).values():
            self._followers.discard(layer)
            self._left.add(layer)

    def _original(self, name: str, copy: SemiSparseBase) -> SemiSparseBase | None:
        for layer in self.by_name.values():
            if any(other is copy for other in copies_of(layer)):
                return layer
        # A copy that was loaded from a file, perhaps inside a wrapper of its own.
        return self.by_name.get(name) or self.by_name.get(name.partition(".")[2])

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
        inside = {id(module) for module in self.model.modules()}
        for name, layer in self.by_name.items():
            if id(layer) not in inside:
                reason = "it is no longer in the model: something (a conversion to float8 or QAT, say) replaced it"
            elif not isinstance(layer, SemiSparseBase):
                reason = f"it was made dense and is a {type(layer).__name__} now"
            else:
                reason = weight_refusal(layer) or ""
            if reason:
                raise ScheduleError(
                    f"{name or '(root)'} is scheduled, but {reason}. Convert or wrap before sparsify, and start the "
                    "schedule afterwards"
                )

    def check_called(self, evidence: StepEvidence, group: Group) -> None:
        """At the first step of the first sparse phase: raise ScheduleError where somebody else trains a layer's weight.

        A layer that was not called since the swap, on any rank of group, although others were, and whose weight got a
        gradient all the same is bypassed. One without a gradient (an expert that no token chose, an unused head) is
        only warned of.
        """
        if self._watch is None:
            return
        layers = {name: layer for name, layer in self.by_name.items() if layer.sparse_enabled}
        if not layers:
            return
        idle = _idle(layers, self._watch)
        called = called_anywhere([name not in idle for name in layers], group)
        idle = {name: layer for (name, layer), was in zip(layers.items(), called, strict=True) if not was}
        anything_trained = any(evidence.trained(layer.weight) for layer in layers.values())
        bypassed = [n for n, layer in idle.items() if evidence.trained(layer.weight) or not anything_trained]
        if bypassed:
            raise ScheduleError(
                f"{_listed(bypassed)}: swapped, but not called since, although other layers were: somebody reads the "
                "weight itself, and it trains dense. Leave these out (sparsify(..., exclude=...)); semisparse.check "
                "shows what runs"
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
    """The layers that were not called although others were, as far as that can be known."""
    eager = {name for name, layer in layers.items() if layer._called}
    # Compiled code sets no flag; there, the ops have seen the weights of layers that prune them.
    seen = {name for name, layer in layers.items() if name not in eager and watch.saw(layer.weight)}
    idle = {name: layer for name, layer in layers.items() if name not in eager and name not in seen}
    if not eager and not seen:
        return {}
    if seen:  # so something is compiled, and of a pruned activation or a shard it cannot be told there
        idle = {
            name: layer
            for name, layer in idle.items()
            if isinstance(layer, SemiSparseLinear) and not hasattr(layer.weight, "full_tensor")
        }
    return idle


def _listed(names: Iterable[str], most: int = 5) -> str:
    names = [name or "(root)" for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
