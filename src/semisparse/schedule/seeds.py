"""The random numbers of grad_output="mvue": a key for each layer that samples, advanced in place as steps are applied.

Ops only read the keys. So a step that is recomputed or replayed with the same inputs repeats its samples, and a CUDA
graph needs nothing.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from semisparse.errors import ConfigError
from semisparse.nn import SemiSparseBase, SemiSparseLinear
from semisparse.sampling import ADVANCE, layer_seed
from semisparse.schedule.ranks import Group


class Seeds:
    """The keys of a schedule's layers. Without layers that sample, nothing is done.

    Args:
        layers: By name; the name is part of a layer's key.
        seed: Of the run.
        group: The data-parallel group, in which each rank draws its own samples; False and None for all ranks.

    Attributes:
        seed: The same.

    Raises:
        ConfigError: seed is not a whole number.
    """

    def __init__(self, layers: Mapping[str, SemiSparseBase], seed: int, group: Group) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ConfigError(f"seed={seed!r} must be a whole number, the same on all ranks")
        self.seed = seed
        self._rank = _rank(group)
        self._layers = {
            name: layer
            for name, layer in layers.items()
            if isinstance(layer, SemiSparseLinear) and layer.sparse_config.grad_output is not None
        }
        self._keys: dict[tuple[object, ...], Tensor] = {}

    def place(self, applied_steps: int) -> None:
        """Set the keys for the next step, on the devices where the layers are now.

        Keys that are there already are written in place, because a CUDA graph may read them. Layers on the meta device
        have none until they are materialised and a step was applied.

        Args:
            applied_steps: Steps counted so far.
        """
        by_device: dict[torch.device, list[str]] = {}
        for name, layer in self._sampling().items():
            if layer.weight.device.type != "meta":
                by_device.setdefault(layer.weight.device, []).append(name)
        before, self._keys = self._keys, {}
        with torch.inference_mode(False), torch.no_grad():
            for device, names in by_device.items():
                keys = [layer_seed(self.seed, name, self._rank, applied_steps) for name in names]
                # 16 bytes apart: kernels are compiled for such addresses.
                wanted = torch.tensor([keys, keys], device="cpu").mT.contiguous()
                held = before.get((device, *names))
                placed = wanted.to(device) if held is None else held.copy_(wanted)
                for name, key in zip(names, placed[:, 0].unbind(), strict=True):
                    layer = self._layers[name]
                    if held is None or layer.held_seed is None or layer.held_seed.device != device:
                        layer.held_seed = key
                self._keys[device, *names] = placed

    @torch.no_grad()
    def advance(self, applied_steps: int) -> None:
        """Advance the keys by one applied step; on layers that were moved, set them anew.

        Args:
            applied_steps: Steps counted so far, this one included.
        """
        layers = self._sampling().values()
        if all(layer.held_seed is not None and layer.held_seed.device == layer.weight.device for layer in layers):
            for keys in self._keys.values():
                keys.add_(ADVANCE)
        else:
            self.place(applied_steps)

    def release(self) -> None:
        """Take the keys off the layers."""
        for layer in self._sampling().values():
            layer.held_seed = None

    def _sampling(self) -> dict[str, SemiSparseLinear]:
        """The layers, without those that were made dense since."""
        return {name: layer for name, layer in self._layers.items() if isinstance(layer, SemiSparseLinear)}


def _rank(group: Group) -> int:
    """This process's rank in the data-parallel group; 0 where there are no ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0
    rank = dist.get_rank() if group is False or group is None else dist.get_rank(group)
    return max(rank, 0)
