"""B2: every algorithm of the library over many shapes, again and again; what is wrong once is listed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from semisparse.errors import EngineError
from semisparse.formats.layout import FP8
from semisparse.gemm import problem as problems
from semisparse.gemm.autotune.candidates import Candidates
from semisparse.gemm.autotune.store import Entry, shipped
from semisparse.gemm.operands import Operands
from semisparse.gemm.problem import Problem
from tests.gemm.products import product
from tests.trust.machine import Machine
from tests.trust.outcome import NotHere, Part, Row

REPEATS = 20
WANTED = 40
"""Shapes that the plan asks for."""

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


def run(machine: Machine, part: Part, every: int = 1, repeats: int = REPEATS) -> None:
    """Compare until the budget is spent: the shapes in three quarters of it, then what ships.

    Args:
        machine: Where.
        part: Gets the rows.
        every: One shape in as many.
        repeats: Of each algorithm.

    Raises:
        NotHere: There are no sparse products.
    """
    verdict = machine.engine.available(machine.device)
    if not verdict.ok:
        raise NotHere(verdict.reason)
    found, in_time, todo = Found(), part.share(0.75), list(enumerate(SHAPES))[::every]
    part.details["listed"] = found.listed
    for at, shape in todo:
        if not in_time():
            break
        for problem in of_shape(at, shape):
            if in_time() and (problem.dtype is not FP8 or _has_fp8(machine)):
                with part.attempt(str(problem)):
                    _look(machine, problem, repeats, found, in_time)
        found.shapes += in_time()
        part.renew(found.rows(len(todo)))
    part.renew(found.rows(len(todo)))
    _shipped(machine, part, repeats, {(kind, number) for kind, number in _kinds(found.listed)}, list(shipped()))


@dataclass
class Found:
    """What is known of the algorithms.

    Attributes:
        shapes: That were looked at.
        products: That ran.
        kinds: How many problems.
        listed: Algorithms that were wrong once or more.
        missed: Those of them that the autotuner's checks let pass.
        refused: Products that the library refuses.
    """

    shapes: int = 0
    products: int = 0
    kinds: int = 0
    listed: list[dict[str, Any]] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def rows(self, of: int) -> list[Row]:
        """As lines of the table; of: shapes there are."""
        size = f"{self.products} products of {self.kinds} problems"
        names = [f"{one['algorithm']} of {one['problem']}" for one in self.listed]
        wrong, refused = "algorithms that were wrong once or more, and are listed", "products that the library refuses"
        return [
            Row("B2", "shapes, with all algorithms", f"of {of}", self.shapes, min(WANTED, of), "at least"),
            Row("B2", wrong, size, len(self.listed), None, "reported", names),
            Row(
                "B2",
                "listed algorithms that the autotuner's checks let pass",
                size,
                len(self.missed),
                0,
                faults=self.missed,
            ),
            Row("B2", refused, f"of {self.shapes} shapes", len(self.refused), 0, faults=self.refused),
        ]


def _look(machine: Machine, problem: Problem, repeats: int, found: Found, in_time: Callable[[], bool]) -> None:
    """Run all algorithms of a problem, or as many as there is time for."""
    try:
        wrong, count = _wrong(machine, problem, repeats, in_time)
    except EngineError as error:
        found.refused.append(f"{problem}: {error}")
        return
    found.products, found.kinds = found.products + count, found.kinds + 1
    found.listed += [_entry(machine, problem, number, times, repeats) for number, times in wrong.items()]
    found.missed += [f"{number} of {problem}" for number in _not_refused(machine, problem, list(wrong))]


def _wrong(machine: Machine, problem: Problem, repeats: int, in_time: Callable[[], bool]) -> tuple[dict[int, int], int]:
    """Algorithm -> how many of its runs were wrong, for those with any; and how many products ran."""
    a, b, out, bias = machine.operands(problem)
    right = product(problem, a, b, bias, torch.float32).to(problem.out_dtype)
    operands = Operands(machine.engine.compress(a), b, out, bias)
    counts: dict[int, torch.Tensor] = {}
    for algorithm in machine.engine.algorithms(problem, machine.index):
        if not in_time():
            break
        counts[algorithm] = _runs(machine, problem, algorithm, operands, right, repeats)
    machine.engine.release(problem, machine.index)
    known = {number: count for number, count in counts.items() if count is not None}
    found = torch.stack(list(known.values())).tolist() if known else []
    return {number: count for number, count in zip(known, found, strict=True) if count}, repeats * len(known)


def _runs(
    machine: Machine, problem: Problem, algorithm: int, operands: Operands, right: torch.Tensor, repeats: int
) -> Any:
    """Wrong runs as a number on the device; None where the library refuses the algorithm, which is no result at all."""
    count = torch.zeros((), dtype=torch.int64, device=right.device)
    try:
        for _ in range(repeats):
            operands.out.fill_(float("nan"))
            machine.engine.matmul(problem, algorithm, operands)
            count += (operands.out != right).any()
    except EngineError:
        return None
    return count


def _not_refused(machine: Machine, problem: Problem, wrong: Sequence[int]) -> list[int]:
    """Those of some wrong algorithms that the autotuner would not find out."""
    if not wrong:
        return []
    a, b, out, bias = machine.operands(problem, seed=1)
    candidates = Candidates(machine.engine, problem, Operands(machine.engine.compress(a), b, out, bias))
    found = [number for number in wrong if candidates.fault(number) is None]
    candidates.close(None)
    return found


def _has_fp8(machine: Machine) -> bool:
    return not machine.cuda or torch.cuda.get_device_capability(machine.device) >= (8, 9)


def _entry(machine: Machine, problem: Problem, algorithm: int, times: int, repeats: int) -> dict[str, Any]:
    version = machine.engine.available(machine.device).version
    key = {**machine.engine.runtime.identity(machine.index), "cusparselt": version, **problem.key()}
    return {"algorithm": algorithm, "wrong": times, "runs": repeats, "problem": str(problem), "key": key}


def _kinds(listed: Sequence[dict[str, Any]]) -> list[tuple[tuple[object, ...], int]]:
    return [(kind_of(_problem(one["key"])), one["algorithm"]) for one in listed]


def _problem(key: dict[str, Any]) -> Problem:
    """The product that a key names."""
    dtype = getattr(torch, key["dtype"])
    return Problem(
        key["rows"], key["reduction"], key["columns"], dtype, key["b_order"], key["d_order"], key["bias"],
        key["token_axis"], getattr(torch, key.get("out_dtype", key["dtype"])),
    )  # fmt: skip


def _shipped(
    machine: Machine, part: Part, repeats: int, listed: set[tuple[tuple[object, ...], int]], entries: Sequence[Entry]
) -> None:
    """The products that ship with an algorithm for this GPU: each is run, and none may name a listed one."""
    version = machine.engine.available(machine.device).version
    identity = {**machine.engine.runtime.identity(machine.index), "cusparselt": version}
    here = [
        (_problem(key), choice.sparse_algorithm)
        for key, choice in entries
        if "way" not in key
        and choice.sparse_algorithm is not None
        and all(identity.get(name) == key[name] for name in ("gpu", "cusparselt") if name in key)
    ]
    named = [f"{number} for {problem}" for problem, number in here if (kind_of(problem), number) in listed]
    part.add(
        Row("B2", "shipped choices that name a listed algorithm", f"{len(here)} choices", len(named), faults=named)
    )
    wrong, ran, own = (
        [],
        0,
        part.add(Row("B2", "shipped choices that were run", f"of {len(here)}", 0, len(here), "at least")),
    )
    for problem, number in here:
        if part.left() <= 0:
            break
        with part.attempt(f"{number} for {problem}"):
            a, b, out, bias = machine.operands(problem)
            right = product(problem, a, b, bias, torch.float32).to(problem.out_dtype)
            count = _runs(machine, problem, number, Operands(machine.engine.compress(a), b, out, bias), right, repeats)
            machine.engine.release(problem, machine.index)
            wrong += [f"{number} for {problem}"] if count is None or int(count) else []
            ran += 1
        own.figure = ran
    size = f"{ran} choices, {repeats} runs each"
    part.add(Row("B2", "shipped choices whose own product was wrong", size, len(wrong), faults=wrong))
