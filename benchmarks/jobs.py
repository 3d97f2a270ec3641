"""The registry of benchmarks: every result file by name, how to measure it and how to print it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import (
    compare,
    compare_tables,
    eager_linear,
    end_to_end,
    fp8_kernels,
    fp8_tables,
    host,
    host_parts,
    host_tables,
    large_m,
    linear,
    metrics,
    neighbours,
    noise,
    pack,
    planned,
    power,
    step_profile,
    tables,
    tuned,
)
from benchmarks.models import GAINS, NO_GAIN
from benchmarks.planned_models import PLANNED
from benchmarks.table import Table

Result = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One result file.

    Attributes:
        name: Of the file, without its ending.
        kind: Of the result; cards are drawn by it.
        measure: Runs the benchmark.
        show: Tables of the result, headline first.
    """

    name: str
    kind: str
    measure: Callable[[], Result]
    show: Callable[[Result], Sequence[Table]]


def packing(rounds: int, toy: bool) -> Iterator[Job]:
    """The pack kernel alone, then all packs of a model together."""
    for n, k in pack.TOY_SHAPES if toy else pack.SHAPES:
        yield Job(
            f"pack-{n}x{k}", "pack", lambda n=n, k=k: pack.benchmark(n, k, rounds), lambda found: [tables.pack([found])]
        )
    yield Job(
        "pack-together",
        "pack-together",
        lambda: pack.together(rounds, toy),
        lambda found: [host_tables.pack_together([found])],
    )


def hosts(rounds: int | None, toy: bool) -> Iterator[Job]:
    """Host time of small layers, then where that of one layer goes."""
    count = rounds or host.ROUNDS
    yield Job("host-time", "host", lambda: host.benchmark(count, toy), lambda found: [host_tables.host_time(found)])
    yield Job(
        "host-parts", "host-parts", lambda: host_parts.benchmark(count, toy), lambda found: [host_tables.parts(found)]
    )


def eager_layers(shapes: Sequence[tuple[int, int, int]], rounds: int, toy: bool) -> Iterator[Job]:
    """Single eager linears, packing at each forward and per step."""
    for mkn in shapes or (linear.TOY_SHAPES if toy else eager_linear.SHAPES):
        yield Job(
            f"eager-linear-{'x'.join(map(str, mkn))}",
            "eager-linear",
            lambda mkn=mkn: eager_linear.benchmark(*mkn, rounds),
            lambda found: [host_tables.eager_linear([found])],
        )


def following(cards: Sequence[str], rounds: int, toy: bool) -> Iterator[Job]:
    """What MaskMetrics costs beside a step."""
    for card in cards or ["llama"]:
        yield Job(
            f"metrics-{card}",
            "metrics",
            lambda card=card: metrics.benchmark(card, rounds, toy),
            lambda found: [tables.metrics([found])],
        )


def layers(shapes: Sequence[tuple[int, int, int]], rounds: int, toy: bool) -> Iterator[Job]:
    """Single linear layers, with their parts."""
    for mkn in shapes or (linear.TOY_SHAPES if toy else linear.SHAPES):
        yield Job(
            f"linear-{'x'.join(map(str, mkn))}",
            "linear",
            lambda mkn=mkn: linear.benchmark(*mkn, rounds),
            lambda found: [tables.linear_summary([found]), tables.linear_variants(found), tables.linear_parts(found)],
        )


def steps(cards: Sequence[str], rounds: int, toy: bool) -> Iterator[Job]:
    """Whole training steps: those that gain, unless others are named."""
    for card in cards or GAINS:
        yield Job(
            card,
            "end-to-end",
            lambda card=card: end_to_end.benchmark(card, rounds, toy),
            lambda found: [tables.models([found]), tables.end_to_end([found])],
        )


def compared(
    cards: Sequence[str], shapes: Sequence[tuple[int, int, int]], rows: Sequence[str], rounds: int, toy: bool
) -> Iterator[Job]:
    """Rows beside each other: single layers, then whole steps. Named ones alone, if there are."""
    named = bool(cards or shapes)
    # A run without sparse products has files of its own beside that with them.
    end = "" if any(compare.ROWS[name].sparse for name in rows) else "-float8"
    for mkn in shapes or (() if named else linear.TOY_SHAPES if toy else linear.SHAPES):
        yield Job(
            f"compare-linear-{'x'.join(map(str, mkn))}{end}",
            "compare-linear",
            lambda mkn=mkn: compare.linear(*mkn, rows, rounds),
            lambda found: [
                compare_tables.linears([found]),
                *([compare_tables.parts([found])] if found["parts"] else []),
            ],
        )
    for card in cards or (() if named else compare.MODELS):
        yield Job(
            f"compare-{card}{end}",
            "compare-model",
            lambda card=card: compare.model(card, rows, rounds, toy),
            lambda found: [compare_tables.models([found])],
        )


