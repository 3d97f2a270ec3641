"""The environment variable that says when problems are tuned."""

import os

from semisparse.errors import ConfigError

VARIABLE = "SEMISPARSE_TUNE"


def setting() -> str:
    """The variable's value: "0", "1" or "all". Read on each call.

    Raises:
        ConfigError: It is another one.
    """
    value = os.environ.get(VARIABLE, "1")
    if value not in ("0", "1", "all"):
        raise ConfigError(
            f"{VARIABLE}={value!r} is not 0 (never tune), 1 (tune a problem at its first call, unless its choice ships "
            "with the package) or all (also then)"
        )
    return value
