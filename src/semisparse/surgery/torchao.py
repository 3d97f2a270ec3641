"""For users of torchao: the two functions of torchao.sparsity.training, and a filter for its conversions."""

from collections.abc import Mapping

from torch import nn

from semisparse.config import SparseConfig
from semisparse.errors import ConfigError
from semisparse.nn import SemiSparseBase
from semisparse.surgery.densify import densify
from semisparse.surgery.report import SwapReport
from semisparse.surgery.swap import LAYER_CLASSES, sparsify


def swap_linear_with_semi_sparse_linear(
    model: nn.Module, config: Mapping[str, type[SemiSparseBase] | SparseConfig]
) -> SwapReport:
    """Swap the linear layers that config names: torchao's name for sparsify(model, config).

    Args:
        model: Any module; a root nn.Linear has the name "".
        config: Fully qualified names to SemiSparseLinear, SemiSparseActivationLinear or a SparseConfig.

    Returns:
        One row per linear layer.

    Raises:
        NoLayerMatchedError: A name matches nothing; the message lists the closest names. torchao ignores such a name.
        LayerRefusedError: A named layer must stay dense; the message says why.
        ConfigError: config is not a mapping, or a value is of another kind.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"config={config!r} must be a mapping from layer names to layer classes or SparseConfig")
    return sparsify(model, {name: _as_config(name, value) for name, value in config.items()})


def swap_semi_sparse_linear_with_linear(model: nn.Module) -> SwapReport:
    """Make every semi-sparse layer dense again: torchao's name for densify(model), with the errors listed there."""
    return densify(model)


def not_swapped(module: nn.Module, name: str = "") -> bool:
    """Whether module is not a semi-sparse layer: the filter that lets conversions of other libraries leave ours alone.

        convert_to_float8_training(model, module_filter_fn=semisparse.not_swapped)

    Without a filter torchao replaces semi-sparse layers, too: they are subclasses of nn.Linear. Combine it with a
    filter of your own by `and`.

    Args:
        module: Any module.
        name: Not used; such filters are called with it.
    """
    return not isinstance(module, SemiSparseBase)


def _as_config(name: str, value: object) -> SparseConfig:
    if isinstance(value, SparseConfig):
        return value
    for layer_class in LAYER_CLASSES.values():
        if value is layer_class:
            return layer_class.sparse_config
    raise ConfigError(
        f"config[{name!r}]={value!r} must be SemiSparseLinear, SemiSparseActivationLinear or a SparseConfig"
    )
