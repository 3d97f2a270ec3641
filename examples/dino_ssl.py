"""Self-supervised training with 2:4 sparse MLPs: a small DINO on Fashion-MNIST, scored by k-NN on its features.

    python examples/dino_ssl.py                       # all rows, seeds 0 to 2; half a minute of GPU a run
    python examples/dino_ssl.py --row dense --row sparse-070 --seeds 5
    python examples/dino_ssl.py --small --device cpu  # a tiny model for a few steps, to see it work

Rows: dense; the MLPs of the student's blocks sparse for 70 % of the steps and dense for the rest, as torchao's authors
trained DINOv2; sparse for all steps. The teacher, the moving average of the student's dense weights, is always dense.
The score is the accuracy of a k-NN (k = 20, cosine similarity, neighbours weighted by exp(similarity / 0.07)) on the
student's tokens of an image in a row, among all training images, on the test set, which is read once at the end; a run
that ends sparse is scored sparse (with the pruned weights in plain layers). Beside it, in each result: the same k-NN on
raw pixels, on the mean of the tokens and on the untrained network's tokens, and a linear probe on the mean. One JSON a
run goes to --out, runs that are there are skipped, and a card (table and plot) is made of all of them.

Data: Debian's package dataset-fashion-mnist, or the four idx files in --data-dir.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from semisparse import SparseConfig, recipes
from semisparse.cli.common import Device, DeviceOption, end_if_diverged, typed_errors
from semisparse.cli.tables import progress_bar
from semisparse.config import Engine
from semisparse.demo import cards
from semisparse.demo.capture import compiled_blocks
from semisparse.demo.data import DEBIAN_FASHION_MNIST, load_dataset
from semisparse.demo.dino import DinoTask
from semisparse.demo.dino_model import DinoConfig, build_student
from semisparse.demo.experiment import (
    Experiment,
    OnProgress,
    Outcome,
    Row,
    diverged_runs,
    run_experiment,
    train_row,
    train_settings,
)
from semisparse.demo.model import ViTConfig
from semisparse.demo.train_config import TrainConfig, resolve_device

MODEL = ViTConfig(image_size=28, patch_size=4, width=384, depth=2, heads=6)
DINO = DinoConfig()
SMALL = ViTConfig(image_size=28, patch_size=7, width=32, depth=1, heads=2)
SMALL_DINO = DinoConfig(
    epochs=1, batch_size=32, out_dim=64, hidden=64, bottleneck=32, local_views=2, local_size=14, teacher_momentum=0.9
)
SMALL_IMAGES = 640


def rows(engine: Engine) -> tuple[Row, ...]:
    dense = recipes.Recipe(name="dense", sparse_fraction=0.0, config=SparseConfig(engine=engine))
    return (
        Row("dense", "dense", dense),
        Row("sparse-070", "70% sparse, then dense", recipes.dinov2(sparse_fraction=0.7, engine=engine)),
        Row("sparse-100", "100% sparse", recipes.dinov2(sparse_fraction=1.0, engine=engine)),
    )


def settings(device: str, small: bool, epochs: int | None) -> tuple[ViTConfig, DinoConfig, TrainConfig]:
    dino = SMALL_DINO if small else DINO
    dino = dino if epochs is None else replace(dino, epochs=epochs)
    on_gpu = resolve_device(device).type == "cuda"
    train = TrainConfig(
        epochs=dino.epochs,
        batch_size=dino.batch_size,
        lr=dino.lr,
        weight_decay=dino.weight_decay,
        clip=dino.clip,
        device=str(resolve_device(device)),
        precision="bf16" if on_gpu else "fp32",
    )
    return SMALL if small else MODEL, dino, train


def main(
    context: typer.Context,
    data_dir: Annotated[Path, typer.Option(help="Folder with the four idx files.")] = DEBIAN_FASHION_MNIST,
    out: Annotated[Path, typer.Option(help="Folder for results and card.")] = Path("results-dino"),
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Seeds 0, 1, ... of each row.")] = 3,
    row: Annotated[list[str] | None, typer.Option(help="Rows to run, by slug (default: all).")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of each run.")] = None,
    small: Annotated[bool, typer.Option("--small", help="A tiny model, few images, one epoch.")] = False,
    device: DeviceOption = Device.AUTO,
) -> None:
    kept: list[Path] = []
    with typed_errors(context, kept):
        model_config, dino, config = settings(device.value, small, epochs)
        on_gpu = config.device.startswith("cuda")
        wrap = compiled_blocks if on_gpu else None
        data = load_dataset("fashion-mnist", data_dir, config.device)
        data = replace(data, train=data.train.sample(SMALL_IMAGES)) if small else data
        experiment = Experiment(
            name="dino-fashion-mnist",
            title="DINO on Fashion-MNIST: self-supervised training with sparse MLPs",
            metric="k-NN test accuracy of the tokens, percent",
            higher_is_better=True,
            rows=rows("cusparselt" if on_gpu else "auto"),
            settings={
                "model": asdict(model_config),
                "dino": asdict(dino),
                "train": train_settings(config),
                "data": {"training_images": len(data.train), "sha256": data.sha256},
            },
            command="python examples/dino_ssl.py",
        )

        def train(row: Row, seed: int, on_progress: OnProgress) -> Outcome:
            student = build_student(model_config, dino, seed, config.device)
            task = DinoTask(data, student, dino, wrap)
            result = train_row(
                row, student, task, replace(config, seed=seed), on_progress=on_progress, wrap=wrap, graph=on_gpu
            )
            untrained = build_student(model_config, dino, seed, config.device)
            more = task.frozen_scores(config.precision, untrained)
            return Outcome(100 * result.test.accuracy, result, more)

        rows_to_run = experiment.chosen(row or ())
        paths = run_experiment(experiment, rows_to_run, range(seeds), out, train, progress_bar, keep=kept.append)
        for card in cards.write_cards(out, out):
            typer.echo(card)
        end_if_diverged(diverged_runs(paths))


if __name__ == "__main__":
    typer.run(main)
