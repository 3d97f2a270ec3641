"""A program for compute-sanitizer: each Triton kernel, or each kind of layer, once on small shapes.

    python -m tests.trust.launches FILE kernels
    python -m tests.trust.launches FILE layers [FIRST]
    python -m tests.trust.launches FILE "layers by Python" [FIRST]

FILE gets what was launched, as JSON, anew before each case: where one of them ends the program, it says which, and the
next program goes on behind it (FIRST). Outputs are not initialised, so that what no kernel writes can be found when it
is read.
"""

import ast
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from semisparse import native
from semisparse.files import write_atomically
from semisparse.formats.layout import FP8, SM90_8BIT, SM90_16BIT, packed_bytes
from semisparse.gemm.engine import Engine
from semisparse.gemm.operands import Operands
from semisparse.gemm.problem import Problem
from semisparse.kernels import (
    amax,
    amax_many,
    bias,
    kept_values,
    prune_pack,
    prune_pack8,
    prune_pack8_many,
    prune_pack_many,
    quantise,
    rescale,
    sample_pack,
    sample_pack8,
    tile_codes,
    unpack,
)
from semisparse.kernels.launcher import Launcher
from semisparse.kernels.pack_table import Matrix
from semisparse.nn.packed_weights import PackedWeights
from tests.trust.cases import CASES, Case, cases, fill, make_layer, normal, step
from tests.trust.guards import NAN
from tests.trust.machine import Machine

# Rows and columns. One tile of the format, odd multiples of it, and some of more than one program each way.
SIXTEEN = ((16, 16), (48, 80), (80, 48), (144, 208))
EIGHT = ((32, 32), (96, 160), (160, 96))
LAYERS = ((1, 32, 32), (13, 96, 160), (64, 64, 128), (100, 160, 96), (200, 128, 64))
"""Tokens, in_features, out_features."""

BY_PYTHON = "layers by Python"
"""The mode in which Python starts what C++ would."""

BF16 = torch.bfloat16
KERNELS = Path(prune_pack.__file__).parent


