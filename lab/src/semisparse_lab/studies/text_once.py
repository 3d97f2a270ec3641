"""A GPT over the bytes of Python packages that sees no byte twice; the studies of it differ in their rows alone.

Its training loss is a loss on text that is new to it: all of the run counts, instead of its end alone. For each seed
the rows share initial weights, batches and their order.

The text is found through the interpreter. Results on different packages do not compare, and mixing them in one folder
is refused.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from torch import nn

from semisparse_lab.commands import command
from semisparse_lab.data.text import Corpus, packages
from semisparse_lab.experiment import Backend, Experiment, OnProgress, Outcome, Row, train_row, train_settings
from semisparse_lab.models.gpt import GPTConfig, build_gpt
from semisparse_lab.studies import gpt_stdlib
from semisparse_lab.tasks.next_byte import NextByteOnce, bits_per_byte
from semisparse_lab.train.capture import compiled_blocks
from semisparse_lab.train.config import TrainConfig
from semisparse_lab.train.results import EpochRecord

PARTS, SMALL_PARTS = 24, 6
"""Points of the curves; multiples of 6, because FST is dense for the last sixth of a run."""
TRAINING_BYTES = PARTS * 76 * 128 * (gpt_stdlib.MODEL.context + 1)
"""24 parts of 76 steps, of 128 windows each: 60 million bytes."""
HELD_OUT_BYTES = 1 << 20
"""Of the validation set, which is read after each part."""

Peers = Mapping[str, Callable[[nn.Module], AbstractContextManager[None]]]
"""By slug of a row: the context in which the swapped layers of a model compute as another library's."""


def settings(device: str, small: bool) -> tuple[GPTConfig, TrainConfig]:
    """Model and training settings: those of gpt-stdlib for one pass, whose parts take the place of epochs."""
    return gpt_stdlib.settings(device, small, SMALL_PARTS if small else PARTS)


def once(
    name: str,
    title: str,
    rows: Callable[[Backend], tuple[Row, ...]],
    data_dir: Path | None,
    device: str,
    *,
    small: bool,
    training_bytes: int | None,
    peers: Peers | None = None,
) -> Experiment:
    """An experiment on the Python source in data_dir.

    Args:
        name: As Experiment's.
        title: As Experiment's.
        rows: The configurations for a backend.
        data_dir: Any folder with .py files, None for the one that torch is installed in.
        device: As in TrainConfig; on a GPU runs are compiled, replayed from CUDA graphs, and must use its sparse cores.
        small: A tiny model and little text, to see it work.
        training_bytes: Bytes that a run trains on instead of the usual number; fewer where there is less text.
        peers: Of the rows that another library computes.

    Raises:
        DataError: The text is missing.
        ConfigError: A setting does not fit.
    """
    model_config, config = settings(device, small)
    on_gpu = config.device.startswith("cuda")
    usual = gpt_stdlib.SMALL_TEXT if small else TRAINING_BYTES
    most = usual if training_bytes is None else training_bytes
    corpus = packages(data_dir, config.device, most=most)
    corpus = replace(corpus, validation=corpus.validation[:HELD_OUT_BYTES])
    corpus = corpus.shortened(most) if small else corpus

    return Experiment(
        name=name,
        title=title,
        metric="training bits per byte, mean of the run",
        higher_is_better=False,
        rows=rows("cusparselt" if on_gpu else "auto"),
        settings={
            "model": asdict(model_config),
            "train": train_settings(config),
            "text": {
                "files": corpus.files,
                "training_bytes": len(corpus.train),
                "sha256": corpus.sha256,
                "passes": 1,
                "parts": config.epochs,
            },
        },
        command=command(name),
        train=partial(_train, model_config, config, corpus, peers or {}),
    )


def _train(
    model_config: GPTConfig,
    config: TrainConfig,
    corpus: Corpus,
    peers: Peers,
    row: Row,
    seed: int,
    on_progress: OnProgress,
) -> Outcome:
    """Train one row with one seed; on a GPU compiled and replayed from CUDA graphs."""
    model = build_gpt(model_config, seed, config.device)
    task = NextByteOnce(corpus, model_config.context, config.epochs)
    graph = config.device.startswith("cuda")
    result = train_row(
        row,
        model,
        task,
        replace(config, seed=seed),
        on_progress=on_progress,
        wrap=compiled_blocks if graph else None,
        graph=graph,
        peer=peers.get(row.slug),
    ).result
    sparse = round(len(result.epochs) * (row.recipe.sparse_fraction or 1))
    more = {
        "training_bits_in_the_sparse_phase": _mean_bits(result.epochs[:sparse]),
        "training_bits_in_the_last_quarter": _mean_bits(result.epochs[-(len(result.epochs) // 4) :]),
        "held_out_bits": bits_per_byte(result.test.loss),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    return Outcome(_mean_bits(result.epochs), result, more)


def _mean_bits(parts: Sequence[EpochRecord]) -> float:
    """Mean training loss over parts of equal length, in bits per byte."""
    return bits_per_byte(statistics.fmean(part.train_loss for part in parts))
