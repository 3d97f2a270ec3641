"""Checking and timing the candidates for one problem, on the operands of the first call with that problem.

A candidate is checked twice before it may be chosen. First against PyTorch's dense product, bit for bit: on operands of
small integers every partial sum is exact, so a right algorithm gives these bits in any order of summation. Then against
itself on the caller's operands, where the order matters: an algorithm whose second run gives other bits is not used.

Extra memory stays under MEMORY: the checked problem is the caller's own where that fits, else one with fewer rows and
columns and the same reduction; the dense result is compared on rows spread over the whole matrix. Random numbers come
from a generator of its own. Waits for the current stream only; the memory goes back to PyTorch's allocator.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from semisparse.errors import ContextLostError, EngineError
from semisparse.formats.layout import FP8, SPARSE_MULTIPLE, round_up, sparse_multiple
from semisparse.gemm.autotune.algorithm import one_line
from semisparse.gemm.chunks import can_be_cut, pieces, sized
from semisparse.gemm.engine import Engine
from semisparse.gemm.operands import Operands
from semisparse.gemm.problem import Problem, dense_multiple
from semisparse.pattern import GROUP, ROW_BITS

MEMORY = 256 * 2**20
"""Bytes on the device that tuning one problem may take in addition to the caller's tensors."""

_ROWS = 256  # rows of D that are compared: at least one in every 128-row tile up to 32,768 rows
_REPEATS = 3
_A_ENTRY = 6  # bytes per entry of the compared rows of A: 16 bits and fp32


class Sample(NamedTuple):
    """Integer operands of a problem and the exact results in the compared rows, one per bias."""

    problem: Problem
    packed: Tensor
    b: Tensor
    out: Tensor
    biases: tuple[Tensor | None, ...]
    rows: Tensor
    expected: tuple[Tensor, ...]