def entry_points() -> set[str]:
    """The names of all kernels: functions that Triton compiles, that return nothing and that no other one calls."""
    functions = [
        function
        for path in KERNELS.glob("*.py")
        for function in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(function, ast.FunctionDef) and any("jit" in ast.unparse(one) for one in function.decorator_list)
    ]
    called = {
        ast.unparse(node.func).rpartition(".")[2]
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.Call)
    }
    returning = {one.name for one in functions if any(isinstance(node, ast.Return) for node in ast.walk(one))}
    return {function.name for function in functions} - called - returning


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often each kernel is launched by Python inside the block."""
    counts: Counter[str] = Counter()
    original = Launcher.__call__

    def call(self: Launcher, index: int, *pointers: Tensor | None) -> None:
        counts[self._kernel.fn.__name__] += 1
        original(self, index, *pointers)

    with mock.patch.object(Launcher, "__call__", call):
        yield counts


class Kernels:
    """The launches of single kernels on one device.

    Args:
        machine: Where; on the CPU in Triton's interpreter.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine, self.device = machine, machine.device

    def run(self, sixteen: tuple[tuple[int, int], ...] = SIXTEEN, eight: tuple[tuple[int, int], ...] = EIGHT) -> None:
        """Launch all of them.

        Args:
            sixteen: Rows and columns of matrices that are packed in 16 bits.
            eight: The same in e4m3.
        """
        for shape in sixteen:
            self.sixteen(*shape)
        for shape in eight:
            self.eight(*shape)
        self.many(sixteen[:3], eight[:3])

    def empty(self, *shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def drawn(self, rows: int, columns: int, seed: int = 1, dtype: torch.dtype = BF16) -> Tensor:
        return normal(self.machine, rows, columns, seed=seed, dtype=dtype)

    def sixteen(self, rows: int, columns: int) -> None:
        matrix = self.drawn(rows, columns)
        first, turned = (self.empty(packed_bytes(*one)) for one in ((rows, columns), (columns, rows)))
        codes = self.empty(rows // 4, columns // 4, dtype=torch.int16)
        tile_codes.launch(matrix, codes, mask="transposable")
        prune_pack.launch(matrix, first, turned, dtype=BF16, layout=SM90_16BIT)
        unpack.launch(turned, self.empty(columns, rows, dtype=BF16), layout=SM90_16BIT)
        prune_pack.launch(matrix, first, None, dtype=BF16, layout=SM90_16BIT, mask="row")
        prune_pack.launch(matrix, first, turned, dtype=BF16, layout=SM90_16BIT, codes=codes)
        unpack.launch(first, out := self.empty(rows, columns, dtype=BF16), layout=SM90_16BIT)
        bias.launch(out, self.drawn(1, columns)[0])
        values = self.empty(rows, columns // 2, dtype=BF16)
        kept_values.keep_values(matrix, codes, values)
        kept_values.spread_values(values, codes, out)
        tokens = self.drawn(rows - 3, columns, seed=2)
        sums = self.empty(sample_pack.sum_rows(rows), columns, dtype=torch.float32)
        packed = self.empty(packed_bytes(columns, rows))
        sample_pack.launch(tokens, self.seed(), packed, sums, layout=SM90_16BIT, rows_padded=rows)
        bias.launch_sum(sums, self.empty(columns, dtype=BF16))

    def eight(self, rows: int, columns: int) -> None:
        matrix = self.drawn(rows, columns)
        largest = self.largest(matrix)
        scale = self.empty(dtype=torch.float32)
        amax.launch_scale(largest, scale)
        first, turned = (
            self.empty(SM90_8BIT.buffer_bytes(*one, itemsize=1)) for one in ((rows, columns), (columns, rows))
        )
        prune_pack8.launch(matrix, largest, first, turned, layout=SM90_8BIT, scale=scale)
        unpack.launch(turned, self.empty(columns, rows).view(FP8), layout=SM90_8BIT)
        prune_pack8.launch(matrix, largest, first, None, layout=SM90_8BIT, mask="row", scale=scale)
        unpack.launch(first, self.empty(rows, columns).view(FP8), layout=SM90_8BIT)
        tokens = self.drawn(rows - 3, columns, seed=2)
        partials = self.largest(tokens)
        quantise.launch(tokens, partials, self.empty(rows, columns), self.empty(columns, rows), scale)
        y = self.drawn(rows, columns, seed=3)
        rescale.launch(y, scale, scale, self.drawn(1, columns)[0], self.empty(rows - 3, columns, dtype=BF16))
        sums = self.empty(sample_pack8.sum_rows(rows - 3), columns, dtype=torch.float32)
        packed = self.empty(SM90_8BIT.buffer_bytes(columns, rows, itemsize=1))
        scales = scale, self.empty(dtype=torch.float32)
        sample_pack8.launch(
            tokens, self.seed(), partials, self.empty(rows, columns), packed, sums, scales, layout=SM90_8BIT
        )

    def many(self, sixteen: tuple[tuple[int, int], ...], eight: tuple[tuple[int, int], ...]) -> None:
        members = [
            Matrix(self.drawn(*shape), self.empty(packed_bytes(*shape)), self.empty(packed_bytes(*shape[::-1])))
            for shape in sixteen
        ]
        prune_pack_many.Batch(members, BF16, SM90_16BIT, "transposable").launch()
        matrices = [self.drawn(*shape) for shape in eight]
        members = [
            Matrix(
                matrix,
                self.empty(SM90_8BIT.buffer_bytes(*matrix.shape, itemsize=1)),
                self.empty(SM90_8BIT.buffer_bytes(*matrix.shape[::-1], itemsize=1)),
                None,
                self.empty(dtype=torch.float32),
            )
            for matrix in matrices
        ]
        prune_pack8_many.Batch(members, SM90_8BIT, "transposable").launch()
        amax_many.Batch(matrices, self.empty(len(matrices), dtype=torch.float32)).launch()

    def largest(self, matrix: Tensor) -> Tensor:
        partials = self.empty(amax.programs_for(matrix), dtype=torch.int32)
        amax.launch(matrix, partials)
        return partials

    def seed(self) -> Tensor:
        return torch.tensor(3, device=self.device)


@contextmanager
def filled() -> Iterator[list[Tensor]]:
    """Python starts every product in the block, and the result is NaN before.

    initcheck does not see what cuSPARSELt's kernels for sm90 store, presumably as they store in bulk, by TMA: on an
    H100 it reported each read of such a result, by add_bias, rescale and the engine's own trial, and nothing else. Here
    a kernel that it does see writes the results first. That hides nothing of our kernels, which write no result before
    the product does; and what a product itself leaves out stays NaN, and is counted. Operands, packed matrices,
    workspaces and all outputs of kernels stay uninitialised. C++ cannot be interrupted so, and starts nothing.

    Yields:
        For each product how many entries of its result it left as they were, on the device.
    """
    left: list[Tensor] = []
    original = Engine.matmul

    def matmul(self: Engine, problem: Problem, algorithm: int, operands: Operands) -> None:
        operands.out.view(torch.uint8).fill_(NAN)
        original(self, problem, algorithm, operands)
        left.append(operands.out.float().isnan().sum())

    native.watch(1)
    try:
        with mock.patch.object(Engine, "matmul", matmul):
            yield left
    finally:
        native.watch(-1)


def layer(machine: Machine, case: Case, shape: tuple[int, int, int]) -> None:
    """Two steps of a layer: the second one is started by C++ where the native library is used.

    Args:
        machine: Where.
        case: What.
        shape: Tokens, in_features and out_features.
    """
    m, k, n = shape
    made = make_layer(machine, case, k, n)
    fill(machine, made, integers=False)
    x, dy = (normal(machine, m, size, seed=at, dtype=case.dtype) for at, size in ((5, k), (6, n)))
    for _ in range(2):
        step(made, x, dy)
    if case.config.weight is not None:
        PackedWeights(nn.Sequential(made)).pack()


def works(machine: Machine, mode: str) -> list[tuple[str, Callable[[], None]]]:
    """What a mode does, case by case, with the names of the cases."""
    if mode == "kernels":
        return [("kernels", Kernels(machine).run)]
    return [
        (f"{case.name} at {shape}", partial(layer, machine, case, shape))
        for case in cases(machine, tuple(CASES))
        for shape in LAYERS
    ]


def run(machine: Machine, file: Path, mode: str, first: int = 0) -> None:
    """Do what a mode does.

    Args:
        machine: Where.
        file: Gets, as JSON, what was launched, which case is reached, and of how many.
        mode: Of this program.
        first: Case to begin with.
    """
    todo = works(machine, mode)
    before = native.started() + native.started_dense()

    def tell(reached: int, counts: Counter[str], left: list[Tensor] | None) -> None:
        found = {
            "mode": mode,
            "launches": dict(counts),
            "native": native.started() + native.started_dense() - before,
            "products": None if left is None else len(left),
            "unwritten": int(torch.stack(left).sum()) if left else 0,
            "reached": reached,
            "of": len(todo),
            "case": todo[reached][0] if todo[reached:] else "",
        }
        write_atomically(file, json.dumps(found).encode())

    with counted() as counts, filled() if mode == BY_PYTHON else nullcontext() as left:
        for at, (_, work) in enumerate(todo[first:], first):
            tell(at, counts, left)
            work()
            machine.wait()  # so that an error is that of its case
        tell(len(todo), counts, left)


def main() -> int:
    machine = Machine(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    machine.tune_quickly()
    run(machine, Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
