"""`semisparse-lab evaluate`: test accuracy of a saved checkpoint in a plain nn.Linear model."""

import math
from pathlib import Path
from typing import Annotated

import typer

from semisparse.cli.common import typed_errors
from semisparse_lab.cli.common import Data, DataDirOption, DataOption, Device, DeviceOption, end_if_diverged


def evaluate(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="NAME.safetensors, as train writes it.")],
    data: DataOption = Data.DIGITS,
    data_dir: DataDirOption = None,
    device: DeviceOption = Device.AUTO,
) -> None:
    """Load a checkpoint into a plain nn.Linear model and print its test accuracy."""
    with typed_errors(context):
        from semisparse_lab.checkpoint.evaluation import evaluate_checkpoint

        found = evaluate_checkpoint(checkpoint, data.value, data_dir, device.value)
    typer.echo(f"{checkpoint}: test accuracy {100 * found.scores.accuracy:.2f} %, loss {found.scores.loss:.4f}")
    if found.recorded is not None:
        typer.echo(f"recorded after training: test accuracy {100 * found.recorded:.2f} %")
    end_if_diverged([] if math.isfinite(found.scores.loss) else [str(checkpoint)])
