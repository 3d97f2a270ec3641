"""Checks of arguments that several levels share."""

from typing import Any, get_args

from torch import nn

from semisparse.errors import ConfigError


def check_module(model: object) -> None:
    """Raise ConfigError unless model is a torch.nn.Module."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}; pass a torch.nn.Module")


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise ConfigError unless the argument called name is one of choices, a Literal."""
    if value not in get_args(choices):
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(map(repr, get_args(choices)))}")


def check_progress(progress: object) -> None:
    """Raise ConfigError unless progress can be called."""
    if not callable(progress):
        raise ConfigError(f"progress={progress!r} must be a callable that takes a line of text: print, for example")


def check_budget(seconds: object) -> None:
    """Raise ConfigError unless seconds is a positive number, or None for no limit."""
    if seconds is not None and not (type(seconds) in (int, float) and seconds > 0):  # type: ignore[operator]
        raise ConfigError(f"seconds={seconds!r} must be a positive number of seconds, or None for no limit")
