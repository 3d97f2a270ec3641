"""Checks of arguments that several levels share."""

from torch import nn

from semisparse.errors import ConfigError


def check_module(model: object) -> None:
    """Raise ConfigError unless model is a torch.nn.Module."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}; pass a torch.nn.Module")
