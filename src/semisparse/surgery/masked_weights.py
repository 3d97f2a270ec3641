"""Writing pruned weights into the Parameters themselves, if only the pruned layers use them."""

import torch
from torch import Tensor, nn

from semisparse.errors import LayerRefusedError
from semisparse.nn import SemiSparseBase, SemiSparseLinear
from semisparse.nn.refusals import weight_refusal
from semisparse.surgery.selection import FoundLayer
from semisparse.surgery.sharing import Holders


class MaskedWeights:
    """What densify(weights="masked") writes: one pruned weight per Parameter, also if layers share it.

    Nothing is changed before write().

    Args:
        model: The model.
        layers: Its semi-sparse layers.

    Raises:
        LayerRefusedError: A weight is sharded, computed by a hook, or also used in model by something that does not
            prune it in the same way.
    """

    def __init__(self, model: nn.Module, layers: list[FoundLayer]) -> None:
        pruned = {id(f.layer): f for f in layers if isinstance(f.layer, SemiSparseLinear) and f.layer.has_mask}
        all_holders = Holders(model)
        self._values: dict[int, tuple[Tensor, Tensor]] = {}
        for found in pruned.values():
            layer = found.layer
            assert isinstance(layer, SemiSparseLinear)
            name = found.name or "(root)"
            _check_weight(name, layer)
            for other_name, owner, tensor in all_holders.of(layer.weight):
                if not _prunes_alike(layer, owner, tensor):
                    raise LayerRefusedError(
                        f"{name}: weights='masked' would write the pruned weight into memory that {other_name} reads, "
                        "too. Give the layer its own weight first (layer.weight = "
                        "nn.Parameter(layer.weight.detach().clone())), or use weights='dense'"
                    )
            if id(layer.weight) not in self._values:
                self._values[id(layer.weight)] = (layer.weight, layer.pruned_weight())

    @torch.no_grad()
    def write(self) -> None:
        """Write the pruned weights."""
        for weight, value in self._values.values():
            weight.copy_(value)

    @staticmethod
    def note(layer: SemiSparseBase) -> str:
        """What was done with the layer's weight, for the report."""
        if isinstance(layer, SemiSparseLinear) and not layer.has_mask:
            return "no weight was pruned, dense weight kept"
        if isinstance(layer, SemiSparseLinear) and not layer.sparse_enabled:
            return "pruned weight written, although the layer computed with the dense one (dense phase)"
        if isinstance(layer, SemiSparseLinear):
            return "pruned weight written"
        return "activation operand: no weight was pruned, dense weight kept"


def _prunes_alike(layer: SemiSparseLinear, owner: nn.Module, tensor: Tensor) -> bool:
    """Whether owner is a layer for which the pruned weight of layer is its own pruned weight."""
    if owner is layer:
        return tensor is layer.weight
    return (
        isinstance(owner, SemiSparseLinear)
        and tensor is owner.weight is layer.weight
        and owner.sparse_config == layer.sparse_config
        and owner.held_codes is layer.held_codes
        and owner.held_scale is layer.held_scale
        and owner.sparse_enabled == layer.sparse_enabled
    )


def _check_weight(name: str, layer: SemiSparseLinear) -> None:
    if reason := weight_refusal(layer):
        raise LayerRefusedError(f"{name}: weights='masked' cannot write a pruned weight: {reason}")
    if layer.weight.is_inference() or any(
        size > 1 and not stride for size, stride in zip(layer.weight.shape, layer.weight.stride(), strict=True)
    ):
        raise LayerRefusedError(
            f"{name}: weights='masked' cannot write into its weight, an inference tensor or one whose entries share "
            "memory: give the layer its own weight first (layer.weight = nn.Parameter(layer.weight.detach().clone()))"
        )
    if hasattr(layer.weight, "full_tensor"):
        raise LayerRefusedError(
            f"{name}: weights='masked' needs the whole weight, but it is a sharded DTensor: save a "
            "full state_dict and densify the unsharded model"
        )
