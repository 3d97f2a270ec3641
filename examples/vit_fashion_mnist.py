"""How much of a ViT's training can be 2:4 sparse before accuracy falls? Fashion-MNIST, dense to 100 % sparse.

    python examples/vit_fashion_mnist.py                       # all rows, seeds 0 to 2; half a minute of GPU a run
    python examples/vit_fashion_mnist.py --row dense --row sparse-070 --seeds 5
    python examples/vit_fashion_mnist.py --narrow              # width 32, small enough for a CPU: minutes a run there
    python examples/vit_fashion_mnist.py --held                # the learning rate falls in the last 30 % of a run only
    python examples/vit_fashion_mnist.py --long                # twice the epochs
    python examples/vit_fashion_mnist.py --small --device cpu  # a tiny model for a few steps, to see it work

Rows: the seven of the table that torchao.sparsity.training published for DINOv2 (dense, then 40 to 100 % of the steps
sparse and dense for the rest), a study of masks (100 % sparse with greedy masks, by magnitude and by signed value), and
the recipes fst, sr_ste and s_ste. Settings were chosen for the dense row, on the 5,000 validation images; each run
reads the test set once, at its end. One JSON a run goes to --out, runs that are there are skipped, and a card (table
and plot) is made of all of them.

Data: Debian's package dataset-fashion-mnist, or the four idx files in --data-dir.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from semisparse import SparseConfig, recipes
from semisparse.cli.common import Device, DeviceOption, end_if_diverged, typed_errors
from semisparse.cli.tables import progress_bar
from semisparse.config import Engine, Mask
from semisparse.demo import cards
from semisparse.demo.capture import compiled_blocks
from semisparse.demo.data import DEBIAN_FASHION_MNIST, load_dataset
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
from semisparse.demo.model import ViTConfig, build_model
from semisparse.demo.task import Augmentation, ImageClassification
from semisparse.demo.train_config import TrainConfig, resolve_device

FRACTIONS = (0.4, 0.6, 0.7, 0.8, 0.9)
MODEL = ViTConfig(image_size=28, patch_size=4, width=384, depth=2, heads=6)
NARROW = ViTConfig(image_size=28, patch_size=7, width=32, depth=2, heads=2)
SMALL = ViTConfig(image_size=28, patch_size=7, width=32, depth=1, heads=2)
AUGMENTATION = Augmentation(shift=1.5 / 28, rotation=0.0, scale=0.0, flip=True, whole_pixels=True)


def rows(engine: Engine) -> tuple[Row, ...]:
    def masked(slug: str, title: str, mask: Mask) -> Row:
        return Row(slug, title, recipes.Recipe(name=slug, config=SparseConfig(mask=mask, engine=engine)))

    return (
        Row("dense", "dense", recipes.dinov2(sparse_fraction=0.0, engine=engine)),
        *(
            Row(f"sparse-{100 * part:03.0f}", f"{part:.0%} sparse, then dense", recipes.dinov2(sparse_fraction=part,
                                                                                              engine=engine))
            for part in FRACTIONS
        ),
        Row("sparse-100", "100% sparse, exact masks", recipes.dinov2(sparse_fraction=1.0, engine=engine)),
        masked("greedy", "100% sparse, greedy masks by magnitude", "greedy"),
        masked("signed-greedy", "100% sparse, greedy masks by signed value (torchao's default)", "signed_greedy"),
        Row("fst", "fst: masks held 40 steps, decay, last sixth dense", recipes.fst(engine=engine)),
        Row("sr_ste", "sr_ste: decay of pruned weights, 100% sparse", recipes.sr_ste(engine=engine)),
        Row("s_ste", "s_ste: soft threshold, 100% sparse", recipes.s_ste(engine=engine)),
    )  # fmt: skip


def settings(
    device: str, small: bool, epochs: int | None, narrow: bool = False, held: bool = False, long: bool = False
) -> tuple[ViTConfig, TrainConfig]:
    on_gpu = resolve_device(device).type == "cuda"
    usual = 1 if small else (20 if narrow else 40) * (2 if long else 1)
    train = TrainConfig(
        epochs=usual if epochs is None else epochs,
        batch_size=64 if small else 256,
        lr=1.2e-2 if narrow else 3e-4 if held or long else 5e-4,
        hold_fraction=0.6 if held else 0.0,  # with the warm-up: as far as the row of 70 % is sparse
        weight_decay=0.05,
        clip=1.0,
        device=str(resolve_device(device)),
        precision="bf16" if on_gpu else "fp32",
    )
    return SMALL if small else NARROW if narrow else MODEL, train


def main(
    context: typer.Context,
    data_dir: Annotated[Path, typer.Option(help="Folder with the four idx files.")] = DEBIAN_FASHION_MNIST,
    out: Annotated[Path, typer.Option(help="Folder for results and card.")] = Path("results-vit"),
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Seeds 0, 1, ... of each row.")] = 3,
    row: Annotated[list[str] | None, typer.Option(help="Rows to run, by slug (default: all).")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of each run.")] = None,
    narrow: Annotated[bool, typer.Option("--narrow", help="A model of width 32 with few weights to spare.")] = False,
    held: Annotated[bool, typer.Option("--held", help="Hold the learning rate for 70 % of the steps.")] = False,
    long: Annotated[bool, typer.Option("--long", help="Twice the epochs.")] = False,
    small: Annotated[bool, typer.Option("--small", help="A tiny model for one epoch.")] = False,
    device: DeviceOption = Device.AUTO,
) -> None:
    kept: list[Path] = []
    with typed_errors(context, kept):
        model_config, config = settings(device.value, small, epochs, narrow, held, long)
        chosen = [name for name, wanted in (("narrow", narrow), ("held", held), ("long", long)) if wanted]
        on_gpu = config.device.startswith("cuda")
        data = load_dataset("fashion-mnist", data_dir, config.device)
        task = ImageClassification(data, AUGMENTATION)
        experiment = Experiment(
            name="-".join(["vit-fashion-mnist", *chosen]),
            title=f"ViT of width {model_config.width} on Fashion-MNIST: how much of the training can be 2:4 sparse"
            + (", learning rate held for 70 %" if held else "")
            + (", twice the epochs" if long else ""),
            metric="test accuracy, percent",
            higher_is_better=True,
            rows=rows("cusparselt" if on_gpu else "auto"),
            settings={
                "model": asdict(model_config),
                "augmentation": asdict(AUGMENTATION),
                "train": train_settings(config),
                "data": {"sha256": data.sha256},
            },
            command=" ".join(["python examples/vit_fashion_mnist.py", *(f"--{name}" for name in chosen)]),
        )

        def train(row: Row, seed: int, on_progress: OnProgress) -> Outcome:
            seeded = replace(config, seed=seed)
            model = build_model(model_config, seed, config.device)
            result = train_row(
                row, model, task, seeded,
                on_progress=on_progress, wrap=compiled_blocks if on_gpu else None, graph=on_gpu,
            )  # fmt: skip
            return Outcome(100 * result.test.accuracy, result, {})

        rows_to_run = experiment.chosen(row or ())
        paths = run_experiment(experiment, rows_to_run, range(seeds), out, train, progress_bar, keep=kept.append)
        for card in cards.write_cards(out, out):
            typer.echo(card)
        end_if_diverged(diverged_runs(paths))


if __name__ == "__main__":
    typer.run(main)
