"""Options that the lab's commands share, and how a command ends after runs that diverged."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

DIVERGED = 3
"""Exit code of a command whose runs diverged; the others are semisparse.cli.common's."""


class Data(StrEnum):
    """Data sets of `train` and `evaluate`."""

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


def end_if_diverged(names: Sequence[str]) -> None:
    """End the command with DIVERGED and a line that names the runs whose loss was not finite, where there is one."""
    if names:
        typer.echo(
            f"error: {', '.join(names)} diverged: a loss was not finite, so the scores mean nothing; "
            "try a lower learning rate or more precision",
            err=True,
        )
        raise typer.Exit(DIVERGED)
