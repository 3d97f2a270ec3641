"""Compiling side by side what a benchmark is about to time, so that the time on a GPU is not spent waiting for it.

Every model of --compare and --plan is compiled once by a process of its own, into torch's caches on disk; the run that
measures loads what it finds there. These processes share the GPU, so they tune nothing.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

import semisparse
from benchmarks import compare, planned
from benchmarks.compare import ROWS, model_of
from benchmarks.models import CARDS, sparsified
from benchmarks.planned_models import PLANNED
from benchmarks.store import ROOT
from semisparse.planning.candidates import default_candidates

PARTS, DENSE = "parts", "dense"
WORKERS = 4
"""Processes at a time: a training step takes up to 20 GiB, and so do inductor's own workers of host time."""


class Task(NamedTuple):
    """One model to compile.

    Attributes:
        kind: "compare" or "plan".
        card: Of CARDS or PLANNED.
        variant: A row, a candidate, DENSE, or PARTS of a plan.
    """

    kind: str
    card: str
    variant: str


def tasks(kind: str, cards: Sequence[str], rows: Sequence[str]) -> list[Task]:
    """What a run will compile, as far as that is known before it.

    Args:
        kind: "compare" or "plan".
        cards: Names; models that are not compiled give nothing.
        rows: Of "compare".
    """
    if kind == "compare":
        return [Task(kind, card, row) for card in cards for row in (DENSE, *rows)]
    compiled = [card for card in cards if PLANNED[card].compiled]
    return [Task(kind, card, variant) for card in compiled for variant in (DENSE, PARTS, *planned.EVERY)]


def prepare(work: Sequence[Task], toy: bool) -> float:
    """Compile all of it, WORKERS processes at a time; what fails is said, and compiled again when it is timed.

    Args:
        work: The tasks.
        toy: At toy size.

    Returns:
        Seconds that it took.
    """
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(WORKERS) as pool:
        environment = os.environ | {"XDG_CACHE_HOME": folder, "SEMISPARSE_TUNE": "0"}
        for cache, place in (("TORCHINDUCTOR_CACHE_DIR", "torchinductor"), ("TRITON_CACHE_DIR", "triton")):
            environment.setdefault(cache, os.environ.setdefault(cache, os.path.join(tempfile.gettempdir(), place)))

        def run(task: Task) -> None:
            command = [sys.executable, "-m", "benchmarks.prepare", *task, *(["--toy"] if toy else [])]
            done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                print(f"not prepared: {' '.join(task)}: {done.stderr.strip().splitlines()[-1:]}", flush=True)

        list(pool.map(run, work))
    return time.perf_counter() - begin


def compile_one(task: Task, toy: bool) -> None:
    """Compile one model by running its step twice.

    Args:
        task: Of which kind.
        toy: At toy size.
    """
    compare.forget_compiled()
    if task.variant == PARTS:
        planned.compile_parts(task.card, toy)
        return
    card = (CARDS if task.kind == "compare" else PLANNED)[task.card]
    if task.variant == DENSE:
        model = card.build(toy)
    elif task.kind == "compare":
        model = model_of(ROWS[task.variant], card, sparsified(card, toy)[1].swapped, toy)
    else:
        model = card.build(toy)
        semisparse.sparsify(model, default_candidates()[task.variant], select=card.select, exclude=card.exclude)
    step = card.step(card.compile(model), model, toy)
    if planned.samples(model):
        step = compare.advancing(step, model)
    for _ in range(2):
        step()


if __name__ == "__main__":
    compile_one(Task(*sys.argv[1:4]), "--toy" in sys.argv)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
