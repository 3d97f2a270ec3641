"""Compiling side by side what a benchmark is about to time, so that the time on a GPU is not spent waiting for it.

Every model of --compare, and the layers that plans time in --plan, are compiled once by processes of their own, into
torch's caches on disk; the run that measures loads what it finds there. These processes share the GPU, so they tune
nothing. Models of --plan that are compiled block by block are left to the run itself, which takes seconds.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from threading import Semaphore
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
SHARES = 4
"""Processes among which the layers of one plan are divided."""
WORKERS, MODELS = 10, 4
"""Processes at a time, and how many of them may run a whole training step, which takes up to 20 GiB."""


class Task(NamedTuple):
    """One model to compile.

    Attributes:
        kind: "compare" or "plan".
        card: Of CARDS or PLANNED.
        variant: A row, a candidate, DENSE, or a share of the layers of a plan, such as "parts 0".
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
    shares = [f"{PARTS} {share}" for share in range(SHARES)]
    whole = {card: () if PLANNED[card].blocks else (DENSE, *planned.EVERY) for card in compiled}
    return [Task(kind, card, variant) for card in compiled for variant in (*shares, *whole[card])]


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
        environment |= {"TORCHINDUCTOR_COMPILE_THREADS": "2"}  # inductor's own processes, by default one per core
        models = Semaphore(MODELS)
        for cache, place in (("TORCHINDUCTOR_CACHE_DIR", "torchinductor"), ("TRITON_CACHE_DIR", "triton")):
            environment.setdefault(cache, os.environ.setdefault(cache, os.path.join(tempfile.gettempdir(), place)))

        def run(task: Task) -> None:
            command = [sys.executable, "-m", "benchmarks.prepare", *task, *(["--toy"] if toy else [])]
            with nullcontext() if task.variant.startswith(PARTS) else models:
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
    if task.variant.startswith(PARTS):
        share = int(task.variant.removeprefix(PARTS))
        planned.compile_parts(task.card, toy, slice(share, None, SHARES))
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
