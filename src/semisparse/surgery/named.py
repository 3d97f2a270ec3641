"""Settings by layer name: which layer of a model gets which config of a mapping."""

from collections.abc import Iterable, Mapping

from semisparse.config import SparseConfig
from semisparse.errors import ConfigError, LayerRefusedError, NoLayerMatchedError
from semisparse.surgery.refusals import Candidates
from semisparse.surgery.selection import FoundLayer, clean_name, is_glob, matches, nothing_matched


def configs_by_layer(
    candidates: Candidates, configs: Mapping[str, SparseConfig]
) -> tuple[dict[int, SparseConfig], tuple[str, ...]]:
    """The config of each layer that a mapping names, by the layer's identity, and remarks on entries without effect.

    An exact name takes precedence over globs, and an earlier glob over a later one. A layer that only a glob matches
    may be one that must stay dense.

    Args:
        candidates: The layers of the model.
        configs: Exact names, or globs over the whole name, to settings.

    Raises:
        NoLayerMatchedError: A key matches no linear layer, or there is none.
        LayerRefusedError: An exact name is that of a layer that must stay dense.
        ConfigError: A key is not a string, a value is not a SparseConfig, or two exact names of one tied layer have
            different values.
    """
    if not configs:
        raise NoLayerMatchedError("config is empty, so nothing would change; name at least one nn.Linear")
    for key, value in configs.items():
        if not isinstance(key, str):
            raise ConfigError(f"config has the key {key!r}, which must be the name of a layer or a glob over names")
        if not isinstance(value, SparseConfig):
            raise ConfigError(f"config[{key!r}]={value!r} must be a SparseConfig")
    layers = candidates.layers
    by_name = _aliases(layers)
    named = names_of(configs, layers, "config")
    wanted = _by_exact_name(candidates, by_name, configs)
    remarks = []
    for key, config in configs.items():
        if key in by_name:
            continue
        new = [found for found in named[key] if id(found.layer) not in wanted]
        wanted |= {id(found.layer): config for found in new}
        if not new:
            remarks.append(f"remark: config[{key!r}] has no effect: other entries name all of its layers")
    return wanted, tuple(remarks)


def names_of(keys: Iterable[str], layers: list[FoundLayer], argument: str) -> dict[str, list[FoundLayer]]:
    """The layers that each key of a mapping names; exact names first, then globs in their order.

    Args:
        keys: Exact names, or globs over the whole name.
        layers: The layers of a model.
        argument: The mapping's name, for the error.

    Raises:
        NoLayerMatchedError: A key matches no layer.
    """
    by_name = _aliases(layers)
    exact = {key: [by_name[key]] for key in keys if key in by_name}
    globs = {key: [found for found in layers if is_glob(key) and matches(key, found)]
             for key in keys if key not in by_name}  # fmt: skip
    for key, found in globs.items():
        if not found:
            raise nothing_matched(key, layers, argument)
    return exact | globs


def _aliases(layers: list[FoundLayer]) -> dict[str, FoundLayer]:
    """Layers by their names, with and without wrappers."""
    return {alias: found for found in layers for alias in (found.name, clean_name(found.name))}


def _by_exact_name(
    candidates: Candidates, by_name: Mapping[str, FoundLayer], configs: Mapping[str, SparseConfig]
) -> dict[int, SparseConfig]:
    first: dict[int, str] = {}
    for key in configs:
        if key not in by_name:
            continue
        found = by_name[key]
        reason = candidates.refusal(found)
        if reason is not None:
            raise LayerRefusedError(f"config names {key!r}, which must stay dense: {reason}")
        other = first.setdefault(id(found.layer), key)
        if configs[other] != configs[key]:
            raise ConfigError(f"config: {other!r} and {key!r} are the same layer; give both the same setting")
    return {layer: configs[key] for layer, key in first.items()}
