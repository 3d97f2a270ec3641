"""Finding layers by name: substring, glob, regular expression or callable, over names without wrapper prefixes."""

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from semisparse.errors import ConfigError

Selector = str | re.Pattern[str] | Callable[[str, nn.Module], bool]

# Path segments that torch's own wrappers insert into a name.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


@dataclass(frozen=True, slots=True)
class FoundLayer:
    """A linear layer of a model: its name, the module, and the module that holds it (None for the root)."""

    name: str
    layer: nn.Linear
    parent: nn.Module | None


def linear_layers(model: nn.Module) -> list[FoundLayer]:
    """Every nn.Linear of model (the root too), once per name, so that tied layers appear under each name."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = []
    for name, module in modules.items():
        if isinstance(module, nn.Linear):
            parent = modules[name.rpartition(".")[0]] if name else None
            found.append(FoundLayer(name, module, parent))
    return found


def clean_name(name: str) -> str:
    """name without the segments that torch.compile, FSDP1 and checkpoint wrappers insert."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def as_selectors(value: Selector | Iterable[Selector] | None, argument: str) -> tuple[Selector, ...]:
    """A single selector or several as a tuple; raises ConfigError, naming argument, for anything else."""
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
    """Whether selector picks the layer. A string with *, ? or [ is a glob over the whole name, else a substring."""
    for name in {found.name, clean_name(found.name)}:
        if isinstance(selector, re.Pattern):
            hit = selector.search(name) is not None
        elif not isinstance(selector, str):
            hit = bool(selector(name, found.layer))
        elif any(mark in selector for mark in "*?["):
            hit = fnmatch.fnmatchcase(name, selector)
        else:
            hit = selector in name
        if hit:
            return True
    return False


def closest(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The names most like name: those that end it or that it ends first, then by similarity."""

    def likeness(candidate: str) -> tuple[bool, float]:
        suffix = name.endswith(f".{candidate}") or candidate.endswith(f".{name}")
        return suffix, difflib.SequenceMatcher(None, name, candidate).ratio()

    return sorted(dict.fromkeys(names), key=likeness, reverse=True)[:count]
