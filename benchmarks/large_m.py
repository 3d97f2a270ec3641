"""Products of many tokens, whole and in chunks: whether the library's speed holds at large M.

Each product is y = x W^T, timed alone with its operands made beforehand: rounding and packing do not count. Sparse ones
run the fastest right algorithm for their number of tokens; in chunks, that for a chunk. Where the time per token stays
the same from row to row, nothing collapses.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.table import Table
from benchmarks.timing import device, interleaved
from semisparse import ops, tuning
from semisparse.gemm import dispatch
from semisparse.gemm import problem as problems
from semisparse.gemm.autotune.autotuner import Autotuner
from semisparse.gemm.chunks import CHUNK, can_be_cut, pieces
from semisparse.gemm.engine import engine
from semisparse.gemm.operands import Operands
from semisparse.gemm.problem import Problem
from semisparse.ops import fp8

SHAPES = ((131072, 4096, 11008),)
"""Largest M x K x N; smaller M are halves, down to a sixteenth."""

BF16 = torch.bfloat16
DENSE, SPARSE, DENSE_FP8, SPARSE_FP8 = "dense bf16", "2:4", "dense fp8", "fp8 + 2:4"
IN_CHUNKS = "in chunks"
NOTE = (
    f"Microseconds of the product y = x W^T per 1000 tokens; *{IN_CHUNKS}*: of {CHUNK} tokens. Less is better, and the "
    "same in each row means that the speed holds. Dense is timed beside 2:4."
)

Call = Callable[[], object]
Result = dict[str, Any]


def sizes(most: int) -> list[int]:
    """Token counts in powers of two up to most."""
    return [most >> shift for shift in (4, 3, 2, 1, 0)]


def benchmark(tokens: Sequence[int], in_features: int, out_features: int, rounds: int, chunk: int = CHUNK) -> Result:
    """Time every product at every number of tokens.

    Args:
        tokens: Each M, multiples of 16.
        in_features: K.
        out_features: N.
        rounds: Interleaved blocks per product.
        chunk: Tokens per piece.

    Returns:
        By number of tokens: times, microseconds per 1000 tokens, and how the library runs the sparse products.
    """
    times: dict[str, dict[str, dict[str, Any]]] = {}
    chosen: dict[str, dict[str, str]] = {}
    weight = torch.randn(out_features, in_features, device=device(), dtype=BF16) * 0.02
    never_cut = Autotuner(engine(), None, chunk=2**31)  # without the store, whose choices may be in chunks
    for count in tokens:
        x, out = (torch.randn(count, size, device=device(), dtype=BF16) for size in (in_features, out_features))
        calls: dict[str, Call] = {DENSE: partial(torch.mm, x, weight.mT, out=out)}
        asked = problems.forward(count, out_features, in_features, BF16)
        packed = ops.pack(weight, BF16, "transposable")[0]
        products = {SPARSE: (asked, Operands(packed, x, out))}
        if device() != "cuda" or torch.cuda.get_device_capability() >= (8, 9):
            x8, _, _ = fp8.quantise(x, True, False)
            weight8, _, _ = fp8.quantise(weight, True, False)
            packed = ops.pack_fp8(weight, "transposable", None)[0]
            calls[DENSE_FP8] = partial(ops.fp8_dense_product, x8, weight8, BF16)
            asked = problems.fp8_forward(count, out_features, in_features, BF16)
            products[SPARSE_FP8] = asked, Operands(packed, x8, out)
        chosen[str(count)] = {}
        for name, (asked, given) in products.items():
            choice = dispatch.multiply(asked, given, partial(_unpacked, asked))  # as the library itself runs it
            chosen[str(count)][name] = str(choice)
            calls[name] = partial(_run, never_cut, asked, given, None)
            if can_be_cut(asked, chunk):
                calls[f"{name} {IN_CHUNKS}"] = partial(_run, never_cut, asked, given, chunk)
        found = interleaved(calls, rounds=rounds)
        times[str(count)] = {name: timing.as_dict() for name, timing in found.items()}
    return {
        "kn": [in_features, out_features],
        "chunk": chunk,
        "times_ms": times,
        "us_per_1000_tokens": {
            count: {name: 1e6 * timing["median_ms"] / int(count) for name, timing in found.items()}
            for count, found in times.items()
        },
        "chosen": chosen,
        "tuning": tuning.state(),
    }


def table(results: Sequence[Result]) -> Table:
    """A line per shape, a column per product."""
    found = {
        (count, *map(str, result["kn"])): per_token
        for result in results
        for count, per_token in result["us_per_1000_tokens"].items()
    }
    names = list(dict.fromkeys(name for per_token in found.values() for name in per_token))
    names.sort(key=lambda name: ("fp8" in name, SPARSE in name, IN_CHUNKS in name))
    lines = [
        (" x ".join(mkn), *(f"{per_token[name]:.1f}" if name in per_token else "" for name in names))
        for mkn, per_token in found.items()
    ]
    notes = [
        f"{count} tokens, K x N = {' x '.join(map(str, result['kn']))}, {name}: {how}"
        for result in results
        for count, chosen in result["chosen"].items()
        for name, how in chosen.items()
        if IN_CHUNKS in how
    ]
    return Table(("M x K x N", *names), tuple(lines), tuple(notes))


def _run(tuner: Autotuner, asked: Problem, operands: Operands, chunk: int | None) -> None:
    """The sparse product, whole or in chunks; masked dense without a GPU, where nothing is measured."""
    backend = "cusparselt" if device() == "cuda" else "auto"
    for part, given in pieces(asked, operands, chunk):
        dispatch.multiply(part, given, partial(_unpacked, part), backend, tuner=tuner)


def _unpacked(asked: Problem, packed: Tensor) -> Tensor:
    if asked.dtype is BF16:
        return ops.unpack(packed, asked.rows, asked.reduction, BF16)
    return ops.unpack_fp8(packed, asked.rows, asked.reduction)
