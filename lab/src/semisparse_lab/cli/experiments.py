"""`semisparse-lab experiment NAME`: one JSON per run goes to --out, then a card with table and plot of all of them.

Runs whose file is there are skipped, so an experiment that was stopped goes on where it was.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from semisparse.cli.common import typed_errors
from semisparse_lab.cli.common import Device, DeviceOption, end_if_diverged
from semisparse_lab.cli.llama_linux import llama_linux

if TYPE_CHECKING:
    from semisparse_lab.experiment import Experiment

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the four idx files."""

ImagesOption = Annotated[Path, typer.Option(help="Folder with the four idx files.")]
TextOption = Annotated[Path | None, typer.Option(help="A standard library (default: this interpreter's).")]
OutOption = Annotated[Path, typer.Option(help="Folder for results and card.")]
SeedsOption = Annotated[int, typer.Option(min=1, max=1000, help="Seeds 0, 1, ... of each row.")]
RowOption = Annotated[list[str] | None, typer.Option(help="Rows to run, by slug (default: all).")]
PackagesOption = Annotated[Path | None, typer.Option(help="A folder of Python source (default: torch's parent).")]
TrainingBytesOption = Annotated[
    int | None, typer.Option(min=1, help="Bytes that a run trains on, at most (default: 60 million).")
]
EpochsOption = Annotated[int | None, typer.Option(help="Epochs of each run.")]
SmallOption = Annotated[bool, typer.Option("--small", help="A tiny model and little data for one epoch.")]


def vit_fashion_mnist(
    context: typer.Context,
    data_dir: ImagesOption = FASHION_MNIST,
    out: OutOption = Path("results-vit"),
    seeds: SeedsOption = 3,
    row: RowOption = None,
    epochs: EpochsOption = None,
    narrow: Annotated[bool, typer.Option("--narrow", help="A model of width 32 with few weights to spare.")] = False,
    held: Annotated[bool, typer.Option("--held", help="Hold the learning rate for 70 % of the steps.")] = False,
    long: Annotated[bool, typer.Option("--long", help="Twice the epochs.")] = False,
    small: SmallOption = False,
    device: DeviceOption = Device.AUTO,
) -> None:
    """How much of a ViT's training can be sparse; ways to choose masks. Half a minute of GPU per run."""
    kept: list[Path] = []
    with typed_errors(context, kept):
        from semisparse_lab.studies.vit_fashion_mnist import experiment

        found = experiment(data_dir, device.value, small=small, epochs=epochs, narrow=narrow, held=held, long=long)
        _run(found, row, seeds, out, kept)


def gpt_stdlib(
    context: typer.Context,
    data_dir: TextOption = None,
    out: OutOption = Path("results-gpt"),
    seeds: SeedsOption = 2,
    row: RowOption = None,
    epochs: EpochsOption = None,
    small: SmallOption = False,
    device: DeviceOption = Device.AUTO,
) -> None:
    """The recipes, in bits per byte of held-out source code. Half a minute of GPU per run."""
    kept: list[Path] = []
    with typed_errors(context, kept):
        from semisparse_lab.studies.gpt_stdlib import experiment

        _run(experiment(data_dir, device.value, small=small, epochs=epochs), row, seeds, out, kept)


def gpt_mvue(
    context: typer.Context,
    data_dir: PackagesOption = None,
    out: OutOption = Path("results-mvue"),
    seeds: SeedsOption = 3,
    row: RowOption = None,
    training_bytes: TrainingBytesOption = None,
    small: SmallOption = False,
    device: DeviceOption = Device.AUTO,
) -> None:
    """A sampled weight gradient beside a dense one, on text seen once. Half a minute of GPU per run."""
    kept: list[Path] = []
    with typed_errors(context, kept):
        from semisparse_lab.studies.gpt_mvue import experiment

        _run(experiment(data_dir, device.value, small=small, training_bytes=training_bytes), row, seeds, out, kept)


def gpt_fp8(
    context: typer.Context,
    data_dir: PackagesOption = None,
    out: OutOption = Path("results-fp8"),
    seeds: SeedsOption = 3,
    row: RowOption = None,
    training_bytes: TrainingBytesOption = None,
    small: SmallOption = False,
    device: DeviceOption = Device.AUTO,
) -> None:
    """fp8 with 2:4 beside torchao float8 and bf16, on text seen once. Half a minute of GPU per run."""
    kept: list[Path] = []
    with typed_errors(context, kept):
        from semisparse_lab.studies.gpt_fp8 import experiment

        _run(experiment(data_dir, device.value, small=small, training_bytes=training_bytes), row, seeds, out, kept)


def dino_fashion_mnist(
    context: typer.Context,
    data_dir: ImagesOption = FASHION_MNIST,
    out: OutOption = Path("results-dino"),
    seeds: SeedsOption = 3,
    row: RowOption = None,
    epochs: EpochsOption = None,
    small: SmallOption = False,
    device: DeviceOption = Device.AUTO,
) -> None:
    """Self-supervised training with a sparse student: k-NN and linear probe. Half a minute of GPU per run."""
    kept: list[Path] = []
    with typed_errors(context, kept):
        from semisparse_lab.studies.dino_fashion_mnist import experiment

        _run(experiment(data_dir, device.value, small=small, epochs=epochs), row, seeds, out, kept)


def build_group() -> typer.Typer:
    """The commands under `experiment`."""
    group = typer.Typer(no_args_is_help=True, help="Train rows of an experiment with several seeds and write its card.")
    for name, command in (
        ("vit-fashion-mnist", vit_fashion_mnist),
        ("gpt-stdlib", gpt_stdlib),
        ("gpt-mvue", gpt_mvue),
        ("gpt-fp8", gpt_fp8),
        ("dino-fashion-mnist", dino_fashion_mnist),
        ("llama-linux", llama_linux),
    ):
        group.command(name)(command)
    return group


def _run(experiment: "Experiment", row: list[str] | None, seeds: int, out: Path, kept: list[Path]) -> None:
    from semisparse_lab.cli.tables import progress_for
    from semisparse_lab.pipeline import diverged_runs, run_experiment
    from semisparse_lab.report.cards import write_cards

    paths = run_experiment(experiment, experiment.chosen(row or ()), range(seeds), out, progress_for, keep=kept.append)
    for card in write_cards(out, out):
        typer.echo(card)
    end_if_diverged(diverged_runs(paths))
