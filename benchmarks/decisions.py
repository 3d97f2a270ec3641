"""What plans decided on named models, and what it was worth: tables of docs/plan.md and README, from plan-*.json.

Where a plan swaps no layer, its model is the dense one, timed once more: what that differs by is how exact the row is.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from benchmarks.origin import gpu, short_origin
from benchmarks.planned import DENSE, EVERY, PLAN, table
from benchmarks.table import Table
from benchmarks.tables import TIMED_BESIDE, beside_note, dense_ms, is_fresh

Result = dict[str, Any]

NOTE = (
    "Whole training steps with optimizer, all variants of a model interleaved in one process; figures are dense time / "
    "this time: with sparse products to dense before any ran in the process, unless it is marked. *planned*: "
    "`plan.apply(model)`; where that swaps no layer, the dense model once more, to dense beside it, which shows how "
    "exact the row is. *all NAME*: every selected layer swapped, whatever the plan says."
)
HOST = (
    "*error*: predicted / measured - 1, of the planned step. *host loop*: shortest, median and longest time of a loop "
    "in Python that always does the same, timed 80 times around the model's blocks: a step that the host bounds cannot "
    "be known better than the host is steady."
)
_COLUMNS = ("model, compiled where it does not say eager", "dense ms", "planned", *(f"all {name}" for name in EVERY))


def text(results: Sequence[Result]) -> str:
    """What plans decided, and why layers stay dense."""
    why = reasons(results)
    listed = ["Why layers stay dense, as the plans say:", why] if why else []
    return "\n\n".join([NOTE, decided(results).markdown(), HOST, exactness(results).markdown(), *listed])


def decided(results: Sequence[Result]) -> Table:
    """Every model: what the plan swaps, and what that and swapping everything are worth; the GPU, where they differ."""
    several = len({gpu(result) for result in results}) > 1
    rows = tuple(
        (*_figures(result), swapped(result), *([gpu(result)] if several else [])) for result in _in_order(results)
    )
    return Table((*_COLUMNS, "swapped", *(["GPU"] if several else [])), rows, beside_note(rows))


def left_dense(results: Sequence[Result]) -> str:
    """The models of which plans swap nothing, and what swapping everything would be; "" without plans."""
    dense = [result for result in _in_order(results) if _swaps_nothing(result)]
    gaining = [result for result in _in_order(results) if not _swaps_nothing(result)]
    gains = "; ".join(f"{result['label']} ({result['ratio_to_dense'][PLAN]:.2f})" for result in gaining[:3])
    losses = "; ".join(_losses(dense))
    sentences = []
    if dense:
        everything = " and in ".join(EVERY)
        told = "Plans of whole models left these dense; in brackets, dense time / time with every layer in"
        sentences.append(f"{told} {everything}: {losses}.")
    if gaining:
        sentences.append(f"Plans gained most on {gains}.")
    if not all(map(is_fresh, results)):
        sentences.append(f"{'In older plans' if any(map(is_fresh, results)) else 'For these ratios'}, {TIMED_BESIDE}")
    return " ".join([*sentences, short_origin(results)]) if results else ""


def exactness(results: Sequence[Result]) -> Table:
    """Every model: the planned step as predicted and measured, and how steady the host was, where that is known."""
    rows = []
    for result in _in_order(results):
        measured = result["times_ms"][PLAN]
        loops = sorted(ms for found in result.get("host_loop_ms", ()) for ms in found)
        steady = f"{loops[0]:.1f} / {loops[len(loops) // 2]:.1f} / {loops[-1]:.1f} ms" if loops else ""
        times = f"{result['predicted_ms']:.1f}", f"{measured['median_ms']:.1f}"
        spread = f"{measured['p20_ms']:.1f} to {measured['p80_ms']:.1f}"
        rows.append((result["label"], *times, spread, f"{100 * result['error']:+.1f} %", steady))
    return Table(("model", "predicted ms", "measured ms", "p20 to p80", "error", "host loop"), tuple(rows))


def avoided(results: Sequence[Result]) -> Table:
    """The models on which swapping every layer loses, at least in one way."""
    losing = [result for result in _in_order(results) if any(ratio < 1 for ratio in _everything(result))]
    rows = tuple((*_figures(result), gpu(result)) for result in losing)
    return Table((*_COLUMNS, "GPU"), rows, beside_note(rows))


def reasons(results: Sequence[Result]) -> str:
    """Why layers stay dense, as the plans say, a line per model; nothing of layers that no plan would swap."""
    lines = []
    for result in _in_order(results):
        whys = Counter(row["why"] for row in result["plan"]["rows"] if row["times"] and row["choice"] == DENSE)
        if whys:
            said = "; ".join(f"{count}x {why}" for why, count in whys.most_common(3))
            lines.append(f"- {result['label']}: {said}.")
    return "\n".join(lines)


def printed(results: Sequence[Result]) -> str:
    """Each plan as it prints itself, below what was predicted and measured."""
    pages = []
    for result in _in_order(results):
        pages += [f"## {result['label']}", table([result]).markdown(), f"```text\n{result['printed']}\n```"]
    return "\n\n".join(pages)


def swapped(result: Result) -> str:
    """How many layers a plan swaps, by candidate; of how many that it could, where it leaves some dense."""
    rows = [row for row in result["plan"]["rows"] if row["times"]]
    chosen = Counter(row["choice"] for row in rows if row["choice"] != DENSE)
    named = ", ".join(f"{count} {name.replace(' + ', '+')}" for name, count in chosen.most_common())
    return f"{named or 'none'} of {len(rows)}" if chosen.total() < len(rows) else named


def _figures(result: Result) -> tuple[str, ...]:
    ratios = result["ratio_to_dense"]
    planned = f"dense ({ratios[PLAN]:.2f})" if _swaps_nothing(result) else f"**{ratios[PLAN]:.2f}**"
    everything = (f"**{ratios[name]:.2f}**" if name in ratios else "" for name in (f"all {one}" for one in EVERY))
    return (result["label"], dense_ms(result, DENSE, 1), planned, *everything)


def _swaps_nothing(result: Result) -> bool:
    return all(row["choice"] == DENSE for row in result["plan"]["rows"])


def _losses(dense: Sequence[Result]) -> list[str]:
    """A text per model: its setups in which everything stays dense, each named by what it differs in from the first."""
    told: dict[str, list[str]] = {}
    heads: dict[str, list[str]] = {}
    for result in dense:
        parts = str(result["label"]).split(", ")
        parts += [] if parts[-1] in ("eager", "compiled") else ["compiled"]
        head = heads.setdefault(parts[0], parts)
        own = parts if head is parts else [*(part for part in parts[:-1] if part not in head), parts[-1]]
        told.setdefault(parts[0], []).append(f"{', '.join(own)} ({_lost(result)})")
    return [", ".join(setups) for setups in told.values()]


def _lost(result: Result) -> str:
    return ", ".join(f"{ratio:.2f}" for ratio in _everything(result))


def _everything(result: Result) -> list[float]:
    return [ratio for name, ratio in result["ratio_to_dense"].items() if name.startswith("all ")]


def _in_order(results: Sequence[Result]) -> list[Result]:
    """The model that gains most first, those that stay dense last, by what swapping everything would cost."""

    def worth(result: Result) -> tuple[bool, float]:
        nothing = _swaps_nothing(result)
        return nothing, -max(_everything(result)) if nothing else -result["ratio_to_dense"][PLAN]

    return sorted(results, key=worth)
