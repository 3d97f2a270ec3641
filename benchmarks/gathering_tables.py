"""The table of docs/distributed.md: bytes and times of FSDP2 with and without compressed all-gathers."""

from collections.abc import Sequence
from typing import Any

from benchmarks.origin import origin
from benchmarks.ranks import MODEL
from benchmarks.scaling_tables import SLOW, THROUGH_HOST
from benchmarks.store import load
from benchmarks.table import Table

Result = dict[str, Any]

COMMAND = "NCCL_NVLS_ENABLE=0 torchrun --nproc-per-node 2 -m benchmarks.gathering --out benchmarks/results"
COLUMNS = (
    "tokens per GPU", "layers", "step ms", "dense / this", "gathers ms", "dense / this", "gathered MB", "of dense",
    "reduced MB",
)  # fmt: skip
NOTE = (
    "*gathers*: all blocks gathered once, without computing; a step gathers them about twice. *gathered*, *reduced*: "
    "what each GPU sends per step into all-gathers and into reduce-scatters; of *gathered* the embeddings and the "
    "output head are a part that never shrinks. fp32 master weights, gathered in bf16, fused AdamW, `repack=True` in "
    "16 bits. All variants are interleaved in one process per GPU, dense beside 2:4, which slows it at the power limit."
)


def sent(facts: Result, kind: str) -> float:
    """Megabytes that a GPU sends per step into collectives of a kind."""
    return sum(size for name, size in facts.get("bytes_per_step", {}).items() if name.startswith(kind)) / 1e6


def table(result: Result) -> Table:
    """Each variant of each number of tokens."""
    rows = []
    for one in result["tables"]:
        how = f"{one['tokens_per_rank']:,}, {'compiled' if one['compiled'] else 'eager'}"
        dense = sent(next(iter(one["facts"].values())), "allgather")
        for name, facts in one["facts"].items():
            times = (one[kind][name] for kind in ("step", "gather"))
            timed = (text for time in times for text in (f"{time['median_ms']:.1f}", f"{time['ratio']:.2f}"))
            gathered, reduced = sent(facts, "allgather"), sent(facts, "reduce_scatter")
            counted = (f"{gathered:,.0f}", f"{gathered / dense:.2f}", f"{reduced:,.0f}") if dense else ("", "", "")
            rows.append((how, name, *timed, *counted))
    return Table(COLUMNS, tuple(rows))


def model_of(results: Sequence[Result]) -> str:
    """What was trained."""
    sizes = f"{MODEL.depth} layers of {MODEL.width}/{MODEL.hidden}"
    return f"A Llama-style model of {sizes} on {results[0]['ranks']} GPUs of one host."


def block() -> str:
    """For docs/distributed.md: over direct links, then through the host's memory."""
    results = load("gathering")
    if not results:
        return f"Not measured yet: `{COMMAND}`."
    direct, slow = ([one for one in results if (SLOW in one["nccl"]) == found] for found in (False, True))
    parts = [model_of(results), *(table(one).markdown() for one in direct)]
    if slow:
        parts += [THROUGH_HOST, *(table(one).markdown() for one in slow)]
    measured = origin(results, f"{results[0]['ranks']} of one host, each an")
    return "\n\n".join([*parts, NOTE, f"{measured} Remake: `{COMMAND}`."])
