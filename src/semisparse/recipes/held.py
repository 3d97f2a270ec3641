"""Tensors that a recipe holds on its layers: masks for some steps, scales for the whole run.

The tensors keep their addresses, so that a captured or compiled step uses what was refreshed between its replays.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from semisparse import ops
from semisparse.errors import ScheduleError
from semisparse.nn import SemiSparseLinear
from semisparse.pattern import GROUP, KEPT
from semisparse.recipes.layers import layers_by_weight
from semisparse.reference.linear import soft_scale
from semisparse.reference.masks import from_codes
from semisparse.surgery.layers import layers_with_masks


class Held:
    """One tensor per weight, computed from the weights when this is built; on the layers from attach() to detach().

    Subclasses say what the tensors are.

    Args:
        model: A module with SemiSparseLinear layers.

    Attributes:
        key: Key of the tensors in state_dict().
        held_as: Which argument of SemiSparseLinear.hold they are.
    """

    key: str
    held_as: str

    def __init__(self, model: nn.Module) -> None:
        self._layers = layers_by_weight(model)
        self._tensors = {name: self._computed(layer.weight.detach()) for name, layer in self._layers.items()}
        names = {id(layer.weight): name for name, layer in self._layers.items()}
        # Two layers that share a weight also share its tensor.
        self._all = [(layer, self._tensors[names[id(layer.weight)]]) for layer in layers_with_masks(model).values()]

    def _computed(self, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def attach(self) -> None:
        """Set the tensors on the layers."""
        for layer, tensor in self._all:
            layer.hold(**{self.held_as: tensor})

    def detach(self) -> None:
        """Remove the tensors from the layers that still have them."""
        for layer, tensor in self._all:
            if isinstance(layer, SemiSparseLinear) and getattr(layer, f"held_{self.held_as}") is tensor:
                layer.hold()

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors by layer."""
        return self._tensors

    def advance(self, sparse: bool) -> bool:
        """Count one applied optimizer step.

        Args:
            sparse: Whether the next forward is.

        Returns:
            Whether tensors were refreshed.
        """
        return False

    @torch.no_grad()
    def _refresh(self) -> None:
        for name, layer in self._layers.items():
            self._tensors[name].copy_(self._computed(layer.weight.detach()))

    def state_dict(self) -> dict[str, Any]:
        """Copies of the tensors by layer, on their devices."""
        return {self.key: {name: tensor.clone() for name, tensor in self._tensors.items()}}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ScheduleError unless state has a tensor of the right kind for each layer."""
        saved = state.get(self.key)
        if not isinstance(saved, Mapping) or saved.keys() != self._tensors.keys():
            raise ScheduleError(
                f"state[{self.key!r}] does not name the layers of this model; it was saved for another one"
            )
        for name, tensor in self._tensors.items():
            other = saved[name]
            if not isinstance(other, Tensor) or (other.shape, other.dtype) != (tensor.shape, tensor.dtype):
                raise ScheduleError(
                    f"state[{self.key!r}][{name!r}] must be {tensor.dtype} of shape {tuple(tensor.shape)}; "
                    "it was saved for another model"
                )
            if other.layout is not torch.strided or other.is_meta or type(other) not in (Tensor, torch.nn.Parameter):
                raise ScheduleError(
                    f"state[{self.key!r}][{name!r}] must be an ordinary dense tensor with data, as state_dict() gives; "
                    f"it is a {type(other).__name__} of layout {other.layout} on {other.device}"
                )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state that check_state has accepted."""
        for name, tensor in self._tensors.items():
            tensor.copy_(state[self.key][name])


class HeldScales(Held):
    """The scale of mask "soft" for each weight, as it is when the recipe starts (arXiv 2409.09099)."""

    key = "scales"
    held_as = "scale"

    def _computed(self, weight: Tensor) -> Tensor:
        return soft_scale(weight)


class HeldMasks(Held):
    """Transposable masks, refreshed after every `every` applied steps of a sparse phase (arXiv 2404.01847).

    They are also refreshed when a sparse phase begins later.

    Args:
        model: A module with SemiSparseLinear layers.
        every: Applied steps for which masks are held.
        sparse: Whether the first phase is sparse.
    """

    key = "masks"
    held_as = "codes"

    def __init__(self, model: nn.Module, every: int, sparse: bool) -> None:
        super().__init__(model)
        self._every, self._age, self._sparse = every, 0, sparse

    def _computed(self, weight: Tensor) -> Tensor:
        return ops.tile_codes(weight, "transposable")

    def advance(self, sparse: bool) -> bool:
        """Count the step; refresh if the masks are old enough, or if a sparse phase begins."""
        begins, self._sparse = sparse and not self._sparse, sparse
        if not sparse:
            return False
        self._age += 1
        if not begins and self._age < self._every:
            return False
        self._refresh()
        self._age = 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """Masks as tile codes, and the number of steps for which they have been held."""
        return {**super().state_dict(), "age": self._age, "was_sparse": self._sparse}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """As Held.check_state; also checks that the masks are transposable, which synchronises, and their age."""
        super().check_state(state)
        for name, codes in state[self.key].items():
            tiles = from_codes(codes).unflatten(0, (-1, GROUP)).unflatten(2, (-1, GROUP))
            if not all((tiles.sum(dim=dim) == KEPT).all() for dim in (1, 3)):
                raise ScheduleError(f"state[{self.key!r}][{name!r}] holds tiles that are not 2:4 both ways")
        age = state.get("age")
        if isinstance(age, bool) or not isinstance(age, int) or not 0 <= age < self._every:
            raise ScheduleError(f"state['age']={age!r} must be a whole number from 0 to {self._every - 1}")
        if not isinstance(state.get("was_sparse"), bool):
            raise ScheduleError(f"state['was_sparse']={state.get('was_sparse')!r} must be true or false")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load masks and age."""
        super().load_state_dict(state)
        self._age, self._sparse = state["age"], state["was_sparse"]
