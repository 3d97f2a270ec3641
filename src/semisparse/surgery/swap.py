"""Model surgery: making linear layers semi-sparse and dense again, in place, with a report.

Every check runs before the first change, so a call that raises leaves the model as it was.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, get_args

from torch import nn

from semisparse.arguments import check_module
from semisparse.config import SparseConfig
from semisparse.errors import ConfigError, LayerRefusedError, NoLayerMatchedError
from semisparse.nn import SemiSparseActivationLinear, SemiSparseBase, SemiSparseLinear
from semisparse.surgery.candidates import Candidates
from semisparse.surgery.coverage import share_outside_linear
from semisparse.surgery.masked_weights import MaskedWeights
from semisparse.surgery.report import SKIPPED, SWAPPED, LayerRow, SwapReport
from semisparse.surgery.roles import embeddings_of, role_of
from semisparse.surgery.selection import (
    FoundLayer,
    Selector,
    as_selectors,
    clean_name,
    closest,
    linear_layers,
    matches,
)

Weights = Literal["dense", "masked"]

_LAYER_CLASSES: dict[str, type[SemiSparseBase]] = {
    "weight": SemiSparseLinear,
    "activation": SemiSparseActivationLinear,
}


def sparsify(
    model: nn.Module,
    config: SparseConfig | None = None,
    select: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
) -> SwapReport:
    """Make the selected linear layers of model semi-sparse, in place, and report on every linear layer.

    config: settings of all swapped layers; default SparseConfig().
    select, exclude: one or several of: a substring of the layer's name, a glob over the whole name, a compiled regular
    expression (searched), or a callable (name, module) -> bool. select=None means every linear layer but those whose
    role or name says output head, patch embedding or adapter (roles.py); the report names them, and select takes them.
    A layer whose weight the source of a module above it reads without ever calling the layer is refused, with the line;
    where it also calls the layer, the report says 'verify'.
    Parameters, hooks, training flag, dtype and device stay; optimizers built before stay valid. Swap before AC,
    torch.compile and FSDP wrapping.
    Raises NoLayerMatchedError when a selector matches nothing or no layer would change (the message lists the reasons),
    ConfigError for a wrong config or selector. The model is then unchanged.
    """
    config = SparseConfig() if config is None else config
    if not isinstance(config, SparseConfig):
        raise ConfigError(f"config={config!r} must be a SparseConfig")
    candidates = Candidates(model)
    layers = candidates.layers
    selected = as_selectors(select, "select")
    excluded = as_selectors(exclude, "exclude")
    if select is not None and not selected:
        raise NoLayerMatchedError("select is empty, so nothing would change; leave it out to select every nn.Linear")
    for selector in selected:
        if not any(matches(selector, found) for found in layers):
            raise _nothing_named(selector, layers, "select")
    remarks = tuple(
        f"remark: exclude={selector!r} matched no linear layer"
        for selector in excluded
        if not any(matches(selector, found) for found in layers)
    )
    kept_dense = {id(found.layer) for found in layers if any(matches(selector, found) for selector in excluded)}
    roles = {} if selected else _roles(model, layers)

    def reason(found: FoundLayer) -> str | None:
        if selected and not any(matches(selector, found) for selector in selected):
            return _left("not selected", candidates.refusal(found))
        if id(found.layer) in kept_dense:  # a tied layer is excluded by any of its names
            return "excluded"
        return candidates.refusal(found) or roles.get(id(found.layer))

    outside = str(share_outside_linear(model))
    return _swap(candidates, reason, lambda found: config, (*remarks, *([outside] if outside else [])))


def _roles(model: nn.Module, layers: list[FoundLayer]) -> dict[int, str]:
    """Layer id -> why it is left dense by default; a tied layer by any of its names."""
    embeddings = embeddings_of(model)
    return {id(found.layer): text for found in layers if (text := role_of(found, embeddings)) is not None}


def swap_linear_with_semi_sparse_linear(
    model: nn.Module, config: Mapping[str, type[SemiSparseBase] | SparseConfig], current_name: str = ""
) -> SwapReport:
    """Swap the linear layers named in config: {fully qualified name: layer class or SparseConfig}.

    The call of torchao.sparsity.training, whose current_name (an inner recursion argument there) is accepted when
    empty. A root nn.Linear has the name "". Unlike torchao, a name that matches nothing raises NoLayerMatchedError with
    the closest names, a layer that cannot be swapped raises LayerRefusedError with the reason; the model is then
    unchanged.
    """
    if current_name:
        raise ConfigError(f"current_name={current_name!r}: pass the submodule itself as model instead")
    if not config:
        raise NoLayerMatchedError("config is empty, so nothing would change; name at least one nn.Linear")
    settings = {name: _as_config(name, value) for name, value in config.items()}
    candidates = Candidates(model)
    layers = candidates.layers
    by_name = {alias: found for found in layers for alias in (found.name, clean_name(found.name))}
    wanted: dict[int, SparseConfig] = {}
    for name, setting in settings.items():
        if name not in by_name:
            raise _nothing_named(name, layers, "config")
        layer = by_name[name].layer
        reason = candidates.refusal(by_name[name])
        if reason is not None:
            raise LayerRefusedError(f"config names {name!r}, which must stay dense: {reason}")
        if wanted.setdefault(id(layer), setting) != setting:
            other = next(other for other in settings if by_name[other].layer is layer)
            raise ConfigError(f"config: {other!r} and {name!r} are the same layer; give both the same setting")
    return _swap(
        candidates,
        lambda found: None if id(found.layer) in wanted else _left("not named", candidates.refusal(found)),
        lambda found: wanted[id(found.layer)],
    )


def densify(model: nn.Module, weights: Weights = "dense") -> SwapReport:
    """Turn every semi-sparse layer of model back into the dense class it came from, in place.

    weights: "dense" keeps the master weight (train sparse, finish dense); "masked" writes the pruned weight into the
    same Parameter, so that the dense layer computes what the sparse one did. Layers with a pruned activation keep their
    weight either way; the report says so. Raises NoLayerMatchedError when there is no semi-sparse layer,
    LayerRefusedError when one is wrapped or, for "masked", when its weight is sharded, computed by a hook, or read by
    anybody else in model (a tied embedding, an excluded layer, a layer with other settings): the pruned weight would
    change that one. Raises ConfigError for another value of weights. The model is then unchanged.
    """
    if weights not in get_args(Weights):
        raise ConfigError(f"weights={weights!r} is not one of {', '.join(map(repr, get_args(Weights)))}")
    check_module(model)
    layers = [found for found in linear_layers(model) if isinstance(found.layer, SemiSparseBase)]
    if not layers:
        raise NoLayerMatchedError(f"model={type(model).__name__} has no semi-sparse layer, so nothing would change")
    for found in layers:
        assert isinstance(found.layer, SemiSparseBase)
        if (reason := found.layer.bound_sparse()) is not None:
            raise LayerRefusedError(f"{found.name or '(root)'} has type {type(found.layer).__name__}: {reason}")
    masked = MaskedWeights(model, layers) if weights == "masked" else None
    if masked is not None:
        masked.write()
    rows: dict[int, LayerRow] = {}
    for found in layers:
        layer = found.layer
        if isinstance(layer, SemiSparseBase):  # a tied layer is dense again at its second name
            note = "dense weight kept" if masked is None else masked.note(layer)
            SemiSparseBase.to_dense(layer)
            rows[id(layer)] = LayerRow(found.name, layer.out_features, layer.in_features, SWAPPED, note)
    return SwapReport(tuple(rows.values()))


def swap_semi_sparse_linear_with_linear(model: nn.Module, current_name: str = "") -> SwapReport:
    """Turn every semi-sparse layer back to dense, master weights kept: densify(model). torchao's name for it."""
    if current_name:
        raise ConfigError(f"current_name={current_name!r}: pass the submodule itself as model instead")
    return densify(model)


