"""Dense bf16, torchao float8 and the modes of 2:4 and fp8 beside each other: single linears and whole steps.

All rows run in one process, interleaved and sustained; dense also before anything sparse, which slows the rest of the
process (fresh.py): rows with sparse products are compared with that, the others with dense beside them, slowed alike.
Where torchao's row is asked for alone, nothing is slowed.

A single linear is eager, torchao's compiled (eager, its casts are kernels of their own), and each call is also replayed
from a CUDA graph, which removes the host's time. Models are compiled. Pruning, packing, sampling and casting are part
of each call.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from benchmarks import float8, sampling
from benchmarks.eager_linear import packing_first
from benchmarks.end_to_end import LONG, packing_after, seconds
from benchmarks.fresh import fresh_ms
from benchmarks.launches import launches
from benchmarks.linear import inputs, step
from benchmarks.models import CARDS, Card, sparsified
from benchmarks.timing import allocated, captured, device, interleaved, peak_memory, ratio, synchronize
from semisparse import PackedWeights, Phase, SemiSparseLinear, SparseConfig, SparseSchedule, tuning

Call = Callable[[], object]
Errors = dict[str, str]
Memory = dict[str, dict[str, int]]


@dataclass(frozen=True)
class Row:
    """What is compared with dense.

    Attributes:
        title: In tables and result files.
        config: Of the 2:4 layers; None for torchao's.
        per_step: Whether weights are packed once per step, and at each forward otherwise.
    """

    title: str
    config: SparseConfig | None
    per_step: bool = False

    @property
    def sparse(self) -> bool:
        """Whether it has sparse products."""
        return self.config is not None and self.config.prunes


DENSE = "dense bf16"
ROWS = {
    "float8": Row("torchao float8", None),
    "2:4": Row("2:4", SparseConfig()),
    "mvue": Row("2:4 + mvue", SparseConfig(grad_output="mvue")),
    "mvue-repack": Row("mvue, repacked", SparseConfig(grad_output="mvue", repack=True)),
    "fp8": Row("dense fp8", SparseConfig(weight=None, precision="fp8")),
    "fp8-2:4": Row("fp8 + 2:4", SparseConfig(precision="fp8")),
    "fp8-mvue": Row("fp8 + 2:4 + mvue", SparseConfig(precision="fp8", grad_output="mvue")),
    "2:4-per-step": Row("2:4, per step", SparseConfig(), True),
    "mvue-per-step": Row("2:4 + mvue, per step", SparseConfig(grad_output="mvue"), True),
}
"""Every row by the name that --rows takes. Dense is always there."""

SPARSE = frozenset(row.title for row in ROWS.values() if row.sparse)
"""Titles of the rows with sparse products."""

DEFAULT_ROWS = ("2:4", "mvue")
EXPECTED_ROWS = ("float8", *DEFAULT_ROWS)
"""Rows that a result should have; what it lacks is named below its table."""

MODELS = ("llama", "llama-4096")


def linear(tokens: int, in_features: int, out_features: int, rows: Sequence[str], rounds: int) -> dict[str, Any]:
    """Forward and backward of one linear layer, bf16 with bias.

    Args:
        tokens: M.
        in_features: K.
        out_features: N.
        rows: Keys of ROWS.
        rounds: Interleaved blocks per row.

    Returns:
        Times, ratios to dense, memory and the errors of torchao; and the parts of the sampled gradient, if a row
        samples.

    Raises:
        MissingPeerError: torchao is asked for and not there.
    """
    forget_compiled()
    x, grad_output = inputs(tokens, in_features, out_features)

    def make(row: Row | None) -> Call:
        layer = layer_of(row, in_features, out_features)
        if row is not None and row.config is None:
            return step(torch.compile(float8.converted(nn.Sequential(layer), ["0"])), x, grad_output)
        call = step(layer, x, grad_output)
        return packing_first(PackedWeights(layer), call) if row is not None and row.per_step else call

    step(nn.Linear(in_features, out_features, device=device(), dtype=torch.bfloat16), x, grad_output)()  # workspaces
    calls, memory, errors, compile_seconds, fresh = _built(rows, make, x)
    for title, call in list(calls.items()):
        _tried(errors, title, f"graph: {title}", lambda title=title, call=call: calls.update(_graph(title, call)))
    found = _compared(calls, rounds, fresh)
    sampled = any(row.config is not None and row.config.grad_output for row in map(ROWS.__getitem__, rows))
    return {
        "mkn": [tokens, in_features, out_features],
        **found,
        **_facts(rows, memory, errors, compile_seconds),
        "parts": sampling.benchmark(x.detach(), grad_output, rounds) if sampled else {},
    }


def model(name: str, rows: Sequence[str], rounds: int, toy: bool = False) -> dict[str, Any]:
    """A whole compiled training step of the named card, with its optimizer step.

    Args:
        name: A key of CARDS.
        rows: Keys of ROWS.
        rounds: Interleaved blocks per row.
        toy: Run at toy size, on any device; the figures mean nothing.

    Returns:
        Times, ratios to dense, memory and the errors of torchao.

    Raises:
        MissingPeerError: torchao is asked for and not there.
        ValueError: The card has no optimizer step, after which seeds advance.
    """
    card = CARDS[name]
    if not card.optimizes:
        raise ValueError(f"card {name} has no optimizer step; compare {', '.join(MODELS)}")
    forget_compiled()
    swapped = sparsified(card, toy)[1].swapped

    def make(row: Row | None) -> Call:
        built = model_of(row, card, swapped, toy)
        whole = card.step(card.compile(built), built, toy)
        if row is None or row.config is None:
            return whole
        if row.per_step:
            return packing_after(whole, built, card)
        return advancing(whole, built) if row.config.grad_output else whole

    x, grad_output = inputs(64, 64, 64)
    step(nn.Linear(64, 64, device=device(), dtype=torch.bfloat16), x, grad_output)()  # workspaces
    calls, memory, errors, compile_seconds, fresh = _built(rows, make)
    facts = {"card": name, "label": card.label, "title": card.title, "swapped": len(swapped)}
    return {**facts, **_compared(calls, rounds, fresh), **_facts(rows, memory, errors, compile_seconds)}


def layer_of(row: Row | None, in_features: int, out_features: int) -> nn.Module:
    """A bf16 linear with bias as a row computes it; nn.Linear for dense, and for torchao before it is converted."""
    factory: dict[str, Any] = {"device": device(), "dtype": torch.bfloat16}
    if row is None or row.config is None:
        return nn.Linear(in_features, out_features, **factory)
    sparse = SemiSparseLinear(in_features, out_features, config=row.config, **factory)
    sparse.held_seed = torch.tensor(1, device=device())  # as a schedule sets it
    return sparse


def model_of(row: Row | None, card: Card, swapped: Sequence[str], toy: bool) -> nn.Module:
    """A card's model as a row computes the layers of these names."""
    if row is not None and row.config is not None:
        return sparsified(card, toy, row.config)[0]
    dense = card.build(toy)
    return dense if row is None else float8.converted(dense, swapped)


