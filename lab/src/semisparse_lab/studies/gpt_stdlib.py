"""Recipes for sparse training compared: a GPT over the bytes of Python's own standard library.

Rows: dense; exact masks for 70 % of the steps, then dense; exact masks for all; and the recipes sr_ste, fst, s_ste and
step with the settings of their papers (see semisparse.recipes), but dense weight gradients. The score is bits per byte
of source files that no run trains on or is tuned on, read once at the end.

The text is found through the interpreter. Another Python has another standard library, so results of different
versions do not compare, and mixing them in one folder is refused.
"""

from dataclasses import asdict, replace
from pathlib import Path

from semisparse import recipes
from semisparse_lab.commands import command
from semisparse_lab.data.text import standard_library
from semisparse_lab.experiment import Backend, Experiment, OnProgress, Outcome, Row, train_row, train_settings
from semisparse_lab.models.gpt import GPTConfig, build_gpt
from semisparse_lab.tasks.next_byte import NextByte, bits_per_byte
from semisparse_lab.train.capture import compiled_blocks
from semisparse_lab.train.config import TrainConfig, resolve_device

MODEL = GPTConfig(context=256, width=384, depth=6, heads=6)
SMALL = GPTConfig(context=64, width=32, depth=1, heads=2)
SMALL_TEXT = 200_000


def rows(backend: Backend) -> tuple[Row, ...]:
    """The configurations that are compared, dense first."""
    return (
        Row("dense", "dense", recipes.dinov2(sparse_fraction=0.0, backend=backend)),
        Row("dinov2-070", "dinov2: exact masks for 70%, then dense", recipes.dinov2(backend=backend)),
        Row("dinov2-100", "exact masks for 100%", recipes.dinov2(sparse_fraction=1.0, backend=backend)),
        Row("sr_ste", "sr_ste: decay of pruned weights, 100%", recipes.sr_ste(backend=backend)),
        Row("fst", "fst: masks held 40 steps, decay, last sixth dense", recipes.fst(grad_output=None, backend=backend)),
        Row("s_ste", "s_ste: soft threshold, 100%", recipes.s_ste(grad_output=None, backend=backend)),
        Row("step", "step: dense until the variance settles, then row-wise", recipes.step(backend=backend)),
    )


def settings(device: str, small: bool, epochs: int | None) -> tuple[GPTConfig, TrainConfig]:
    """Model and training settings (see experiment)."""
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


def experiment(
    data_dir: Path | None = None, device: str = "auto", *, small: bool = False, epochs: int | None = None
) -> Experiment:
    """The experiment on the standard library in data_dir.

    Args:
        data_dir: A standard library, None for this interpreter's.
        device: As in TrainConfig; on a GPU runs are compiled, replayed from CUDA graphs, and must use its sparse cores.
        small: A tiny model and little text for one epoch, to see it work.
        epochs: Epochs of each run instead of the usual number.

    Raises:
        DataError: The text is missing.
        ConfigError: A setting does not fit.
    """
    model_config, config = settings(device, small, epochs)
    on_gpu = config.device.startswith("cuda")
    corpus = standard_library(data_dir, config.device)
    corpus = corpus.shortened(SMALL_TEXT) if small else corpus
    task = NextByte(corpus, model_config.context)

    def train(row: Row, seed: int, on_progress: OnProgress) -> Outcome:
        model = build_gpt(model_config, seed, config.device)
        wrap = compiled_blocks if on_gpu else None
        seeded = replace(config, seed=seed)
        result = train_row(row, model, task, seeded, on_progress=on_progress, wrap=wrap, graph=on_gpu).result
        more = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
        return Outcome(bits_per_byte(result.test.loss), result, more)

    return Experiment(
        name="gpt-stdlib",
        title="GPT over bytes of Python's standard library: recipes for sparse training",
        metric="held-out bits per byte",
        higher_is_better=False,
        rows=rows("cusparselt" if on_gpu else "auto"),
        settings={
            "model": asdict(model_config),
            "train": train_settings(config),
            "text": {"files": corpus.files, "training_bytes": len(corpus.train), "sha256": corpus.sha256},
        },
        command=command("gpt-stdlib"),
        train=train,
    )
