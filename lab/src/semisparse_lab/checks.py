"""Checks that the lab's frozen settings share. Each raises ConfigError, naming the setting, value and range."""

import math
from collections.abc import Iterable
from reprlib import Repr
from typing import Any

from semisparse.errors import ConfigError

_SHORT = Repr()
_SHORT.maxlong, _SHORT.maxstring, _SHORT.maxother = 80, 200, 80


def shown(value: Any) -> str:
    """value for a message: its repr, shortened if it is long (a whole number of thousands of digits, say)."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # more digits than Python writes
        return f"<{type(value).__name__} that is too long to show>"


def is_number(value: Any) -> bool:
    """Whether value is an int or a float, and finite as a float; bools are rejected."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def check_counts(settings: Any, names: Iterable[str], least: int = 1, most: int | None = None) -> None:
    """Check that attributes of settings are whole numbers.

    Args:
        settings: An object with these attributes.
        names: The attributes.
        least: The smallest value allowed.
        most: The largest value allowed; None for no limit.

    Raises:
        ConfigError: A value is of another type or outside the limits.
    """
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}={shown(value)} must be a whole number, {least} or more")
        if most is not None and value > most:
            raise ConfigError(f"{name}={shown(value)} must be at most {most}")


def check_ranges(settings: Any, names: Iterable[str], high: float = 1) -> None:
    """Check that attributes of settings are finite numbers from 0 to high.

    Args:
        settings: An object with these attributes.
        names: The attributes.
        high: The largest value allowed.

    Raises:
        ConfigError: A value is of another type or outside the limits.
    """
    for name in names:
        value = getattr(settings, name)
        if not is_number(value) or not 0 <= value <= high:
            limits = f"lie between 0 and {high}" if math.isfinite(high) else "be a number, 0 or more"
            raise ConfigError(f"{name}={shown(value)} must {limits}")
