"""How much of a ViT's training can be 2:4 sparse before accuracy falls? Fashion-MNIST, dense to 100 % sparse.

Rows: the seven of the table that torchao.sparsity.training published for DINOv2 (dense, then 40 to 100 % of the steps
sparse and dense for the rest), a study of masks (100 % sparse with greedy masks, by magnitude and by signed value), and
the recipes fst, sr_ste and s_ste. Settings were chosen for the dense row, on the 5,000 validation images; each run
reads the test set once, at its end.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

from semisparse import SparseConfig, recipes
from semisparse_lab.commands import command
from semisparse_lab.data.images import load_dataset
from semisparse_lab.experiment import Backend, Experiment, OnProgress, Outcome, Row, train_row, train_settings
from semisparse_lab.models.vit import ViTConfig, build_model
from semisparse_lab.tasks.classification import Augmentation, ImageClassification
from semisparse_lab.train.capture import compiled_blocks
from semisparse_lab.train.config import TrainConfig, resolve_device

FRACTIONS = (0.4, 0.6, 0.7, 0.8, 0.9)
MODEL = ViTConfig(image_size=28, patch_size=4, width=384, depth=2, heads=6)
NARROW = ViTConfig(image_size=28, patch_size=7, width=32, depth=2, heads=2)
SMALL = ViTConfig(image_size=28, patch_size=7, width=32, depth=1, heads=2)
AUGMENTATION = Augmentation(shift=1.5 / 28, rotation=0.0, scale=0.0, flip=True, whole_pixels=True)


def rows(backend: Backend) -> tuple[Row, ...]:
    """The configurations that are compared, dense first."""

    def part_sparse(part: float) -> Row:
        recipe = recipes.dinov2(sparse_fraction=part, backend=backend)
        return Row(f"sparse-{100 * part:03.0f}", f"{part:.0%} sparse, then dense", recipe)

    def masked(slug: str, title: str, mask: Literal["greedy", "signed_greedy"]) -> Row:
        return Row(slug, title, recipes.Recipe(name=slug, config=SparseConfig(weight=mask, backend=backend)))

    return (
        Row("dense", "dense", recipes.dinov2(sparse_fraction=0.0, backend=backend)),
        *map(part_sparse, FRACTIONS),
        Row("sparse-100", "100% sparse, exact masks", recipes.dinov2(sparse_fraction=1.0, backend=backend)),
        masked("greedy", "100% sparse, greedy masks by magnitude", "greedy"),
        masked("signed-greedy", "100% sparse, greedy masks by signed value (torchao's default)", "signed_greedy"),
        Row("fst", "fst: masks held 40 steps, decay, last sixth dense", recipes.fst(grad_output=None, backend=backend)),
        Row("sr_ste", "sr_ste: decay of pruned weights, 100% sparse", recipes.sr_ste(backend=backend)),
        Row("s_ste", "s_ste: soft threshold, 100% sparse", recipes.s_ste(grad_output=None, backend=backend)),
    )


def settings(
    device: str, small: bool, epochs: int | None, narrow: bool = False, held: bool = False, long: bool = False
) -> tuple[ViTConfig, TrainConfig]:
    """Model and training settings of the variants (see experiment)."""
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


def experiment(
    data_dir: Path,
    device: str = "auto",
    *,
    small: bool = False,
    epochs: int | None = None,
    narrow: bool = False,
    held: bool = False,
    long: bool = False,
) -> Experiment:
    """The experiment on the Fashion-MNIST in data_dir.

    Args:
        data_dir: Folder with the four idx files.
        device: As in TrainConfig; on a GPU runs are compiled, replayed from CUDA graphs, and must use its sparse cores.
        small: A tiny model for one epoch, to see it work.
        epochs: Epochs of each run instead of the usual number.
        narrow: A model of width 32 with few weights to spare.
        held: Hold the learning rate for 70 % of the steps, so that it falls in the last 30 % only.
        long: Twice the epochs.

    Raises:
        DataError: The data is missing or damaged.
        ConfigError: A setting does not fit.
    """
    model_config, config = settings(device, small, epochs, narrow, held, long)
    variants = [name for name, wanted in (("narrow", narrow), ("held", held), ("long", long)) if wanted]
    on_gpu = config.device.startswith("cuda")
    data = load_dataset("fashion-mnist", data_dir, config.device)
    task = ImageClassification(data, AUGMENTATION)

    def train(row: Row, seed: int, on_progress: OnProgress) -> Outcome:
        model = build_model(model_config, seed, config.device)
        wrap = compiled_blocks if on_gpu else None
        seeded = replace(config, seed=seed)
        result = train_row(row, model, task, seeded, on_progress=on_progress, wrap=wrap, graph=on_gpu).result
        return Outcome(100 * result.test.accuracy, result, {})

    return Experiment(
        name="-".join(["vit-fashion-mnist", *variants]),
        title=f"ViT of width {model_config.width} on Fashion-MNIST: how much of the training can be 2:4 sparse"
        + (", learning rate held for 70 %" if held else "")
        + (f", {config.epochs} epochs (accuracy only: such a model gains no speed)" if long else ""),
        metric="test accuracy, percent",
        higher_is_better=True,
        rows=rows("cusparselt" if on_gpu else "auto"),
        settings={
            "model": asdict(model_config),
            "augmentation": asdict(AUGMENTATION),
            "train": train_settings(config),
            "data": {"sha256": data.sha256},
        },
        command=command("vit-fashion-mnist", *variants),
        train=train,
    )
