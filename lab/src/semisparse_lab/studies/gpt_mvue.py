"""What does a sampled weight gradient cost in loss? FST with grad_output="mvue" beside FST with a dense dW.

The aim is a mean training loss at most 0.5 % above that with the dense weight gradient. text_once.py has the task.
"""

from pathlib import Path

from semisparse import recipes
from semisparse_lab.experiment import Backend, Experiment, Row
from semisparse_lab.studies.text_once import once


def rows(backend: Backend) -> tuple[Row, ...]:
    """The configurations that are compared; the first two differ in nothing but the weight gradient."""
    return (
        Row("fst", "fst, dense weight gradient", recipes.fst(grad_output=None, backend=backend)),
        Row("fst-mvue", "fst, weight gradient of a 2:4 sample", recipes.fst(grad_output="mvue", backend=backend)),
        Row("dense", "dense", recipes.dinov2(sparse_fraction=0.0, backend=backend)),
    )


def experiment(
    data_dir: Path | None = None, device: str = "auto", *, small: bool = False, training_bytes: int | None = None
) -> Experiment:
    """The experiment on the Python source in data_dir; arguments and errors are those of text_once.once."""
    title = "GPT that sees each byte of Python packages once: sampled and dense weight gradients"
    return once("gpt-mvue", title, rows, data_dir, device, small=small, training_bytes=training_bytes)
