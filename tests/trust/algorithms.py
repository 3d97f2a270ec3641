"""B2: every algorithm of the library over many shapes, again and again; what is wrong once is listed.

They are tried in a process of their own (tried.py). One that ends the CUDA context is named, and the next process goes
on behind it.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from semisparse.formats.layout import FP8
from semisparse.gemm import problem as problems
from semisparse.gemm.autotune.store import shipped
from semisparse.gemm.autotune.tiles import not_tuned
from semisparse.gemm.problem import Problem
from tests.trust import apart
from tests.trust.machine import Machine
from tests.trust.outcome import NotHere, Part, Row
from tests.trust.tried import Event, Task, walk

REPEATS = 20
WANTED = 40
"""Shapes that the plan asks for."""

QUARTERS = 4
"""Parts that share the shapes, each with as many of either 16-bit dtype, and the shipped choices."""

MOST_PROCESSES = 24
"""Each takes about 8 s to start."""

MOST_OF_ONE = 3
"""Algorithms of one problem that may end the context before the next problem's turn."""

SILENCE = 60.0
"""Seconds without a word after which a process is ended."""

COMMAND = (sys.executable, "-m", "tests.trust.tried")

KINDS = (
    problems.forward, problems.grad_input, problems.activation_forward, problems.activation_weight,
    problems.sampled_weight,
)  # fmt: skip
FP8_KINDS = (problems.fp8_forward, problems.fp8_grad_input, problems.fp8_sampled_weight)

# Tokens, N, K, all multiples of 32: with M above 256 an algorithm of an earlier library was found to be wrong.
SHAPES = (
    (16, 32, 32), (13, 96, 160), (200, 160, 96), (1000, 32, 2048), (24, 2048, 32), (256, 256, 256), (257, 256, 256),
    (264, 512, 128), (512, 128, 512), (1024, 1024, 1024), (1024, 1024, 4096), (4104, 4096, 1024), (128, 64, 64),
    (64, 128, 64), (72, 192, 320), (320, 320, 192), (8, 544, 1056), (1032, 544, 1056), (2048, 768, 3072),
    (2048, 3072, 768), (7, 4096, 4096), (384, 384, 384), (640, 896, 1152), (1280, 1152, 896), (48, 32, 4096),
    (4096, 32, 64), (4096, 64, 32), (96, 4096, 32), (2056, 2048, 2048), (520, 1056, 544), (136, 160, 1120),
    (1120, 160, 160), (3080, 1024, 256), (6304, 1024, 1024), (8192, 2048, 512), (8192, 512, 2048), (16, 11008, 4096),
    (2048, 4096, 4096), (2048, 11008, 4096), (8192, 4096, 1024),
)  # fmt: skip


def of_shape(at: int, shape: tuple[int, int, int]) -> list[Problem]:
    """The products of one shape; dtypes and bias change from shape to shape."""
    dtype = (torch.bfloat16, torch.float16)[at % 2]
    out = (torch.bfloat16, torch.float32)[at % 2]
    found = [kind(*shape, dtype) for kind in KINDS]
    return [*found, problems.forward(*shape, dtype, bias=True), *(kind(*shape, out) for kind in FP8_KINDS)]


def kind_of(problem: Problem) -> tuple[object, ...]:
    """What an algorithm is listed under: all of a problem but its sizes."""
    return problem.dtype, problem.out_dtype, problem.b_order, problem.d_order


def choices(machine: Machine) -> list[Task]:
    """The choices that ship for this machine."""
    identity = {**machine.engine.runtime.identity(machine.index), "cusparselt": version_of(machine)}
    return [
        Task(_problem(key), None, choice.sparse_algorithm)
        for key, choice in shipped()
        if "way" not in key
        and choice.sparse_algorithm is not None
        and all(identity.get(name) == key[name] for name in ("gpu", "cusparselt") if name in key)
    ]


