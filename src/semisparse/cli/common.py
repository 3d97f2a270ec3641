"""What the commands share: options, the way errors are shown, and the choice of data."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from semisparse.errors import SemiSparseError


class Data(StrEnum):
    """Data sets of the demo."""

    DIGITS = "digits"
    FASHION_MNIST = "fashion-mnist"


class Device(StrEnum):
    """Where to compute; auto is CUDA where there is one."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Precision(StrEnum):
    """fp32, or autocast over fp32 weights."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


DataOption = Annotated[Data, typer.Option(help="Images to train on; digits come with scikit-learn.")]
DataDirOption = Annotated[
    Path | None,
    typer.Option(help="Folder with the four idx files of fashion-mnist, .gz or not."),
]
DeviceOption = Annotated[Device, typer.Option(help="Where to compute; auto takes a CUDA GPU where there is one.")]


@contextmanager
def typed_errors() -> Iterator[None]:
    """Show an error that semisparse raises on purpose as one line on stderr and exit with code 2, without traceback."""
    try:
        yield
    except SemiSparseError as error:
        message = " ".join(str(error).split())
        typer.echo(f"error: {message}", err=True)
        raise typer.Exit(2) from None
