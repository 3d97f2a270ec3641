"""The trust suite: kernels and layers on a GPU over many shapes, algorithms, streams, threads, graphs and minutes.

    python -m tests.trust OUT                              all parts, about half an hour
    python -m tests.trust OUT --quick                      cut sizes, about a minute
    python -m tests.trust OUT --parts soak --seconds 480   one part, with another budget

OUT/trust.json is written as results come. `python tests/reliability.py OUT/trust.json` adds them to the record.
"""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

if __name__ == "__main__":
    # cuBLAS promises the same bits on several streams only with workspaces of a fixed size; read when CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Without a GPU, Triton interprets its kernels; that is decided where it is imported.
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.trust import algorithms, convergence, determinism, graphs, leaks, numerics, sanitizer, soak
from tests.trust.machine import Machine
from tests.trust.outcome import Part, Record

Work = Callable[[Machine, Part], None]


class Budget(NamedTuple):
    """Of one part.

    Attributes:
        seconds: Of a whole run.
        quick: Of a quick one.
        whole: What a whole run does.
        cut: What a quick one does.
    """

    seconds: float
    quick: float
    whole: Work
    cut: Work


def budgets(folder: Path) -> dict[str, Budget]:
    """All parts by name, in their order.

    Args:
        folder: Where the tools of a part may write.
    """
    tools = partial(sanitizer.run, folder=folder)
    return {
        "numerics": Budget(180, 20, numerics.run, partial(numerics.run, every=10)),
        "algorithms": Budget(120, 12, algorithms.run, partial(algorithms.run, every=10, repeats=5)),
        "determinism": Budget(
            60, 10, determinism.run, partial(determinism.run, runs=20, shapes=determinism.SHAPES[:1])
        ),
        "graphs": Budget(120, 8, graphs.run, partial(graphs.run, replays=20, modes=())),
        "leaks": Budget(120, 10, leaks.run, partial(leaks.run, steps=256, shapes=16, layers=64)),
        "convergence": Budget(120, 8, convergence.run, partial(convergence.run, steps=50, seeds=1)),
        "sanitizer": Budget(560, 5, tools, lambda machine, part: sanitizer.guard(machine, part)),
        "soak": Budget(480, 10, soak.run, partial(soak.run, shapes=soak.SHAPES[:1], cycles=50)),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the suite.

    Args:
        arguments: Of the command line.

    Returns:
        0 if all figures keep to their limits, else 1.
    """
    names = list(budgets(Path()))
    parser = argparse.ArgumentParser(prog="python -m tests.trust", description="Kernels and layers on a GPU.")
    parser.add_argument("out", type=Path, help="folder that gets the results")
    parser.add_argument("--parts", default=",".join(names), help=f"names with commas between: {', '.join(names)}")
    parser.add_argument("--seconds", type=float, help="budget of each chosen part, instead of its own")
    parser.add_argument("--quick", action="store_true", help="cut sizes and budgets")
    given = parser.parse_args(arguments)
    chosen = given.parts.split(",")
    if unknown := sorted(set(chosen) - set(names)):
        parser.error(f"--parts: {', '.join(unknown)} is none of {', '.join(names)}")
    if given.seconds is not None and not given.seconds > 0:
        parser.error(f"--seconds={given.seconds} must be positive")

    from benchmarks.store import provenance

    folder = given.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")  # choices are measured anew, and no one else's are read
    machine = Machine(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    record = Record(folder, given.quick, provenance())
    for name, budget in budgets(folder).items():
        if name in chosen:
            _run(record, machine, name, budget, given.quick, given.seconds)
    print(f"written: {record.path}")
    return 0 if record.passed else 1


def _run(record: Record, machine: Machine, name: str, budget: Budget, quick: bool, seconds: float | None) -> None:
    seconds = seconds if seconds is not None else budget.quick if quick else budget.seconds
    print(f"{name}: at most about {seconds:.0f} s", flush=True)
    with record.part(name, seconds) as part:
        (budget.cut if quick else budget.whole)(machine, part)
    print(f"  {part.outcome} after {part.took:.1f} s {part.reason}".rstrip())
    for row in part.rows:
        limit = "" if row.limit is None else f" ({row.rule} {row.limit:g})"
        print(f"  {'ok  ' if row.passed else 'FAIL'} {row.item} {row.what}: {row.figure}{limit}, {row.size}")
        for fault in row.faults[:3]:
            print(f"         {fault}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
