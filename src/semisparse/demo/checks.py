"""Checks that the demo's frozen settings share. Each raises ConfigError, naming the setting, value and range."""

from collections.abc import Iterable
from typing import Any

from semisparse.errors import ConfigError


def is_number(value: Any) -> bool:
    """Whether value is an int or a float; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_counts(settings: Any, names: Iterable[str], least: int = 1) -> None:
    """The attributes of settings called names are whole numbers, least or more."""
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}={value!r} must be a whole number, {least} or more")


def check_ranges(settings: Any, names: Iterable[str], high: float = 1) -> None:
    """The attributes of settings called names are numbers from 0 to high; NaN is none."""
    for name in names:
        value = getattr(settings, name)
        if not is_number(value) or not 0 <= value <= high:
            raise ConfigError(f"{name}={value!r} must lie between 0 and {high}")
