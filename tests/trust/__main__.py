"""The trust suite: kernels and layers on a GPU over many shapes, algorithms, streams, threads, graphs and minutes.

    python -m tests.trust OUT                              all parts, about an hour
    python -m tests.trust OUT --quick                      cut sizes, about a minute
    python -m tests.trust OUT --parts soak --seconds 480   one part, with another budget
    python -m tests.trust OUT --within 540                 parts for which no time is left are said to be missing

Each part runs in a process of its own, which is ended where it does not end itself, unless --here is given.
OUT/trust.json is written as results come. `python tests/reliability.py OUT/trust.json` adds them to the record.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

if __name__ == "__main__":
    # cuBLAS promises the same bits on several streams only with workspaces of a fixed size; read when CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Without a GPU, Triton interprets its kernels; that is decided where it is imported.
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.trust import algorithms, apart, convergence, determinism, graphs, leaks, numerics, sanitizer, soak
from tests.trust.machine import Machine
from tests.trust.outcome import FILE, Part, Record, write

Work = Callable[[Machine, Part], None]
SMALL = 2**24
"""M x K x N of the largest product of a quick run's numerics."""


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
        "numerics": _half(0),
        "numerics-2": _half(1),
        "algorithms": _quarter(0),
        "algorithms-2": _quarter(1),
        "algorithms-3": _quarter(2),
        "algorithms-4": _quarter(3),
        "determinism": Budget(
            90, 10, determinism.run, partial(determinism.run, runs=20, shapes=determinism.SHAPES[:1])
        ),
        "graphs": Budget(120, 8, graphs.run, partial(graphs.run, replays=20, modes=())),
        "leaks": Budget(180, 10, leaks.run, partial(leaks.run, steps=256, shapes=16, layers=64)),
        "convergence": Budget(130, 8, convergence.run, partial(convergence.run, steps=50, seeds=1)),
        "sanitizer": Budget(520, 5, tools, lambda machine, part: sanitizer.guard(machine, part)),
        "soak": Budget(480, 10, soak.run, partial(soak.run, shapes=soak.SHAPES[:1], cycles=50, kills=1)),
    }


def _half(first: int) -> Budget:
    """Half of the shapes of numerics."""
    small = [shape for shape in numerics.shapes() if prod(shape) <= SMALL]  # a CPU takes minutes for one that is not
    cut = partial(numerics.run, every=20, first=first, chosen=small)
    return Budget(480, 10, partial(numerics.run, every=numerics.HALVES, first=first), cut)


