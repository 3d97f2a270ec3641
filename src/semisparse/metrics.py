"""Statistics of the masks during training: flip rate, kept magnitude, dead rows, phase.

The flip rate of one optimizer step is the share of a weight's entries that entered or left the mask in that step:
r_t = |M(w_t) xor M(w_{t-1})| / (N K), as in arXiv 2404.01847. A high rate late in training means that the masks do not
settle. The paper compares r_t with that of a dense run, computed from the masks that its weights would have.
MaskMetrics measures layers in a dense phase in the same way, so the values of a dense run can be the reference of
read().
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from semisparse.errors import ConfigError, LayerRefusedError, NoLayerMatchedError
from semisparse.nn import SemiSparseLinear
from semisparse.nn.tensor_parallel import UNSHARD, is_sharded
from semisparse.surgery.layers import changed_since, layers_with_masks

FLIP_RATE, FLIP_RATIO, KEPT_MAGNITUDE = "flip_rate", "flip_ratio", "kept_magnitude"
DEFAULT_INTERVAL = 100
"""Optimizer steps from one measured step to the next."""
_NAMES = (FLIP_RATE, KEPT_MAGNITUDE, "dead_rows")


class MaskMetrics:
    """Measures the masks of a model's SemiSparseLinear layers while it trains.

    Call update() once after each applied optimizer step: `if schedule.step(scaler): metrics.update()`. Every
    interval-th step is measured: masks are computed before and after it, so an interval costs two mask computations
    and, for that one step, one byte per entry of the weights. Only read() synchronises with the device. Flips are
    counted exactly; magnitudes, of weights of any dtype, are summed in fp32. The masks are those that the weights would
    choose now, even if a recipe holds other ones, so that the rates of all recipes are comparable; for mask "soft" it
    is the underlying row-wise mask.

    Args:
        model: A module with SemiSparseLinear layers, in any phase. Layers with a pruned activation have no mask of
            their own and are left out.
        interval: Optimizer steps from one measured step to the next, 2 or more.

    Raises:
        NoLayerMatchedError: model has no SemiSparseLinear.
        ConfigError: interval is not a whole number, 2 or more.
        LayerRefusedError: A weight is sharded (FSDP2, tensor parallelism); also raised by update().
    """

    def __init__(self, model: nn.Module, interval: int = DEFAULT_INTERVAL) -> None:
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 2:
            raise ConfigError(f"interval={interval!r} must be a whole number of steps, 2 or more")
        self._model, self._layers = model, _weight_layers(model)
        self._interval, self._steps = interval, 0
        self._before: dict[str, Tensor] = {}
        self._measured: dict[str, Tensor] = {}
        self._sizes: list[int] = []
        self._step: int | None = None

    @property
    def step(self) -> int | None:
        """The update() call that the values of read() belong to, counted from 1; None before the first one."""
        return self._step

    @torch.no_grad()
    def update(self) -> bool:
        """Count one optimizer step. Layers that were made dense are no longer measured.

        Returns:
            Whether the step was measured.

        Raises:
            ConfigError: A layer to be measured is no longer in the model, because something replaced it.
        """
        self._drop_dense_layers()
        self._steps += 1
        turn = self._steps % self._interval
        if turn in (0, self._interval - 1):
            self._check_present()
        if turn == self._interval - 1:
            self._before = {name: layer.chosen_mask() for name, layer in self._layers.items()}
        if turn or not self._layers:
            return False
        self._measured = {name: _measured(layer, self._before[name]) for name, layer in self._layers.items()}
        self._sizes = [layer.weight.numel() for layer in self._layers.values()]
        self._before, self._step = {}, self._steps
        return True

    def read(self, reference: Mapping[str, float] | None = None) -> dict[str, float]:
        """The values of the last measured step. Synchronises once.

        Args:
            reference: What read() returned in a dense run at the same step.

        Returns:
            Empty before the first measured step. Then, per layer, "flip_rate/<layer>", "kept_magnitude/<layer>" (share
            of the sum of magnitudes that the mask keeps) and "dead_rows/<layer>" (share of rows whose kept entries are
            all zero). "flip_rate" is the mean over all entries of all layers, "phase" the share of the layers that are
            sparse now: 1 or 0 under a schedule. With a reference also "flip_ratio/<layer>", the quotient of the flip
            rates, if the reference is not 0.

        Raises:
            ConfigError: reference lacks a layer.
        """
        if not self._measured:
            return {}
        first = next(iter(self._measured.values())).device  # a pipeline may have its layers on several
        rows = torch.stack([row.to(first, non_blocking=True) for row in self._measured.values()]).tolist()
        values = {
            f"{metric}/{layer}": value
            for layer, row in zip(self._measured, rows, strict=True)
            for metric, value in zip(_NAMES, row, strict=True)
        }
        mean = sum(row[0] * size for row, size in zip(rows, self._sizes, strict=True)) / sum(self._sizes)
        self._drop_dense_layers()
        enabled = sum(layer.sparse_enabled for layer in self._layers.values()) / max(1, len(self._layers))
        ratios = {} if reference is None else self._ratios(values, reference)
        return {FLIP_RATE: mean, "phase": enabled, **values, **ratios}

    def _check_present(self) -> None:
        if changed := changed_since(self._model, self._layers):
            raise ConfigError(
                f"{changed[0]} is measured, but {changed[1]}. Convert before sparsify, and build MaskMetrics afterwards"
            )

    def _drop_dense_layers(self) -> None:
        self._layers = {name: layer for name, layer in self._layers.items() if isinstance(layer, SemiSparseLinear)}

    def _ratios(self, values: Mapping[str, float], reference: Mapping[str, float]) -> dict[str, float]:
        rates = {layer: f"{FLIP_RATE}/{layer}" for layer in self._measured}
        if missing := [name for name in rates.values() if name not in reference]:
            raise ConfigError(f"reference has no {missing[0]!r}; pass what read() gave for the same layers")
        return {
            f"{FLIP_RATIO}/{layer}": values[name] / reference[name] for layer, name in rates.items() if reference[name]
        }


@torch.no_grad()
def mask_statistics(model: nn.Module) -> dict[str, float]:
    """kept_magnitude and dead_rows of each SemiSparseLinear, of the weights as they are now. Synchronises.

    Args:
        model: A module with SemiSparseLinear layers.

    Returns:
        Names and meanings as MaskMetrics.read.

    Raises:
        NoLayerMatchedError: model has no SemiSparseLinear.
        LayerRefusedError: A weight is sharded.
    """
    found = {}
    for name, layer in _weight_layers(model).items():
        for metric, value in zip(_NAMES[1:], _statistics(layer.weight, layer.chosen_mask()), strict=True):
            found[f"{metric}/{name}"] = value.item()
    return found


def _weight_layers(model: nn.Module) -> dict[str, SemiSparseLinear]:
    layers = layers_with_masks(model)
    if not layers:
        raise NoLayerMatchedError(
            f"model={type(model).__name__} has no SemiSparseLinear to follow; call sparsify first"
        )
    for name, layer in layers.items():
        if is_sharded(layer.weight):
            raise LayerRefusedError(f"{name}.weight is a sharded DTensor: {UNSHARD}")
    return layers


def _measured(layer: SemiSparseLinear, before: Tensor) -> Tensor:
    """The values of _NAMES for one layer, with the mask that it had before the step."""
    mask = layer.chosen_mask()
    flip_rate = (before ^ mask).sum() / before.numel()
    return torch.stack([flip_rate, *_statistics(layer.weight, mask)])


def _statistics(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Kept magnitude and dead rows, in fp32 on the weight's device; a weight of zeros keeps all of its magnitude."""
    pruned = torch.where(mask, weight.detach(), 0)
    kept, whole = (matrix.detach().abs().sum(dtype=torch.float32) for matrix in (pruned, weight))
    dead = (pruned == 0).all(dim=1).sum() / pruned.shape[0]
    return torch.where(whole == 0, 1.0, kept / whole), dead
