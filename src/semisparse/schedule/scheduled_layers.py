"""The layers that a schedule switches, and the copies that follow them."""

import warnings
from typing import Any
from weakref import WeakSet

from torch import nn

from semisparse import calls
from semisparse.errors import NoLayerMatchedError, ScheduleError
from semisparse.nn import SemiSparseBase, SemiSparseLinear
from semisparse.nn.copies import copies_of
from semisparse.nn.float8 import LOST
from semisparse.surgery.layers import changed_since, lost_to_float8, semi_sparse_layers

# Layers that some schedule switches: copies among them need not follow another.
_SCHEDULED: WeakSet[nn.Module] = WeakSet()


class ScheduledLayers:
    """The semi-sparse layers that model has when the schedule begins.

    Args:
        model: The model.

    Attributes:
        model: The same.
        by_name: The layers.
        watch: What ops have read, until it is known whether the layers are called.

    Raises:
        NoLayerMatchedError: model has no semi-sparse layer.
        ScheduleError: torchao's conversion to float8 replaced a semi-sparse layer, or a weight cannot be pruned.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        for name in lost_to_float8(model):
            raise ScheduleError(f"{name or '(root)'} was made semi-sparse, but {LOST}")
        self.by_name = semi_sparse_layers(model)
        if not self.by_name:
            raise NoLayerMatchedError(
                f"model={type(model).__name__} has no semi-sparse layer to schedule; call sparsify first"
            )
        self.check_present()
        self._reset()

    def __getstate__(self) -> dict[str, Any]:
        """Model and layers; copies go on following the original."""
        return {"model": self.model, "by_name": self.by_name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def _reset(self) -> None:
        self._followers: WeakSet[SemiSparseBase] = WeakSet()
        self._left: WeakSet[SemiSparseBase] = WeakSet()
        self.watch: calls.Watch | None = calls.Watch()  # until it is known that the layers are called
        self.place()

    def claim(self) -> None:
        """Record that a schedule switches the layers."""
        for layer in self.by_name.values():
            _SCHEDULED.add(layer)

    def switch(self, sparse: bool) -> None:
        """Set the phase on the layers and on the copies that follow them."""
        for layer in (*self.by_name.values(), *self._followers):
            layer.sparse_enabled = sparse

    @property
    def awaits_calls(self) -> bool:
        """Whether it is still unknown if the layers are called."""
        return self.watch is not None

    def place(self) -> None:
        """Tell the watch where the weights are before the next step."""
        if self.watch is not None:
            weights = (layer._parameters.get("weight") for layer in self.by_name.values())
            self.watch.place(weight for weight in weights if weight is not None)

    def trust_calls(self) -> None:
        """Do not check any longer whether layers are called."""
        self.watch = None

    @property
    def followers(self) -> int:
        """Number of layers of copies that follow."""
        return len(self._followers)

    def follow(self, copy: nn.Module) -> None:
        """Let the semi-sparse layers of copy follow, with what a recipe holds on ours.

        Raises:
            NoLayerMatchedError: copy has no layer of this schedule.
        """
        theirs = semi_sparse_layers(copy)
        if not theirs:
            raise NoLayerMatchedError(
                f"copy={type(copy).__name__} has no semi-sparse layer that could follow; copy the model after sparsify"
            )
        originals = {id(copied): layer for layer in self.by_name.values() for copied in copies_of(layer)}
        # By name if the copy was loaded from a file, perhaps inside a wrapper of its own.
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
        _share_held(pairs)

    def release_followers(self) -> None:
        """Take what a recipe held off the copies that follow."""
        for layer in self._followers:
            if isinstance(layer, SemiSparseLinear):
                layer.hold()

    def unfollow(self, copy: nn.Module) -> None:
        """Stop switching the layers of copy: they keep their phase."""
        for layer in semi_sparse_layers(copy).values():
            self._followers.discard(layer)
            self._left.add(layer)

    def adopt_copies(self) -> None:
        """Let copies follow that no schedule switches, with a warning."""
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
                "on they change from sparse to dense together with the originals. If that is intended, call "
                "schedule.follow(copy); to leave a copy as it is, call schedule.unfollow(copy)",
                stacklevel=4,
            )
        _share_held(pairs)

    def look(self) -> None:
        """Check that the layers are still what they were, and let copies follow that no schedule switches.

        Raises:
            ScheduleError: As check_present.
        """
        self.check_present()
        self.adopt_copies()

    def check_present(self) -> None:
        """Raise ScheduleError, with its name, if a layer was replaced, made dense or can no longer be pruned."""
        if changed := changed_since(self.model, self.by_name):
            raise ScheduleError(
                f"{changed[0]} is scheduled, but {changed[1]}. Convert or wrap before sparsify, and start the schedule "
                "afterwards"
            )


def _share_held(pairs: list[tuple[SemiSparseBase, SemiSparseBase]]) -> None:
    """Give what a recipe holds on the first layer of each pair to the second, its copy."""
    for ours, theirs in pairs:
        if not isinstance(ours, SemiSparseLinear) or not isinstance(theirs, SemiSparseLinear):
            continue
        if ours.holds and ours.sparse_config == theirs.sparse_config:
            theirs.hold(codes=ours.held_codes, scale=ours.held_scale)
