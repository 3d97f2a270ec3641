"""`semisparse-lab train`: the three runs, dense, sparse then dense and fully sparse."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from semisparse.cli.common import typed_errors
from semisparse_lab.cli.common import (
    Data,
    DataDirOption,
    DataOption,
    Device,
    DeviceOption,
    Precision,
    end_if_diverged,
)

DEFAULT_OUT = "semisparse-train"


def train(
    context: typer.Context,
    data: DataOption = Data.DIGITS,
    data_dir: DataDirOption = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of each run (default: depends on the data).")] = None,
    sparse_fraction: Annotated[
        float, typer.Option(help="Sparse share of the steps of the sparse-then-dense run.")
    ] = 0.7,
    layers: Annotated[str, typer.Option(help="Linear layers to make sparse: part of their names, or a glob.")] = "mlp",
    seed: Annotated[int, typer.Option(help="Of initial weights, data order and augmentation.")] = 0,
    device: DeviceOption = Device.AUTO,
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path(DEFAULT_OUT),
    force: Annotated[bool, typer.Option("--force", help="Overwrite results in the output folder.")] = False,
    batch_size: Annotated[int | None, typer.Option(help="Images per step (default: depends on the data).")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate (default: depends on the data).")] = None,
    precision: Annotated[Precision, typer.Option(help="fp32, or autocast over fp32 weights.")] = Precision.FP32,
) -> None:
    """Train a small ViT dense, sparse then dense, and fully sparse, and compare accuracy, speed and memory."""
    kept: list[Path] = []
    with typed_errors(context, kept):
        from dataclasses import replace

        from semisparse.cli.common import console
        from semisparse_lab.cli.tables import progress_for
        from semisparse_lab.data.images import load_dataset
        from semisparse_lab.output import prepare_output
        from semisparse_lab.pipeline import run_rows
        from semisparse_lab.studies import three_runs
        from semisparse_lab.train.config import resolve_device

        settings = three_runs.preset(data.value)
        config = replace(
            settings.train,
            epochs=settings.train.epochs if epochs is None else epochs,
            batch_size=settings.train.batch_size if batch_size is None else batch_size,
            lr=settings.train.lr if lr is None else lr,
            layers=layers,
            seed=seed,
            device=str(resolve_device(device.value)),
            precision=precision.value,
        )
        settings = replace(settings, train=config)
        # Everything that can be refused is refused before the output folder is touched and before any training.
        three_runs.rows(sparse_fraction)
        report = three_runs.swap_report(settings.model, layers)
        images = load_dataset(data.value, data_dir, config.device)
        experiment = three_runs.experiment(images, settings, sparse_fraction, out=out, keep=kept.append)
        prepare_output(out, three_runs.FILES, force=force)
        console().print(str(report), soft_wrap=True)
        console().print(f"training {len(experiment.rows)} runs of {config.epochs} epochs on {config.device}")
        documents = run_rows(experiment, seed, out, progress_for, keep=kept.append)
        _print_results(documents, config.device, out)
        end_if_diverged([document["row_title"] for document in documents if document["value"] is None])


def _print_results(documents: Sequence[dict[str, Any]], device: str, out: Path) -> None:
    from semisparse.cli.common import console
    from semisparse.environment import capabilities
    from semisparse_lab.cli.tables import results_table

    screen = console()
    sparse_gemm = next(found for found in capabilities(device) if found.name == "sparse GEMM")
    screen.print(results_table(documents))
    screen.print("seconds per step: median after warm-up, without data preparation")
    screen.print(f"peak memory: {documents[0]['run']['peak_memory']['kind']}")
    screen.print(f"sparse layers computed by: {sparse_gemm.path} ({sparse_gemm.reason})")
    screen.print(f"results, curves and checkpoints: {out}", soft_wrap=True)
