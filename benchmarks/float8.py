"""torchao's float8 training, a row to compare with: tensorwise scaling, dynamic, all three products in fp8.

torchao is not among the packages that the benchmarks need. It is imported only where its row is asked for.
"""

import importlib
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import nn

from benchmarks.timing import device
from semisparse_lab.train import float8 as lab
from semisparse_lab.train.float8 import INSTALL


class MissingPeerError(RuntimeError):
    """A row was asked for whose package is not there."""


def checked_version() -> str:
    """The version of torchao.

    Raises:
        MissingPeerError: It is not installed, or has no float8 training.
    """
    try:
        found = version("torchao")
        _training()
    except (PackageNotFoundError, ImportError) as error:
        raise MissingPeerError(
            f"the row torchao float8 was asked for, and torchao cannot be imported ({error}): {INSTALL}, or leave the "
            "row out"
        ) from error
    return found


def converted(model: nn.Module, names: Collection[str]) -> nn.Module:
    """model with the linears of these names converted in place, as torchao wants it before it is compiled.

    On a CPU, where nothing is measured, the products are emulated.

    Raises:
        MissingPeerError: torchao is not there.
        RuntimeError: Other layers than these were converted.
    """
    checked_version()
    return lab.converted(model, names, emulate=device() == "cpu")


def _training() -> Any:
    return importlib.import_module("torchao.float8")