def forget_compiled() -> None:
    """Start torch.compile anew: it would make sizes dynamic that changed, and run models from the ninth on eagerly.

    Here are more: blocks of several sizes, each dense and with several settings. Past the limit an error is raised.
    """
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def advancing(whole: Call, built: nn.Module) -> Call:
    """The step with the schedule's, which advances the seeds."""
    schedule = SparseSchedule(built, [Phase("sparse", LONG)])

    def step() -> None:
        whole()
        schedule.step()

    return step


def _built(
    rows: Sequence[str], make: Callable[[Row | None], Call], shared: torch.Tensor | None = None
) -> tuple[dict[str, Call], Memory, Errors, dict[str, float], dict[str, float]]:
    """Each row's call after its first one, its memory, the error of torchao, the seconds of the first call, and dense's
    milliseconds in the fresh process; those of a layer, which has an input that is shared, from a CUDA graph, too.

    torchao comes last: converting a model changes how torch.compile writes code (a patch of its own). The gradient of
    shared, an input of all rows, counts for each of them.
    """
    calls: dict[str, Call] = {}
    memory: Memory = {}
    errors: Errors = {}
    compile_seconds: dict[str, float] = {}

    def build(title: str, row: Row | None) -> None:
        if shared is not None:
            shared.grad = None
        before = allocated()
        call = make(row)
        compile_seconds[title] = seconds(call)
        print(f"{title}: first call took {compile_seconds[title]:.0f} s", file=sys.stderr, flush=True)
        call()
        held = allocated() - before
        memory[title] = {"held": held, "beyond": peak_memory(call)}
        calls[title] = call

    asked = sorted((ROWS[name] for name in rows), key=lambda row: row.config is None)
    build(DENSE, None)
    ways = {DENSE: calls[DENSE]} if shared is None else {DENSE: calls[DENSE], **_graph(DENSE, calls[DENSE])}
    fresh = fresh_ms(ways)
    for row in asked:
        _tried(errors, row.title, row.title, lambda row=row: build(row.title, row))
    return calls, memory, errors, compile_seconds, fresh


def _tried(errors: Errors, title: str, what: str, run: Callable[[], None]) -> None:
    """Run it; an error of torchao's row is a note below the table, not the end of the run."""
    try:
        run()
        synchronize()
    except Exception as error:
        if title != ROWS["float8"].title or isinstance(error, float8.MissingPeerError):
            raise
        errors[what] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _graph(title: str, call: Call) -> dict[str, Call]:
    return {f"graph: {title}": captured(call)}


def _compared(calls: dict[str, Call], rounds: int, fresh: dict[str, float]) -> dict[str, Any]:
    """Times, and how many times faster than dense, called in the same way, each row is."""
    times = interleaved(calls, rounds=rounds)
    ratios = {}
    for name, timing in times.items():
        way, title = ("graph: ", name.removeprefix("graph: ")) if name.startswith("graph: ") else ("", name)
        dense = f"{way}{DENSE}"
        ratios[name] = ratio(times[dense], timing, fresh.get(dense) if title in SPARSE else None)
    return {
        "times_ms": {name: timing.as_dict() for name, timing in times.items()},
        "fresh_ms": fresh,
        "ratio_to_dense": {name: one.median for name, one in ratios.items()},
        "ratio_spread": {name: asdict(one) for name, one in ratios.items()},
    }


def _facts(rows: Sequence[str], memory: Memory, errors: Errors, compile_seconds: dict[str, float]) -> dict[str, Any]:
    return {
        "memory_bytes": memory,
        "first_call_seconds": compile_seconds,
        "left_out": [name for name in EXPECTED_ROWS if name not in rows],
        "errors": errors,
        "torchao": float8.checked_version() if "float8" in rows else None,
        "launches": launches(),
        "tuning": tuning.state(),
    }
