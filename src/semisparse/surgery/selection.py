"""Finding layers by name: substring, glob, regular expression or callable, over names without wrapper prefixes."""

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from semisparse.arguments import check_module
from semisparse.errors import ConfigError, NoLayerMatchedError

Selector = str | re.Pattern[str] | Callable[[str, nn.Module], bool]

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Path segments that torch's own wrappers insert into a name."""

# Wrappers that hold the model as their attribute "module", by class name: torch's, timm's, DeepSpeed's.
_MODULE_HOLDERS = frozenset({
    "DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "AveragedModel", "ModelEma", "ModelEmaV2",
    "ModelEmaV3", "DeepSpeedEngine",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class FoundLayer:
    """A linear layer of a model.

    Attributes:
        name: As named_modules() gives it; "" for the root.
        layer: The module.
        above: The modules above it, its parent first.
    """

    name: str
    layer: nn.Linear
    above: tuple[nn.Module, ...]

    @property
    def parent(self) -> nn.Module | None:
        """The module that holds the layer; None for the root."""
        return self.above[0] if self.above else None


def linear_layers(model: nn.Module) -> list[FoundLayer]:
    """Every nn.Linear of model (the root too), once per name, so that tied layers appear under each name."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = []
    for name, module in modules.items():
        if isinstance(module, nn.Linear):
            parts = name.split(".") if name else []
            above = tuple(modules[".".join(parts[:depth])] for depth in reversed(range(len(parts))))
            found.append(FoundLayer(name, module, above))
    return found


def clean_name(name: str) -> str:
    """name without the segments that torch.compile, FSDP1 and checkpoint wrappers insert."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def plain_names(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of model, each once, by names without wrappers: neither torch's own segments nor "module".

    So a model has the same names bare, compiled, under DistributedDataParallel and in an averaged copy.

    Raises:
        ConfigError: model is not a module.
    """
    check_module(model)
    modules = dict(model.named_modules())
    named: dict[str, nn.Module] = {}
    for name, module in modules.items():
        parts = name.split(".") if name else []
        kept = [part for depth, part in enumerate(parts)
                if not (part == "module" and _holds_module(modules[".".join(parts[:depth])]))]  # fmt: skip
        plain = clean_name(".".join(kept))
        named[name if plain in named else plain] = module
    return named


def _holds_module(wrapper: nn.Module) -> bool:
    return any(cls.__name__ in _MODULE_HOLDERS for cls in type(wrapper).__mro__)


def as_selectors(value: Selector | Iterable[Selector] | None, argument: str) -> tuple[Selector, ...]:
    """A single selector or several as a tuple.

    Raises:
        ConfigError: value is anything else; the message names argument.
    """
    if value is None:
        return ()
    selectors = (value,) if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
    for selector in selectors:
        if not isinstance(selector, (str, re.Pattern)) and (isinstance(selector, type) or not callable(selector)):
            raise ConfigError(
                f"{argument}={selector!r} must be a substring, a glob, a compiled regular expression or a callable "
                "(name, module) -> bool"
            )
    return selectors


def matches(selector: Selector, found: FoundLayer) -> bool:
    """Whether selector selects the layer; a string as in text_matches."""
    for name in {found.name, clean_name(found.name)}:
        if isinstance(selector, re.Pattern):
            hit = selector.search(name) is not None
        elif not isinstance(selector, str):
            hit = bool(selector(name, found.layer))
        else:
            hit = text_matches(selector, name)
        if hit:
            return True
    return False


def text_matches(text: str, name: str) -> bool:
    """Whether a string selects a name: as a glob over the whole name if is_glob, otherwise as a substring."""
    return fnmatch.fnmatchcase(name, text) if is_glob(text) else text in name


def is_glob(text: str) -> bool:
    """Whether a string is a glob over whole names: one with *, ? or [."""
    return any(mark in text for mark in "*?[")


def nothing_matched(selector: Selector, layers: list[FoundLayer], argument: str) -> NoLayerMatchedError:
    """The error for a selector that matches none of layers, with the closest names; argument: where it was given."""
    names = [found.name for found in layers]
    near = closest(selector, names) if isinstance(selector, str) else names[:3]
    hint = ", ".join(repr(name) for name in near)
    if isinstance(selector, str) and not is_glob(selector) and any(selector in name for name in names):
        hint += f"; a key is a whole name or a glob over it, such as '*{selector}*'"
    return NoLayerMatchedError(f"{argument}: {selector!r} matches no nn.Linear of model; closest names: {hint}")


def closest(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The names most similar to name; first those of which one is a suffix of the other."""

    def likeness(candidate: str) -> tuple[bool, float]:
        suffix = name.endswith(f".{candidate}") or candidate.endswith(f".{name}")
        return suffix, difflib.SequenceMatcher(None, name, candidate).ratio()

    return sorted(dict.fromkeys(names), key=likeness, reverse=True)[:count]
