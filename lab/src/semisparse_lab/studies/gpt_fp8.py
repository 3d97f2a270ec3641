"""What does fp8 cost in loss? 2:4 for 70 % of a run, then dense, in fp8: semisparse beside torchao float8 and bf16.

torchao's row multiplies with its own casts and products the same masked weights: the masks are chosen as ours are, and
the gradient passes straight through. The aim is a mean training loss at most 0.3 % above it. text_once.py has the task.
"""

from pathlib import Path

from semisparse import recipes
from semisparse_lab.experiment import Backend, Experiment, Row
from semisparse_lab.studies.text_once import once
from semisparse_lab.train.float8 import masked_float8


def rows(backend: Backend) -> tuple[Row, ...]:
    """The configurations that are compared; the first three differ in nothing but how products are computed."""
    return (
        Row("float8", "torchao float8, masked weights", recipes.dinov2(backend="dense")),
        Row("fp8", "fp8", recipes.dinov2(precision="fp8", backend=backend)),
        Row("bf16", "bf16", recipes.dinov2(backend=backend)),
        Row("dense", "bf16, never pruned", recipes.dinov2(sparse_fraction=0.0, backend=backend)),
    )


def experiment(
    data_dir: Path | None = None, device: str = "auto", *, small: bool = False, training_bytes: int | None = None
) -> Experiment:
    """The experiment on the Python source in data_dir; arguments and errors are those of text_once.once."""
    title = "GPT that sees each byte of Python packages once: fp8 with 2:4 and torchao float8, 70 % of the steps pruned"
    peers = {"float8": masked_float8}
    return once("gpt-fp8", title, rows, data_dir, device, small=small, training_bytes=training_bytes, peers=peers)
