"""B2: algorithms of the library one after the other, each waited for; run in a process that one of them may end.

python -m tests.trust.tried FILE EVERY FIRST REPEATS SECONDS TASK PLACE

It goes on at that task, and at that place among its algorithms.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from semisparse.errors import ContextLostError, EngineError
from semisparse.gemm.autotune.algorithm import one_line
from semisparse.gemm.autotune.candidates import Candidates
from semisparse.gemm.operands import Operands
from semisparse.gemm.problem import Problem
from tests.gemm.products import product
from tests.trust import apart
from tests.trust.machine import Machine

Event = dict[str, Any]
Lost = (torch.AcceleratorError, ContextLostError)


class Task(NamedTuple):
    """A product and what is to be tried.

    Attributes:
        problem: The product.
        shape: Its number among the shapes; None for a choice that ships.
        only: The algorithm of such a choice.
    """

    problem: Problem
    shape: int | None = None
    only: int | None = None


def walk(
    machine: Machine,
    tasks: Sequence[Task],
    begin: tuple[int, int],
    repeats: int,
    in_time: Callable[[], bool],
    write: Callable[[Event], None],
) -> int:
    """Try all, and tell of each algorithm before and after it; up to the first that ends the context.

    Args:
        machine: Where.
        tasks: All of them.
        begin: The task to go on at, and how many of its algorithms were tried.
        repeats: Of each algorithm.
        in_time: Whether there is time for another one.
        write: Gets what happens.

    Returns:
        0 at the end; 1 where the context is lost.
    """
    for at in range(begin[0], len(tasks)):
        try:
            try:
                _each(machine, tasks[at], begin[1] if at == begin[0] else 0, repeats, in_time,
                      lambda event, at=at: write({"task": at, **event}))  # fmt: skip
            except Lost:
                raise
            except Exception as error:
                machine.wait()  # it may be the first sign of a lost context
                write({"what": "raised", "task": at, "error": one_line(error)})
        except Lost as error:
            write({"what": "lost", "task": at, "error": one_line(error)})
            return 1
        if not in_time():
            break
    write({"what": "end"})
    return 0


def _each(
    machine: Machine, task: Task, done: int, repeats: int, in_time: Callable[[], bool], write: Callable[[Event], None]
) -> None:
    """The algorithms of one task."""
    problem, index = task.problem, machine.index
    write({"what": "begin"})
    a, b, out, bias = machine.operands(problem)
    right = product(problem, a, b, bias, torch.float32).to(problem.out_dtype)
    try:
        operands = Operands(machine.engine.compress(a), b, out, bias)
        offered = list(machine.engine.algorithms(problem, index)) if task.only is None else [task.only]
    except EngineError as error:
        machine.wait()
        write({"what": "refused", "error": one_line(error)})
        return
    for place, algorithm in enumerate(offered[done:], done):
        if not in_time():
            return
        write({"what": "try", "place": place, "algorithm": algorithm})
        wrong = runs(machine, problem, algorithm, operands, right, repeats)
        write({"what": "ran", "algorithm": algorithm, "wrong": wrong})
        if wrong and task.only is None and passes(machine, problem, algorithm):
            write({"what": "missed", "algorithm": algorithm})
    machine.engine.release(problem, index)
    write({"what": "done"})


def runs(
    machine: Machine, problem: Problem, algorithm: int, operands: Operands, right: torch.Tensor, repeats: int
) -> int | None:
    """How many runs are wrong, waited for; None where the library refuses the algorithm, which is no result at all."""
    count = torch.zeros((), dtype=torch.int64, device=right.device)
    try:
        for _ in range(repeats):
            operands.out.fill_(float("nan"))
            machine.engine.matmul(problem, algorithm, operands)
            count += (operands.out != right).any()
    except EngineError:
        machine.wait()  # the refusal may be the first sign of a lost context
        return None
    return int(count)


def passes(machine: Machine, problem: Problem, algorithm: int) -> bool:
    """Whether the autotuner's checks let a wrong algorithm pass."""
    a, b, out, bias = machine.operands(problem, seed=1)
    candidates = Candidates(machine.engine, problem, Operands(machine.engine.compress(a), b, out, bias))
    fault = candidates.fault(algorithm)
    candidates.close(algorithm)
    return fault is None


def main(file: Path, every: int, first: int, repeats: int, seconds: float, task: int, place: int) -> int:
    """Go on at a task in this process; each event is a line of the file at once."""
    from tests.trust.algorithms import tasks_of

    end = time.monotonic() + seconds
    machine = Machine(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    with file.open("a", encoding="utf-8") as lines:

        def write(event: Event) -> None:
            lines.write(json.dumps(event) + "\n")
            lines.flush()

        found = tasks_of(machine, every, first)
        return walk(machine, found, (task, place), repeats, lambda: time.monotonic() < end, write)


if __name__ == "__main__":
    apart.die_with_parent()
    name, every, first, repeats, seconds, *at = sys.argv[1:]
    code = main(Path(name), int(every), int(first), int(repeats), float(seconds), int(at[0]), int(at[1]))
    os._exit(code)  # what is freed at exit may wait for ever where the context is lost
