"""What a plan chooses from, by name: the settings that a layer may get instead of staying dense."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

import torch
from torch import nn

from semisparse.config import SparseConfig
from semisparse.errors import ConfigError
from semisparse.routes import why_masked_dense, why_not_fp8

DENSE = "dense"
"""The name of nn.Linear among the candidates; always measured, since all others are compared with it."""

_MAKERS: dict[str, Callable[[], SparseConfig]] = {
    "dense fp8": lambda: SparseConfig(weight=None, precision="fp8"),
    "2:4": SparseConfig,
    "2:4 + mvue": lambda: SparseConfig(grad_output="mvue"),
    "fp8 + 2:4": lambda: SparseConfig(precision="fp8"),
    "fp8 + 2:4 + mvue": lambda: SparseConfig(precision="fp8", grad_output="mvue"),
}


def default_candidates() -> dict[str, SparseConfig]:
    """Every candidate whose settings this version takes, by name."""
    made = {}
    for name, make in _MAKERS.items():
        with suppress(ConfigError):
            made[name] = make()
    return made


def as_candidates(given: Iterable[str] | Mapping[str, SparseConfig] | None) -> dict[str, SparseConfig]:
    """Candidates by name.

    Args:
        given: Names of default_candidates(), or settings by names of one's own, or None for all of the former.

    Raises:
        ConfigError: A name is unknown, a value is not a config of a layer with a dense input, or there is none.
    """
    known = default_candidates()
    if given is None:
        return known
    if not isinstance(given, Mapping):
        names = (given,) if isinstance(given, str) else tuple(given)
        for name in names:
            if name not in known:
                raise ConfigError(f"candidates: {name!r} is not one of {', '.join(map(repr, known))}")
        given = {name: known[name] for name in names}
    for name, config in given.items():
        if not isinstance(config, SparseConfig) or config.operand != "weight":
            raise ConfigError(
                f"candidates[{name!r}]={config!r} must be a SparseConfig that prunes no activation: that mixes tokens, "
                "so it is chosen by hand, with sparsify"
            )
        if not isinstance(name, str) or name == DENSE or not name:
            raise ConfigError(f"candidates has the name {name!r}: use text other than {DENSE!r}, which is nn.Linear")
        if name.startswith("(") or not name.isprintable():
            raise ConfigError(f"candidates has the name {name!r}: use one line of text that begins with no bracket")
    if not given:
        raise ConfigError("candidates is empty, so there is nothing to choose; leave it out to try all")
    return dict(given)


def obstacle(layer: nn.Linear, dtype: torch.dtype, config: SparseConfig) -> str:
    """Why layer would not run as config says, so that it need not be timed; "" if it does.

    Args:
        layer: On the device that is measured.
        dtype: Of the products.
        config: The candidate's.
    """
    if config.precision is not None:
        return why_not_fp8(layer.weight, dtype)
    return why_masked_dense(layer.weight, dtype, config.backend) if layer.weight.is_cuda else ""