def tasks_of(machine: Machine, every: int, first: int) -> list[Task]:
    """All that is tried, the same in each process: what ships, what the autotuner would try, and what it would not.

    Args:
        machine: Where.
        every: One pair of shapes and one choice in as many.
        first: The number of the first one.
    """
    pairs = (at for at in range(len(SHAPES)) if at // 2 % every == first)  # dtypes change from shape to shape
    has_fp8 = not machine.cuda or torch.cuda.get_device_capability(machine.device) >= (8, 9)
    found = [
        Task(problem, at) for at in pairs for problem in of_shape(at, SHAPES[at]) if problem.dtype is not FP8 or has_fp8
    ]
    return choices(machine)[first::every] + sorted(found, key=lambda task: bool(not_tuned(task.problem)))


def run(machine: Machine, part: Part, every: int = 1, first: int = 0, repeats: int = REPEATS) -> None:
    """Try all until the budget is spent.

    Args:
        machine: Where.
        part: Gets the rows.
        every: One pair of shapes and one choice in as many.
        first: The number of the first one.
        repeats: Of each algorithm.

    Raises:
        NotHere: There are no sparse products.
        RuntimeError: A process ended before it had begun.
    """
    verdict = machine.engine.available(machine.device)
    if not verdict.ok:
        raise NotHere(verdict.reason)
    found = Found(machine, part, tasks_of(machine, every, first), repeats)
    part.details |= {"listed": found.listed, "lost": found.lost}
    with tempfile.TemporaryDirectory() as folder:
        go_on = partial(_process, Path(folder) / "events", every, first) if machine.cuda else _here
        begin: tuple[int, int] | None = (0, 0)
        while begin is not None and part.left() > 0:
            if found.processes == MOST_PROCESSES:
                found.left_over = len(found.tasks) - begin[0]
                break
            found.processes += 1
            found.last = {}
            code = go_on(found, begin)
            begin = found.ended(code)
            part.details["slowest"] = found.slowest()
            part.renew(found.rows())
    part.renew(found.rows())


def _here(found: "Found", begin: tuple[int, int]) -> int | str:
    """In this process: of the CPU, whose library is simulated."""
    return walk(found.machine, found.tasks, begin, found.repeats, lambda: found.part.left() > 0, found.take)


def _process(file: Path, every: int, first: int, found: "Found", begin: tuple[int, int]) -> int | str:
    """In a process of its own; its exit code, or why it was ended."""
    file.write_bytes(b"")
    options = [file, every, first, found.repeats, max(found.part.left() - 5.0, 1.0), *begin]
    child = subprocess.Popen([*COMMAND, *map(str, options)], start_new_session=True)
    heard, silent = time.monotonic(), False
    try:
        with file.open(encoding="utf-8") as lines:
            rest, over = "", False
            while not over and not silent:
                over = child.poll() is not None
                *whole, rest = (rest + lines.read()).split("\n")
                for line in whole:
                    found.take(json.loads(line))
                if whole:
                    heard = time.monotonic()
                    found.part.renew(found.rows())
                silent = time.monotonic() - heard > SILENCE
                time.sleep(0.0 if over else 0.2)
    finally:
        apart.end(child)
    return f"no word for {SILENCE:.0f} s" if silent else int(child.returncode)


@dataclass
class Found:
    """What is known of the algorithms.

    Attributes:
        machine: Where they run.
        part: Whose cases the tasks are.
        tasks: All.
        repeats: Of each algorithm.
        ship: The choices that ship, of which the tasks have a share.
        done: Numbers of the tasks that are done.
        products: That ran.
        listed: Algorithms that were wrong once or more.
        missed: Those of them that the autotuner's checks let pass.
        refused: Products that the library refuses.
        lost: Algorithms that ended the context, with the error.
        cut: Products of which MOST_OF_ONE did.
        wrong_shipped: Choices that ship and were wrong, refused, or ended the context.
        processes: That were started.
        left_over: Tasks that no process was left for.
        last: What the process said last.
        place: How many algorithms of its task it had tried before the one that it tries, and that one.
        begun: Numbers of the tasks that a process began.
        seconds: Of each task, with the waiting for its process.
        heard: When the last event came.
    """

    machine: Machine
    part: Part
    tasks: list[Task]
    repeats: int
    ship: list[Task] = field(init=False)
    done: set[int] = field(default_factory=set)
    products: int = 0
    listed: list[dict[str, Any]] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    lost: list[dict[str, Any]] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    wrong_shipped: list[str] = field(default_factory=list)
    processes: int = 0
    left_over: int = 0
    last: Event = field(default_factory=dict)
    place: tuple[int, int | None] | None = None
    begun: set[int] = field(default_factory=set)
    seconds: Counter[int] = field(default_factory=Counter)
    heard: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.ship = choices(self.machine)

    def take(self, event: Event) -> None:
        """One event of the process."""
        self.last, what = event, event["what"]
        if what == "end":
            return
        at, algorithm = event["task"], event.get("algorithm")
        now = time.monotonic()
        self.seconds[at] += now - self.heard
        self.heard = now
        task = self.tasks[at]
        name = f"{algorithm} of {task.problem}"
        if what == "begin":
            self.place = None
            self.part.cases += at not in self.begun
            self.begun.add(at)
        elif what == "try":
            self.place = event["place"], algorithm
        elif what == "ran":
            self.products += self.repeats if event["wrong"] is not None else 0
            if task.only is not None:
                self.wrong_shipped += [name] if event["wrong"] != 0 else []
            elif event["wrong"]:
                self.listed.append(self._entry(task.problem, int(event["algorithm"]), event["wrong"]))
        elif what == "missed":
            self.missed.append(name)
        elif what == "refused":
            self.refused.append(f"{task.problem}: {event['error']}")
            self.done.add(at)
        elif what == "raised":
            self.part.raised.append(f"{task.problem}: {event['error']}")
        elif what == "done":
            self.done.add(at)
        if what in ("refused", "raised", "done"):
            self.place = None  # nothing of it is tried any more

    def ended(self, code: int | str) -> tuple[int, int] | None:
        """Where the next process goes on; None where there is nothing more to try.

        Args:
            code: How the process ended.

        Raises:
            RuntimeError: It had not begun.
        """
        if self.last.get("what") == "end":
            return None
        if not self.last:
            raise RuntimeError(f"a process that tries algorithms ended before it had begun: {code}")
        at = self.last["task"]
        task, (place, algorithm) = self.tasks[at], self.place or (0, None)
        error = self.last.get("error") or (code if isinstance(code, str) else f"exit code {code}")
        tuned = not not_tuned(task.problem)
        self.lost.append(
            {"algorithm": algorithm, "problem": str(task.problem), "error": error, "tuned": tuned, "task": at}
        )
        if task.only is not None:
            self.wrong_shipped.append(f"{task.only} of {task.problem}: {error}")
        if self.place is not None and task.only is None:
            if sum(one["task"] == at for one in self.lost) < MOST_OF_ONE:
                return at, place + 1
            self.cut.append(str(task.problem))
        self.done.add(at)
        return (at + 1, 0) if at + 1 < len(self.tasks) else None

    def slowest(self, most: int = 10) -> dict[str, float]:
        """Seconds of the problems that took the longest, by name."""
        return {str(self.tasks[at].problem): round(seconds, 2) for at, seconds in self.seconds.most_common(most)}

    def rows(self) -> list[Row]:
        """As lines of the table."""
        of_shapes = {task.shape for task in self.tasks} - {None}
        whole = of_shapes - {task.shape for at, task in enumerate(self.tasks) if at not in self.done}
        size = f"{self.products} products of {len(self.done)} problems"
        names = [f"{one['algorithm']} of {one['problem']}" for one in self.listed]
        lost = [f"{one['algorithm']} of {one['problem']}: {one['error']}" for one in self.lost]
        tried = [name for name, one in zip(lost, self.lost, strict=True) if one["tuned"]]
        both = zip(lost + names, self.lost + self.listed, strict=True)
        defaults = [name for name, one in both if not one["tuned"] and not one["algorithm"]]
        cut = f"products that were left when {MOST_OF_ONE} of their algorithms had ended the context"
        left = f"behind {self.processes} processes of at most {MOST_PROCESSES}"

        def row(what: str, faults: list[str], limit: int | None = 0, size: str = size) -> Row:
            return Row("B2", what, size, len(faults), limit, "reported" if limit is None else "at most", faults)

        return [
            Row("B2", "shapes, with all algorithms", f"of {len(of_shapes)}", len(whole),
                min(WANTED // QUARTERS, len(of_shapes)), "at least"),
            row("algorithms that were wrong once or more, and are listed", names, None),
            row("listed algorithms that the autotuner's checks let pass", self.missed),
            row("products that the library refuses", self.refused, size=f"of {len(whole)} shapes"),
            row("algorithms that end the context", lost, None),
            row("algorithms that end the context and that the autotuner would try", tried),
            row("defaults of products that are not tuned that are wrong or end the context", defaults),
            row(cut, self.cut, None),
            Row("B2", "products that were not reached because the processes were used up", left, self.left_over),
            *self._of_shipped(),
        ]  # fmt: skip

    def _of_shipped(self) -> list[Row]:
        here = [at for at, task in enumerate(self.tasks) if task.only is not None]
        known = {(kind_of(_problem(one["key"])), one["algorithm"]) for one in self.listed}
        named = [f"{task.only} for {task.problem}" for task in self.ship if (kind_of(task.problem), task.only) in known]
        ran, wrong = sum(at in self.done for at in here), self.wrong_shipped
        return [
            Row("B2", "shipped choices that name a listed algorithm", f"{len(self.ship)} choices", len(named),
                faults=named),
            Row("B2", "shipped choices that were run", f"of {len(here)}", ran, len(here), "at least"),
            Row("B2", "shipped choices whose own product was wrong", f"{ran} choices, {self.repeats} runs each",
                len(wrong), faults=wrong),
        ]  # fmt: skip

    def _entry(self, problem: Problem, algorithm: int, times: int) -> dict[str, Any]:
        machine = self.machine
        key = {**machine.engine.runtime.identity(machine.index), "cusparselt": version_of(machine), **problem.key()}
        tuned = not not_tuned(problem)
        return {
            "algorithm": algorithm, "wrong": times, "runs": self.repeats, "problem": str(problem), "tuned": tuned,
            "key": key,
        }  # fmt: skip


def version_of(machine: Machine) -> int | None:
    """The library's version."""
    return machine.engine.available(machine.device).version


def _problem(key: dict[str, Any]) -> Problem:
    """The product that a key names."""
    dtype = getattr(torch, key["dtype"])
    return Problem(
        key["rows"], key["reduction"], key["columns"], dtype, key["b_order"], key["d_order"], key["bias"],
        key["token_axis"], getattr(torch, key.get("out_dtype", key["dtype"])),
    )  # fmt: skip