def _quarter(first: int) -> Budget:
    """A quarter of the shapes and shipped choices of algorithms."""
    cut = partial(algorithms.run, every=len(algorithms.SHAPES) // 2, first=first, repeats=5)
    return Budget(400, 18, partial(algorithms.run, every=algorithms.QUARTERS, first=first), cut)


def usual(quick: bool) -> list[str]:
    """The parts that run where none is named; of the four of algorithms, a quick run has the first."""
    return [name for name in budgets(Path()) if not (quick and name.startswith("algorithms-"))]


def main(arguments: list[str] | None = None) -> int:
    """Run the suite.

    Args:
        arguments: Of the command line.

    Returns:
        0 if all figures keep to their limits, else 1.
    """
    given = _parsed(arguments)
    folder: Path = given.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")  # choices are measured anew, and no one else's are read
    passed = _here(folder, given) if given.here else _apart(folder, given)
    print(f"written: {folder / FILE}")
    return 0 if passed else 1


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    names = usual(quick=False)
    parser = argparse.ArgumentParser(prog="python -m tests.trust", description="Kernels and layers on a GPU.")
    parser.add_argument("out", type=Path, help="folder that gets the results")
    parser.add_argument("--parts", help=f"names with commas between (default: all): {', '.join(names)}")
    parser.add_argument("--seconds", type=float, help="budget of each chosen part, instead of its own")
    parser.add_argument("--within", type=float, help="seconds for all parts together")
    parser.add_argument("--quick", action="store_true", help="cut sizes and budgets")
    parser.add_argument("--here", action="store_true", help="all parts in this process")
    given = parser.parse_args(arguments)
    chosen = usual(given.quick) if given.parts is None else given.parts.split(",")
    if unknown := sorted(set(chosen) - set(names)):
        parser.error(f"--parts: {', '.join(unknown)} is none of {', '.join(names)}")
    for name in ("seconds", "within"):
        value = getattr(given, name)
        if value is not None and not value > 0:
            parser.error(f"--{name}={value} must be positive")
    given.parts = [name for name in names if name in chosen]
    return given


def _seconds(budget: Budget, given: argparse.Namespace) -> float:
    if given.seconds is not None:
        return float(given.seconds)
    return budget.quick if given.quick else budget.seconds


def _here(folder: Path, given: argparse.Namespace) -> bool:
    """Run the parts in this process; whether all figures keep to their limits."""
    from benchmarks.store import provenance

    machine = Machine(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    record, known = Record(folder, given.quick, provenance()), budgets(folder)
    for name in given.parts:
        _run(record, machine, name, known[name], given)
    return record.passed


def _run(record: Record, machine: Machine, name: str, budget: Budget, given: argparse.Namespace) -> None:
    seconds = _seconds(budget, given)
    with record.part(name, seconds) as part:
        print(f"{name}: at most about {seconds:.0f} s", flush=True)
        if machine.cuda and (reason := machine.why_not_sparse()):
            raise RuntimeError(f"no sparse products on this GPU: {reason}")
        (budget.cut if given.quick else budget.whole)(machine, part)
    print(f"  {part.outcome} after {part.took:.1f} s {part.reason}".rstrip())
    for row in part.all_rows():
        limit = "" if row.limit is None else f" ({row.rule} {row.limit:g})"
        print(f"  {'ok  ' if row.passed else 'FAIL'} {row.item} {row.what}: {row.figure}{limit}, {row.size}")
        for fault in row.faults[:3]:
            print(f"         {fault}")
    sys.stdout.flush()


def _apart(folder: Path, given: argparse.Namespace) -> bool:
    """Run each part in a process of its own, in a folder of its own; whether all figures keep to their limits."""
    from benchmarks.store import provenance

    origin, done, begin, known = provenance(), [], time.monotonic(), budgets(folder)

    def seen(document: dict[str, Any]) -> None:
        write(folder / FILE, given.quick, origin, [*done, document])

    for name in given.parts:
        seconds = _seconds(known[name], given)
        limit = seconds + apart.GRACE
        if given.within is not None:
            limit = min(limit, given.within - (time.monotonic() - begin) - apart.PATIENCE)
            seconds = min(seconds, max(limit - apart.GRACE / 2, 1.0))  # it ends itself, rather than being ended
        part: dict[str, Any] = {"name": name, "budget": seconds, "seconds": 0.0, "rows": []}
        if limit > 0:
            own, part = folder / name, {**part, "outcome": "running", "reason": ""}
            seen(part)
            options = [f"--parts={name}", f"--seconds={seconds}", "--here", *(["--quick"] if given.quick else [])]
            command = [sys.executable, "-m", "tests.trust", str(own), *options]
            part = apart.run(command, own / FILE, part, limit, seen)
        else:
            part |= {"outcome": "raised", "reason": "no time was left"}
        done.append(part)
        write(folder / FILE, given.quick, origin, done)
        if part["outcome"] == "raised":
            print(f"  {name} raised: {part['reason']}", flush=True)
    return all(part["outcome"] != "raised" and all(row["passed"] for row in part["rows"]) for part in done)


if __name__ == "__main__":
    apart.obey()
    if "--here" in sys.argv:
        apart.die_with_parent()
    sys.exit(main())
