"""Self-supervised training with 2:4 sparse MLPs: a small DINO on Fashion-MNIST, scored by k-NN on its features.

Rows: dense; the MLPs of the student's blocks sparse for 70 % of the steps and dense for the rest, as torchao's authors
trained DINOv2; sparse for all steps. The teacher, the moving average of the student's dense weights, is always dense.
The score is the accuracy of a k-NN (k = 20, cosine similarity, neighbours weighted by exp(similarity / 0.07)) on the
student's tokens of an image in a row, among all training images, on the test set, which is read once at the end; a run
that ends sparse is scored sparse (with the pruned weights in plain layers). Beside it, in each result: the same k-NN on
raw pixels, on the mean of the tokens and on the untrained network's tokens, and a linear probe on the mean.
"""

from dataclasses import asdict, replace
from pathlib import Path

from semisparse import SparseConfig, recipes
from semisparse_lab.commands import command
from semisparse_lab.data.images import load_dataset
from semisparse_lab.experiment import Backend, Experiment, OnProgress, Outcome, Row, train_row, train_settings
from semisparse_lab.models.dino import DinoConfig, build_student
from semisparse_lab.models.vit import ViTConfig
from semisparse_lab.tasks.dino import DinoTask
from semisparse_lab.train.capture import compiled_blocks
from semisparse_lab.train.config import TrainConfig, resolve_device

MODEL = ViTConfig(image_size=28, patch_size=4, width=384, depth=2, heads=6)
DINO = DinoConfig()
SMALL = ViTConfig(image_size=28, patch_size=7, width=32, depth=1, heads=2)
SMALL_DINO = DinoConfig(
    epochs=1, batch_size=32, out_dim=64, hidden=64, bottleneck=32, local_views=2, local_size=14, teacher_momentum=0.9
)
SMALL_IMAGES = 640


def rows(backend: Backend) -> tuple[Row, ...]:
    """The configurations that are compared, dense first."""
    dense = recipes.Recipe(name="dense", sparse_fraction=0.0, config=SparseConfig(backend=backend))
    return (
        Row("dense", "dense", dense),
        Row("sparse-070", "70% sparse, then dense", recipes.dinov2(sparse_fraction=0.7, backend=backend)),
        Row("sparse-100", "100% sparse", recipes.dinov2(sparse_fraction=1.0, backend=backend)),
    )


def settings(device: str, small: bool, epochs: int | None) -> tuple[ViTConfig, DinoConfig, TrainConfig]:
    """Settings of the model, of the method and of the training (see experiment)."""
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


def experiment(data_dir: Path, device: str = "auto", *, small: bool = False, epochs: int | None = None) -> Experiment:
    """The experiment on the Fashion-MNIST in data_dir.

    Args:
        data_dir: Folder with the four idx files.
        device: As in TrainConfig; on a GPU runs are compiled, replayed from CUDA graphs, and must use its sparse cores.
        small: A tiny model and few images for one epoch, to see it work.
        epochs: Epochs of each run instead of the usual number.

    Raises:
        DataError: The data is missing or damaged.
        ConfigError: A setting does not fit.
    """
    model_config, dino, config = settings(device, small, epochs)
    on_gpu = config.device.startswith("cuda")
    wrap = compiled_blocks if on_gpu else None
    data = load_dataset("fashion-mnist", data_dir, config.device)
    data = replace(data, train=data.train.sample(SMALL_IMAGES)) if small else data

    def train(row: Row, seed: int, on_progress: OnProgress) -> Outcome:
        student = build_student(model_config, dino, seed, config.device)
        task = DinoTask(data, student, dino, wrap)
        seeded = replace(config, seed=seed)
        result = train_row(row, student, task, seeded, on_progress=on_progress, wrap=wrap, graph=on_gpu).result
        untrained = build_student(model_config, dino, seed, config.device)
        return Outcome(100 * result.test.accuracy, result, task.frozen_scores(config.precision, untrained))

    return Experiment(
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
        command=command("dino-fashion-mnist"),
        train=train,
    )
