"""Recipes for sparse training compared: a GPT over the bytes of Python's own standard library.

    python examples/gpt_stdlib.py                       # all rows, seeds 0 and 1; half a minute of GPU a run
    python examples/gpt_stdlib.py --row dense --row fst --seeds 3
    python examples/gpt_stdlib.py --small --device cpu  # a tiny model for a few steps, to see it work

Rows: dense; exact masks for 70 % of the steps, then dense; exact masks for all; and the recipes sr_ste, fst, s_ste and
step with the settings of their papers (see semisparse.recipes). The score is bits per byte of source files that no run
trains on or is tuned on, read once at the end. One JSON a run goes to --out, runs that are there are skipped, and a
card (table and plot) is made of all of them.

The text is found through the interpreter; another Python has another standard library, so results of different
versions do not compare, and mixing them in one folder is refused.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from semisparse import recipes
from semisparse.cli.common import Device, DeviceOption, end_if_diverged, typed_errors
from semisparse.cli.tables import progress_bar
from semisparse.config import Engine
from semisparse.demo import cards
from semisparse.demo.capture import compiled_blocks
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
from semisparse.demo.gpt import GPTConfig, build_gpt
from semisparse.demo.text import NextByte, bits_per_byte, standard_library
from semisparse.demo.train_config import TrainConfig, resolve_device

MODEL = GPTConfig(context=256, width=384, depth=6, heads=6)
SMALL = GPTConfig(context=64, width=32, depth=1, heads=2)


def rows(engine: Engine) -> tuple[Row, ...]:
    return (
        Row("dense", "dense", recipes.dinov2(sparse_fraction=0.0, engine=engine)),
        Row("dinov2-070", "dinov2: exact masks for 70%, then dense", recipes.dinov2(engine=engine)),
        Row("dinov2-100", "exact masks for 100%", recipes.dinov2(sparse_fraction=1.0, engine=engine)),
        Row("sr_ste", "sr_ste: decay of pruned weights, 100%", recipes.sr_ste(engine=engine)),
        Row("fst", "fst: masks held 40 steps, decay, last sixth dense", recipes.fst(engine=engine)),
        Row("s_ste", "s_ste: soft threshold, 100%", recipes.s_ste(engine=engine)),
        Row("step", "step: dense until the variance settles, then row-wise", recipes.step(engine=engine)),
    )


def settings(device: str, small: bool, epochs: int | None) -> tuple[GPTConfig, TrainConfig]:
    on_gpu = resolve_device(device).type == "cuda"
    train = TrainConfig(
        epochs=(1 if small else 8) if epochs is None else epochs,
        batch_size=64 if small else 128,
        lr=2e-3,
        warmup_fraction=0.05,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        clip=1.0,
        device=str(resolve_device(device)),
        precision="bf16" if on_gpu else "fp32",
    )
    return SMALL if small else MODEL, train


def main(
    context: typer.Context,
    data_dir: Annotated[Path | None, typer.Option(help="A standard library (default: this interpreter's).")] = None,
    out: Annotated[Path, typer.Option(help="Folder for results and card.")] = Path("results-gpt"),
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Seeds 0, 1, ... of each row.")] = 2,
    row: Annotated[list[str] | None, typer.Option(help="Rows to run, by slug (default: all).")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of each run.")] = None,
    small: Annotated[bool, typer.Option("--small", help="A tiny model for one epoch.")] = False,
    device: DeviceOption = Device.AUTO,
) -> None:
    kept: list[Path] = []
    with typed_errors(context, kept):
        model_config, config = settings(device.value, small, epochs)
        on_gpu = config.device.startswith("cuda")
        corpus = standard_library(data_dir, config.device)
        corpus = corpus.shortened(200_000) if small else corpus
        task = NextByte(corpus, model_config.context)
        text = {"files": corpus.files, "training_bytes": len(corpus.train), "sha256": corpus.sha256}
        experiment = Experiment(
            name="gpt-stdlib",
            title="GPT over bytes of Python's standard library: recipes for sparse training",
            metric="held-out bits per byte",
            higher_is_better=False,
            rows=rows("cusparselt" if on_gpu else "auto"),
            settings={"model": asdict(model_config), "train": train_settings(config), "text": text},
            command="python examples/gpt_stdlib.py",
        )

        def train(row: Row, seed: int, on_progress: OnProgress) -> Outcome:
            model = build_gpt(model_config, seed, config.device)
            result = train_row(
                row, model, task, replace(config, seed=seed),
                on_progress=on_progress, wrap=compiled_blocks if on_gpu else None, graph=on_gpu,
            )  # fmt: skip
            more = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
            return Outcome(bits_per_byte(result.test.loss), result, more)

        rows_to_run = experiment.chosen(row or ())
        paths = run_experiment(experiment, rows_to_run, range(seeds), out, train, progress_bar, keep=kept.append)
        for card in cards.write_cards(out, out):
            typer.echo(card)
        end_if_diverged(diverged_runs(paths))


if __name__ == "__main__":
    typer.run(main)