class Candidates:
    """The candidates of one problem, checked and timed on one call's operands.

    Args:
        engine: Runs the candidates.
        problem: The product.
        operands: Of this problem; out is overwritten.
        dense: The whole masked-dense alternative, unpacking included; None where there is none.
        memory: See MEMORY.
    """

    def __init__(
        self,
        engine: Engine,
        problem: Problem,
        operands: Operands,
        dense: Callable[[], object] | None = None,
        memory: int = MEMORY,
    ) -> None:
        self._engine, self._problem, self._operands, self._dense = engine, problem, operands, dense
        self._index = operands.out.get_device()
        self._lost = False
        self._sample_parts: set[Problem] = set()
        self._sample = _roomy_sample(engine, problem, operands.out, memory)
        self._ends: list[Callable[[], None]] = []
        try:
            for one, bias in ((problem, operands.bias), (self._sample.problem, self._sample.biases[0])):
                self._ends.append(engine.share(one, self._index, bias))  # often one problem
        except BaseException:
            self.close(None)
            raise

    def fault(self, algorithm: int, chunk: int | None = None) -> str | None:
        """What is wrong with an algorithm's results, or None. Raises what the library or the allocator raises.

        Args:
            algorithm: Its id.
            chunk: Tokens per piece; None for the whole product. The sample is then cut, too (_sample_chunk). A piece of
                chunk tokens is also checked when its own problem is tuned.
        """
        with self._watched(algorithm):
            return self._fault(algorithm, chunk)

    def _fault(self, algorithm: int, chunk: int | None) -> str | None:
        sample = self._sample
        sample_chunk = None if chunk is None else self._sample_chunk(chunk)
        for repeat in range(_REPEATS):
            which = repeat % len(sample.biases)
            sample.out.fill_(float("nan"))
            given = Operands(sample.packed, sample.b, sample.out, sample.biases[which])
            self._run(sample.problem, algorithm, given, sample_chunk)
            if not torch.equal(_rows_of(sample.problem, sample.out, sample.rows), sample.expected[which]):
                return f"wrong: differs from the dense product in run {repeat + 1}"
        rows = _spread(self._problem.rows, len(sample.rows), sample.rows.device)
        first: Tensor | None = None
        for repeat in range(_REPEATS):
            if chunk is not None:
                self._operands.out.fill_(repeat)  # so that what no piece writes differs from run to run
            self._run(self._problem, algorithm, self._operands, chunk)
            bits = _rows_of(self._problem, self._operands.out, rows)
            bits = bits.view(torch.int16 if bits.dtype.itemsize == 2 else torch.int32)
            if first is not None and not torch.equal(first, bits):
                return f"wrong: other bits in run {repeat + 1}"
            first = bits
        return None

    def time(self, algorithm: int | None, repeats: int, chunk: int | None = None) -> float:
        """Microseconds per call, back to back.

        Args:
            algorithm: Its id; None is the dense alternative.
            repeats: Calls.
            chunk: Tokens per piece; None for the whole product.
        """
        call = self._dense
        if algorithm is not None:

            def call() -> None:
                self._run(self._problem, algorithm, self._operands, chunk)

        assert call is not None, "selection asks for dense only where there is one"
        with self._watched(algorithm):
            return self._engine.runtime.time(self._index, call, repeats)

    @contextmanager
    def _watched(self, algorithm: int | None) -> Iterator[None]:
        """Name the candidate that ends the CUDA context: after it nothing can be tried, nor anything else be run."""
        try:
            try:
                yield
            except EngineError:
                self._engine.runtime.wait(self._index)  # the library's refusal may be the first sign of a lost context
                raise
        except torch.AcceleratorError as error:
            self._lost = True
            who = "the masked-dense product" if algorithm is None else f"algorithm {algorithm} of cuSPARSELt"
            raise ContextLostError(
                f"{who} ended in an error of the GPU while it was tried for {self._problem} ({one_line(error)}), and "
                "this process cannot use the GPU any more: start it again with SEMISPARSE_TUNE=0, which tries no "
                "algorithm, or with backend='dense'"
            ) from error

    def close(self, keep: int | None) -> None:
        """Free the plans of the algorithms that were not chosen; where the context is lost, they are lost with it."""
        if self._lost:
            return
        for end in self._ends:
            end()
        self._ends.clear()
        self._engine.release(self._problem, self._index, keep)
        if self._sample.problem != self._problem:
            self._engine.release(self._sample.problem, self._index)
        for part in self._sample_parts:
            self._engine.release(part, self._index)

    def _sample_chunk(self, chunk: int) -> int:
        """Tokens per piece of the sample, which may have fewer than a chunk: two pieces.

        The last one is the problem's own last piece where the sample has room for it, else half of the sample.
        """
        problem, last = self._sample.problem, self._problem.columns % chunk or chunk
        half = round_up(-(-problem.columns // 2), dense_multiple(problem.dtype))
        first = problem.columns - last if 2 * last <= problem.columns else half
        if can_be_cut(problem, first):
            self._sample_parts = {sized(problem, first), sized(problem, problem.columns - first)} - {self._problem}
        return first

    def _run(self, problem: Problem, algorithm: int, operands: Operands, chunk: int | None) -> None:
        for part, given in pieces(problem, operands, chunk):
            self._engine.matmul(part, algorithm, given)


def within(problem: Problem, memory: int) -> Problem:
    """The problem, or the largest with fewer rows and columns whose check fits into memory bytes.

    Of 16 parts, 10 hold A while it is compressed (16-bit dense + 9/16 of that packed). Later A packed has 4, B 6, the
    compared rows of D 3 and of A 2, and what is converted at a time 1. 8-bit operands are bounded in the same way: they
    are made from 16-bit ones, so A takes 3 bytes an entry at most, and B, too, for which A packed leaves room then.
    """
    sparse, dense = sparse_multiple(problem.dtype), dense_multiple(problem.dtype)
    part = memory // 16
    rows = 10 * part // (2 * problem.reduction * 25 // 16)
    columns = min(6 * part // (2 * problem.reduction), 3 * part // (SPARSE_MULTIPLE * _d_entry(problem)))
    return replace(
        problem,
        rows=min(problem.rows, max(sparse, rows // sparse * sparse)),
        columns=min(problem.columns, max(dense, columns // dense * dense)),
    )


def _d_entry(problem: Problem) -> int:
    """Bytes per entry of the compared rows of D: fp32 sums, two results and a copy."""
    return 4 + 3 * problem.out_dtype.itemsize


def _roomy_sample(engine: Engine, problem: Problem, out: Tensor, memory: int) -> Sample:
    """A sample; where the device is nearly full, one with a quarter of the memory, then one with a sixteenth."""
    for share in (memory, memory // 4):
        try:
            return make_sample(engine, within(problem, share), out, share)
        except torch.OutOfMemoryError:
            continue
    return make_sample(engine, within(problem, memory // 16), out, memory // 16)


def make_sample(engine: Engine, problem: Problem, out: Tensor, memory: int) -> Sample:
    """Integer operands for a problem.

    Args:
        engine: Packs A.
        problem: What the operands are for.
        out: D is written to its front; it must be at least as large.
        memory: Bytes that this may take.
    """
    part, device = memory // 16, out.device
    generator = torch.Generator(device=device).manual_seed(0)
    # The ops that call this may run under the user's autocast, which would round the exact sums.
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        a = integers((problem.rows, problem.reduction), problem.dtype, device, generator)
        keep_two_of_four(a, generator, part // 16)
        packed = engine.compress(a, check=False)
        affordable = min(3 * part // (problem.columns * _d_entry(problem)), 2 * part // (problem.reduction * _A_ENTRY))
        rows = _spread(problem.rows, min(_ROWS, max(SPARSE_MULTIPLE, affordable)), device)
        compared = a[rows].float()
        del a
        b = integers(problem.b_shape, problem.dtype, device, generator)
        sums = torch.empty(len(rows), problem.columns, dtype=torch.float32, device=device)
        columns_at_once = max(1, part // 8 // problem.reduction)
        for begin in range(0, problem.columns, columns_at_once):
            chunk = slice(begin, begin + columns_at_once)
            columns = b[:, chunk] if problem.b_order == "row" else b[chunk].mT
            sums[:, chunk] = compared @ columns.float()
        biases: tuple[Tensor | None, ...] = (None,)
        if problem.bias:
            # Two, used in turns: the library must use the address of each call.
            biases = tuple(integers((problem.rows,), problem.dtype, device, generator) for _ in range(2))
        expected = []
        for bias in biases:
            exact = (sums if bias is None else sums + bias[rows].float()[:, None]).to(problem.out_dtype)
            expected.append(exact if problem.d_order == "row" else exact.mT.contiguous())
    front = out.view(-1)[: problem.rows * problem.columns].view(problem.d_shape)
    return Sample(problem, packed, b, front, biases, rows, tuple(expected))


def integers(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    """Random integers from -2 to 2: products and sums over up to four million of them are exact in fp32."""
    # PyTorch draws no 8-bit floating-point numbers; these integers are exact in each dtype.
    drawn = torch.empty(shape, dtype=torch.float16 if dtype is FP8 else dtype, device=device)
    return drawn.random_(-2, 3, generator=generator).to(dtype)


def keep_two_of_four(matrix: Tensor, generator: torch.Generator, at_once: int) -> None:
    """Zero two random entries in each group of four along the columns, in place; all six patterns occur."""
    patterns = [[not bits >> j & 1 for j in range(GROUP)] for bits in ROW_BITS]
    pruned = torch.tensor(patterns, dtype=torch.bool, device=matrix.device)
    if matrix.dtype is FP8:  # which PyTorch does not mask; its zero is the byte 0
        matrix = matrix.view(torch.uint8)
    for groups in matrix.view(-1, GROUP).split(max(1, at_once // GROUP)):
        pattern = torch.randint(len(ROW_BITS), (len(groups),), device=matrix.device, generator=generator)
        groups.masked_fill_(pruned[pattern], 0)


def _spread(count: int, wanted: int, device: torch.device) -> Tensor:
    """Up to `wanted` row numbers, evenly spread over `count` rows, the first and the last among them."""
    return torch.linspace(0, count - 1, min(count, wanted), dtype=torch.float64, device=device).round().long()


def _rows_of(problem: Problem, out: Tensor, rows: Tensor) -> Tensor:
    """The given rows of D as a copy, stored as D is."""
    return out.index_select(0 if problem.d_order == "row" else 1, rows)
