"""Packing again what was packed last, at the least cost for the host.

From one optimizer step to the next a model keeps its layers, parameters and settings. The first packing looks at all of
them with care (packed_weights.py). The next ones only look whether they are still the same objects at the same
addresses in the same places of the model, and launch again.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from semisparse.nn.linear import SemiSparseLinear
from semisparse.nn.pack_together import Member
from semisparse.nn.packed_weight import PackingLayer
from semisparse.nn.whole_weights import capturing
from semisparse.operands import autocast_enabled
from semisparse.tracing import noted_compute_dtypes

_Others = tuple[PackingLayer, bool, Tensor | None]


class Repetition:
    """One packing of all packable weights of a model.

    Args:
        members: What was packed: all weights that are packed between forwards.
        model: Whose layers they are; other layers of it pack at each forward, or are dense.
        launches: Pack the members again.
    """

    def __init__(self, members: list[Member], model: nn.Module, launches: list[Callable[[], None]]) -> None:
        self._launches = launches
        self._members = [
            (m.layer, m.layer._parameters, m.record, m.weight, m.weight.data_ptr(), m.layer.sparse_config)
            for m in members
        ]
        packed = {id(member.layer) for member in members}
        self._others: list[_Others] = [
            (layer, layer.sparse_enabled, layer._parameters.get("weight"))
            for layer in model.modules()
            if isinstance(layer, SemiSparseLinear) and id(layer) not in packed
        ]
        tables = [module._modules for module in model.modules() if module._modules]
        self._tree = [(children, tuple(children.values())) for children in tables]
        self._device = members[0].weight.device
        self._ambient = self._surroundings()

    @classmethod
    def of(
        cls, members: list[Member], model: nn.Module, launches: list[Callable[[], None] | None]
    ) -> "Repetition | None":
        """The repetition of a packing, or None: where recipes hold something, a weight is frozen, or was packed alone.

        Args:
            members: As the class's.
            model: As the class's.
            launches: As pack_together returns them.
        """
        plain = [launch for launch in launches if launch is not None]
        if not members or not plain or len(plain) < len(launches):
            return None
        for layer, _, weight, _ in members:
            if layer.held_codes is not None or layer.held_scale is not None or not weight.requires_grad:
                return None
        return cls(members, model, plain)

    def __len__(self) -> int:
        return len(self._members)

    def holds(self) -> bool:
        """Whether a new look would find the same to pack."""
        for layer, parameters, _, weight, address, config in self._members:
            if not (
                getattr(layer, "sparse_enabled", False)  # a layer that was made dense has none
                and layer._packed is not None  # made dense and sparse again
                and parameters.get("weight") is weight
                and weight.data_ptr() == address
                and layer.sparse_config is config
                and layer.held_codes is None
                and layer.held_scale is None
                and weight.requires_grad
            ):
                return False
        return (
            self._ambient == self._surroundings()
            and all(tuple(children.values()) == known for children, known in self._tree)
            and all(
                getattr(layer, "sparse_enabled", None) is enabled and layer._parameters.get("weight") is weight
                for layer, enabled, weight in self._others
            )
        )

    def run(self) -> None:
        """Pack the members. Asynchronous."""
        versions = [weight._version for _, _, _, weight, _, _ in self._members]  # a write from now on is not packed
        with torch.no_grad():
            for launch in self._launches:
                launch()
        for (_, _, record, _, _, _), version in zip(self._members, versions, strict=True):
            record.renew(version)

    def _surroundings(self) -> tuple[Any, ...]:
        """What the choice of dtypes and the notes depend on, apart from the layers."""
        autocast = torch.get_autocast_dtype(self._device.type) if autocast_enabled(self._device) else None
        weight = self._members[0][3]
        return autocast, len(noted_compute_dtypes()), capturing(weight), torch.is_inference_mode_enabled()