def between(
    shapes: Sequence[tuple[int, int, int]], rows: Sequence[str] | None, rounds: int, toy: bool
) -> Iterator[Job]:
    """Compiled layers between pointwise operations."""
    for mkn in shapes or (linear.TOY_SHAPES if toy else neighbours.SHAPES):
        yield Job(
            f"neighbours-{'x'.join(map(str, mkn))}",
            "neighbours",
            lambda mkn=mkn: neighbours.benchmark(*mkn, rows or neighbours.ROW_NAMES, rounds),
            lambda found: [fp8_tables.neighbours([found])],
        )


def many_tokens(shapes: Sequence[tuple[int, int, int]], rounds: int, toy: bool) -> Iterator[Job]:
    """Products whole and in chunks, up to each shape's tokens."""
    for most, k, n in shapes or (((64, 64, 128),) if toy else large_m.SHAPES):
        chunk = {"chunk": most // 4} if toy else {}
        tokens = large_m.sizes(most)[2 if toy else 0 :]
        yield Job(
            f"large-m-{k}x{n}",
            "large-m",
            lambda tokens=tokens, k=k, n=n, chunk=chunk: large_m.benchmark(tokens, k, n, rounds, **chunk),
            lambda found: [large_m.table([found])],
        )


def noises(shapes: Sequence[tuple[int, int, int]], toy: bool) -> Iterator[Job]:
    """What rounding to fp8 leaves of a layer's results."""
    for mkn in shapes or (linear.TOY_SHAPES if toy else noise.SHAPES):
        yield Job(
            f"noise-{'x'.join(map(str, mkn))}",
            "noise",
            lambda mkn=mkn: noise.benchmark(*mkn),
            lambda found: [fp8_tables.noise([found])],
        )


def fp8_passes(rounds: int, toy: bool) -> Iterator[Job]:
    """The passes of fp8 over tensors."""
    for mn in fp8_kernels.TOY_SHAPES if toy else fp8_kernels.SHAPES:
        yield Job(
            f"fp8-kernels-{'x'.join(map(str, mn))}",
            "fp8-kernels",
            lambda mn=mn: fp8_kernels.benchmark(*mn, rounds),
            lambda found: [fp8_tables.kernels([found])],
        )


def profiles(cards: Sequence[str], rows: Sequence[str] | None, toy: bool) -> Iterator[Job]:
    """Where the milliseconds of a step go."""
    for card in cards or ["llama-4096"]:
        yield Job(
            f"profile-{card}",
            "profile",
            lambda card=card: step_profile.benchmark(card, rows or step_profile.ROW_NAMES, toy),
            lambda found: [fp8_tables.profile(found)],
        )


def plans(cards: Sequence[str], rounds: int, toy: bool) -> Iterator[Job]:
    """Predicted against measured steps: all models that plans are judged on, unless some are named."""
    for card in cards or PLANNED:
        yield Job(
            f"plan-{card}",
            "plan",
            lambda card=card: planned.benchmark(card, rounds, toy),
            lambda found: [planned.table([found])],
        )


def powers(toy: bool) -> Iterator[Job]:
    """What a process's first sparse product changes."""
    yield Job("power", "power", lambda: power.benchmark(toy), lambda found: [power.table([found])])


def tunings(shapes: Sequence[tuple[int, int, int]], toy: bool) -> Iterator[Job]:
    """Tuning of common linear shapes, for the table that ships."""
    asked = shapes or (linear.TOY_SHAPES if toy else tuned.SHAPES)
    yield Job("tuned-layers", "tuned", lambda: tuned.benchmark(asked), lambda found: [tuned.table([found])])


def no_gain(cards: Sequence[str], shapes: Sequence[tuple[int, int, int]], rounds: int, toy: bool) -> Iterator[Job]:
    """Where 2:4 does not help: small layers, then whole steps without a gain. Named ones alone, if there are."""
    named = bool(cards or shapes)
    for mkn in shapes or (() if named else linear.TOY_SHAPES if toy else linear.SMALL_SHAPES):
        yield Job(
            f"small-linear-{'x'.join(map(str, mkn))}",
            "small-linear",
            lambda mkn=mkn: linear.small(*mkn, rounds),
            lambda found: [tables.small_linear([found])],
        )
    if cards or not named:
        yield from steps(cards or NO_GAIN, rounds, toy)
