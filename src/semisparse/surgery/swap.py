"""Making linear layers of a model semi-sparse, in place, with a report.

Every check runs before the first change, so a call that raises leaves the model as it was.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import overload

from torch import nn

from semisparse.config import SparseConfig
from semisparse.errors import ConfigError, NoLayerMatchedError
from semisparse.nn import SemiSparseActivationLinear, SemiSparseBase, SemiSparseLinear
from semisparse.nn.float8 import is_float8, to_linear
from semisparse.surgery.coverage import share_outside_linear
from semisparse.surgery.named import configs_by_layer
from semisparse.surgery.refusals import Candidates
from semisparse.surgery.report import SKIPPED, SWAPPED, LayerRow, SwapReport
from semisparse.surgery.roles import roles_of
from semisparse.surgery.selection import FoundLayer, Selector, as_selectors, matches, nothing_matched

LAYER_CLASSES: dict[str, type[SemiSparseBase]] = {
    "weight": SemiSparseLinear,
    "activation": SemiSparseActivationLinear,
}
"""Operand that a config prunes -> the layer class that does it."""

Decision = SparseConfig | str
"""The config that a layer is swapped with, or why it stays as it is."""

_NOT_SELECTED, _NOT_NAMED = "not selected", "not named"


@overload
def sparsify(
    model: nn.Module,
    config: SparseConfig | None = None,
    select: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
    *,
    take_float8: bool = False,
) -> SwapReport: ...


@overload
def sparsify(model: nn.Module, config: Mapping[str, SparseConfig], *, take_float8: bool = False) -> SwapReport: ...


def sparsify(
    model: nn.Module,
    config: SparseConfig | Mapping[str, SparseConfig] | None = None,
    select: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
    *,
    take_float8: bool = False,
) -> SwapReport:
    """Make linear layers of model semi-sparse, in place, and report on every linear layer.

    Parameters, hooks, training flag, dtype and device stay, and optimizers built before remain valid. Swap before
    activation checkpointing, torch.compile and FSDP wrapping.

    A layer is refused if it cannot be 2:4, or if the source of a module above it reads its weight without ever calling
    the layer; the reason names the line. If that module also calls the layer, the report says 'verify'.

    Args:
        model: Any module; a root nn.Linear has the name "".
        config: Settings of all selected layers, by default SparseConfig(). Or a mapping from layer names to settings:
            exactly these layers are swapped, each with its own settings. A name with *, ? or [ is a glob over the
            whole name. An exact name takes precedence over globs, and an earlier glob over a later one.
        select: One or several of: a substring of the layer's name, a glob over the whole name, a compiled regular
            expression (searched), or a callable (name, module) -> bool. None selects every linear layer except those
            whose role or name says output head, patch embedding or adapter; the report names them.
        exclude: Layers to leave dense, in the same form; takes precedence over select.
        take_float8: False leaves layers that torchao converted (Float8Linear) as they are. True lets them be selected
            like any nn.Linear: the layer becomes semi-sparse with the same Parameters, config (normally with
            precision="fp8") replaces torchao's settings, and densify makes it a plain nn.Linear, not a Float8Linear.

    Returns:
        One row per linear layer: what was done with it, its settings, and why if it stays dense.

    Raises:
        NoLayerMatchedError: A selector or name matches nothing (the message lists the closest names), or no layer
            would change (it lists the reasons).
        LayerRefusedError: The mapping names a layer, not by a glob, that must stay dense.
        ConfigError: A value is not a config or a selector, or a mapping comes together with select or exclude or gives
            one tied layer two settings. Or take_float8 is not a bool.
    """
    if not isinstance(take_float8, bool):
        raise ConfigError(f"take_float8={take_float8!r} must be True or False")
    if isinstance(config, Mapping):
        if select is not None or exclude is not None:
            raise ConfigError("config is a mapping, which names the layers itself: leave out select and exclude")
        candidates = Candidates(model, take_float8=take_float8)
        return _swap(candidates, *_by_names(candidates, config))
    config = SparseConfig() if config is None else config
    if not isinstance(config, SparseConfig):
        raise ConfigError(f"config={config!r} must be a SparseConfig or a mapping from layer names to SparseConfig")
    candidates = Candidates(model, take_float8=take_float8)
    decide, remarks = by_selectors(candidates, config, select, exclude)
    outside = str(share_outside_linear(model))
    return _swap(candidates, decide, (*remarks, *([outside] if outside else [])))


def _by_names(
    candidates: Candidates, configs: Mapping[str, SparseConfig]
) -> tuple[Callable[[FoundLayer], Decision], tuple[str, ...]]:
    """The decision about each layer, and remarks on entries of the mapping that had no effect."""
    wanted, remarks = configs_by_layer(candidates, configs)

    def decide(found: FoundLayer) -> Decision:
        refusal = candidates.refusal(found)
        if id(found.layer) in wanted:
            return refusal or wanted[id(found.layer)]
        return _left(_NOT_NAMED, refusal)

    return decide, remarks


def by_selectors(
    candidates: Candidates,
    config: SparseConfig,
    select: Selector | Iterable[Selector] | None,
    exclude: Selector | Iterable[Selector] | None,
) -> tuple[Callable[[FoundLayer], Decision], tuple[str, ...]]:
    """The decision about each layer, and remarks on selectors that had no effect.

    Args:
        candidates: The layers of the model.
        config: Of the layers that are swapped.
        select: As sparsify's.
        exclude: As sparsify's.

    Raises:
        NoLayerMatchedError: A selector matches nothing.
        ConfigError: A value is not a selector.
    """
    layers = candidates.layers
    selected, excluded = as_selectors(select, "select"), as_selectors(exclude, "exclude")
    if select is not None and not selected:
        raise NoLayerMatchedError("select is empty, so nothing would change; leave it out to select every nn.Linear")
    for selector in selected:
        if not any(matches(selector, found) for found in layers):
            raise nothing_matched(selector, layers, "select")
    remarks = tuple(
        f"remark: exclude={selector!r} matched no linear layer"
        for selector in excluded
        if not any(matches(selector, found) for found in layers)
    )
    # A tied layer is excluded, or has a role, by any of its names.
    kept_dense = {id(found.layer) for found in layers if any(matches(selector, found) for selector in excluded)}
    roles = {} if selected else roles_of(candidates.model, layers)

    def decide(found: FoundLayer) -> Decision:
        if selected and not any(matches(selector, found) for selector in selected):
            return _left(_NOT_SELECTED, candidates.refusal(found))
        if id(found.layer) in kept_dense:
            return "excluded"
        return candidates.refusal(found) or roles.get(id(found.layer)) or config

    return decide, remarks


def _left(why: str, refusal: str | None) -> str:
    """Why a layer that was not asked for stays dense, and whether it could be asked for."""
    return why if refusal is None else f"{why}, and could not be swapped: {refusal}"


def _reasons(decided: list[tuple[FoundLayer, Decision]]) -> str:
    """Why the layers that were asked for stay dense: each reason once, with the first names."""
    names: dict[str, list[str]] = {}
    for found, decision in decided:
        names.setdefault(str(decision), []).append(found.name or "(root)")
    return "; ".join(
        f"{', '.join(of[:3])}{f' and {len(of) - 3} more' if len(of) > 3 else ''}: {reason}"
        for reason, of in names.items()
        if not reason.startswith((_NOT_SELECTED, _NOT_NAMED))
    )


def _swap(candidates: Candidates, decide: Callable[[FoundLayer], Decision], remarks: tuple[str, ...]) -> SwapReport:
    """Swap the layers for which decide gives a config. A tied layer is swapped if any of its names has one."""
    decided = [(found, decide(found)) for found in candidates.layers]
    chosen: dict[int, tuple[FoundLayer, SparseConfig]] = {}
    for found, decision in decided:
        if isinstance(decision, SparseConfig):
            chosen.setdefault(id(found.layer), (found, decision))
    if not chosen:
        raise NoLayerMatchedError(". ".join([f"no layer of model would change. {_reasons(decided)}", *remarks]))
    for _, config in chosen.values():
        LAYER_CLASSES[config.operand]._announce()  # a warning that is an error comes before the first change
    rows = []
    for found, decision in decided:
        size = found.layer.out_features, found.layer.in_features
        if id(found.layer) not in chosen:
            rows.append(LayerRow(found.name, *size, SKIPPED, str(decision)))
            continue
        first, config = chosen[id(found.layer)]
        if first is not found:
            rows.append(LayerRow(found.name, *size, SKIPPED, f"the same layer as {first.name}, swapped there"))
        else:
            note = candidates.note(found, config)
            if is_float8(found.layer):
                to_linear(found.layer)
            LAYER_CLASSES[config.operand].from_dense(found.layer, config)
            rows.append(LayerRow(found.name, *size, SWAPPED, note, config))
    return SwapReport(tuple(rows), remarks)