def _left(why: str, refusal: str | None) -> str:
    """Why a layer that nobody asked for stays dense, and whether it could be asked for."""
    return why if refusal is None else f"{why}, and could not be swapped: {refusal}"


def _swap(
    candidates: Candidates,
    reason: Callable[[FoundLayer], str | None],
    setting: Callable[[FoundLayer], SparseConfig],
    remarks: tuple[str, ...] = (),
) -> SwapReport:
    """Swap the layers without a reason not to. A tied layer is swapped when any of its names asks for it."""
    layers = candidates.layers
    reasons = [reason(found) for found in layers]
    chosen = {id(f.layer): f for f, text in zip(reversed(layers), reversed(reasons), strict=True) if text is None}
    if not chosen:
        listing = "; ".join(f"{found.name or '(root)'}: {text}" for found, text in zip(layers, reasons, strict=True))
        raise NoLayerMatchedError(". ".join([f"no layer of model would change. {listing}", *remarks]))
    for found in chosen.values():
        _LAYER_CLASSES[setting(found).operand]._announce()  # a warning that is an error comes before the first change
    rows = []
    for found, text in zip(layers, reasons, strict=True):
        first = chosen.get(id(found.layer))
        size = found.layer.out_features, found.layer.in_features
        if first is None:
            rows.append(LayerRow(found.name, *size, SKIPPED, text or ""))
        elif first is not found:
            rows.append(LayerRow(found.name, *size, SKIPPED, f"the same layer as {first.name}, swapped there"))
        else:
            config = setting(found)
            _LAYER_CLASSES[config.operand].from_dense(found.layer, config)
            rows.append(LayerRow(found.name, *size, SWAPPED, candidates.note(found)))
    return SwapReport(tuple(rows), remarks)


def _as_config(name: str, value: object) -> SparseConfig:
    if isinstance(value, SparseConfig):
        return value
    for layer_class in _LAYER_CLASSES.values():
        if value is layer_class:
            return layer_class.sparse_config
    raise ConfigError(
        f"config[{name!r}]={value!r} must be SemiSparseLinear, SemiSparseActivationLinear or a SparseConfig"
    )


def _nothing_named(selector: Selector, layers: list[FoundLayer], argument: str) -> NoLayerMatchedError:
    names = [found.name for found in layers]
    near = closest(selector, names) if isinstance(selector, str) else names[:3]
    hint = ", ".join(repr(name) for name in near)
    return NoLayerMatchedError(f"{argument}: {selector!r} matches no nn.Linear of model; closest names: {hint}")
