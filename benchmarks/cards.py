"""Cards, and the figures of README and docs, generated from benchmarks/results. A test compares; run after each result.

python benchmarks/cards.py

A page holds marked places, <!-- generated: NAME --> ... <!-- end -->, which are filled with the block of that name.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the file runs as a script from anywhere

from benchmarks import (
    accuracy_cards,
    bench_cards,
    compare_tables,
    decisions,
    fp8_tables,
    fresh_tables,
    gathering_tables,
    host_tables,
    large_m,
    picture,
    power,
    scaling_tables,
    schedule_cards,
    tables,
    time_to_loss_cards,
)
from benchmarks.blocks import filled
from benchmarks.launches import launch_note
from benchmarks.models import CARDS as MODELS
from benchmarks.models import NO_GAIN
from benchmarks.origin import gpu, origin, short_origin
from benchmarks.store import CARDS, ROOT, load
from benchmarks.table import Table
from semisparse_lab.report import differences

PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("speed", "accuracy", "recipes", "plan", "cards", "distributed")),
)
COMMAND = "python benchmarks/benchmark_semi_structured_training.py"
PLANS = "; ".join(f"SECONDS_LIMIT=6000 bash benchmarks/runs/plans_{mode}.sh OUT" for mode in ("compiled", "eager"))
FRESH = "bash benchmarks/runs/fresh.sh OUT"
"""Each of its names has a process of its own, so that dense is timed before anything sparse."""

RATIOS = (
    "Ratios are dense time / 2:4 time, with optimizer step where there is one; above 1, 2:4 is faster. *each*: the "
    "weight is packed at each forward, the default. *per step*: all weights are packed together once per step "
    '(`pack="per_step"`), and this is part of the step.'
)
PARTS = (
    "Where the host time of one eager layer goes that packs at each forward. Each part is timed by itself, with warm "
    "caches; what they do not add up to is given as not covered."
)
TOGETHER = (
    "All linears of the model packed by `PackedWeights.pack()`, sustained, by CUDA events. Ideal is the time in which "
    "the same bytes are read and written at the rate of the large weight's pack in the same run."
)
Result = dict[str, Any]


def linear_card(result: Result) -> str:
    """Every variant and part of one linear benchmark."""
    shape = ",".join(map(str, result["mkn"]))
    return _page(
        f"One linear layer, M x K x N = {tables.size(result['mkn'])}",
        tables.linear_summary([result]).markdown(),
        "Forward + backward, bf16 parameters with bias, gradients set to None before each call, packing included. "
        f"Variants interleaved in one process, sustained. {tables.limit_note([result])}",
        tables.linear_variants(result).markdown(),
        tables.linear_parts(result).markdown(),
        origin([result]),
        f"Remake: `{COMMAND} --linear --mkn {shape} --save`",
    )


def end_to_end_card(result: Result) -> str:
    """One whole training step."""
    names = {"dense": "dense", "sparse": "packing at each forward", "per step": "packing per step"}
    times = [f"{names[kind]} {time['p20_ms']:.1f} to {time['p80_ms']:.1f} ms" for kind, time in _known_times(result)]
    saved = ", ".join(f"{shape}: {ms:.2f} ms" for shape, ms in result.get("saved_by_products_ms", {}).items())
    products = f" The products of these layers save, packing not counted ({saved} by N x K)." if saved else ""
    return _page(
        result["title"],
        tables.models([result]).markdown(),
        tables.end_to_end([result]).markdown(),
        f"p20 to p80: {', '.join(times)}. {result['swapped']} linears are 2:4.{products}",
        launch_note([result]),
        tables.limit_note(load("linear")) if result.get("limit") else "",
        result["note"],
        origin([result]),
        f"Remake: `{COMMAND} --card {result['card']} --save`",
    )


def _known_times(result: Result) -> list[tuple[str, dict[str, float]]]:
    return [(kind, time) for kind, time in result["times_ms"].items() if kind in tables.STEPS]


def models_card() -> str:
    """Every whole step and the eager single layers, packing at each forward and per step."""
    steps, layers = all_steps(), load("eager-linear")
    return _page(
        "Models: packing at each forward and per step",
        RATIOS,
        tables.models(steps).markdown() if steps else "",
        _sentences(origin(steps), launch_note(steps)),
        f"Remake: {_card_commands(steps)}.",
        "One eager linear layer, forward + backward, bf16 with bias:" if layers else "",
        host_tables.eager_linear(layers).markdown() if layers else "",
        _sentences(origin(layers), launch_note(layers), f"Remake: `{_fresh('eager-*')}`.") if layers else "",
    )


def host_card() -> str:
    """Host time of small layers, and where it goes."""
    stacks, layers = load("host"), load("host-parts")
    return _page(
        "Host time",
        *[f"{_stack(result)}\n\n{host_tables.host_time(result).markdown()}" for result in stacks],
        *[f"{PARTS}\n\n{host_tables.parts(result).markdown()}" for result in layers],
        _sentences(origin([*stacks, *layers]), launch_note([*stacks, *layers])),
        f"Remake: `{COMMAND} --host --save`",
    )


def _stack(result: Result) -> str:
    """What was called, in words."""
    stack = result["stack"]
    return (
        f"{stack['layers']} layers {stack['in_features']} x {stack['out_features']}, {stack['tokens']} tokens, bf16, "
        f"no bias where none is named: time to issue one iteration, per layer, median of {result['rounds']} rounds in "
        "which all variants take turns. The forward records gradients. The ratio is taken round by round. *in C++*: "
        "products of one iteration that the native library started, sparse ones where nothing else is said."
    )


def no_gain_card() -> str:
    """Where 2:4 does not help: whole steps, then single layers."""
    steps, small = no_gain_steps(), load("small-linear")
    return _page(
        "Where 2:4 does not help",
        "Dense and 2:4 interleaved in one process, sustained, and dense before anything sparse ran, where it is not "
        "marked; a ratio below 1 means that 2:4 is slower. The spread is that over the interleaved rounds.",
        tables.models(steps).markdown() if steps else "",
        tables.end_to_end(steps).markdown() if steps else "",
        "One linear layer, forward + backward with its packing, bf16:",
        tables.small_linear(small).markdown() if small else "",
        origin([*steps, *small]),
        f"Remake: `{_fresh(*NO_GAIN, 'small-*')}`",
    )


def pack_card() -> str:
    """The pack kernel at all its sizes."""
    results, together = packs(), load("pack-together")
    return _page(
        "Packing a weight in both directions, bf16",
        tables.pack(results).markdown(),
        host_tables.pack_together(together).markdown() if together else "",
        TOGETHER if together else "",
        "Cold L2 cache, calls replayed from a CUDA graph. The copy moves as many bytes as packing does; the tile op is "
        "`torch._sparse_semi_structured_tile`.",
        origin([*results, *together]),
        f"Remake: `{COMMAND} --pack --save`",
    )


def compare_card() -> str:
    """Dense, float8, 2:4 and 2:4 with a sampled gradient, layers and models."""
    return _page("Dense, float8, 2:4, a sampled gradient and fp8", _compare_block())


def metrics_card() -> str:
    """The cost of following the masks."""
    results = load("metrics")
    return _page(
        "Following the masks: MaskMetrics at its default interval",
        tables.metrics(results).markdown(),
        "The metrics of an interval are two mask computations and one set of statistics for all sparse layers, timed "
        "back to back on their own and compared with the steps of the interval.",
        origin(results),
        f"Remake: `{COMMAND} --metrics --save`",
    )


def all_steps() -> list[Result]:
    """Whole steps in the order of the registry."""
    order = list(MODELS)
    return sorted((one for one in load("end-to-end") if one["card"] in order), key=lambda one: order.index(one["card"]))


def packs() -> list[Result]:
    """Results of the pack kernel, smallest first."""
    return sorted(load("pack"), key=lambda result: result["nk"])


def gaining_steps() -> list[Result]:
    """Whole steps that are here to show a gain."""
    return [result for result in load("end-to-end") if result["card"] not in NO_GAIN]


def _fresh_results() -> list[Result]:
    """Steps and layers that know dense before anything sparse."""
    return [result for kind in fresh_tables.KINDS for result in load(kind) if tables.is_fresh(result)]


def no_gain_steps() -> list[Result]:
    """Whole steps that are here to show where there is none."""
    return [result for result in load("end-to-end") if result["card"] in NO_GAIN]


def blocks() -> dict[str, str]:
    """Name -> text of each generated block of the pages."""
    linear, small, slow = load("linear"), load("small-linear"), no_gain_steps()
    made = {
        "speed": _speed_block(),
        "compare": _compare_block(),
        "no-gain": _no_gain_block([*slow, *small, *linear]),
        "decisions": _text(load("plan"), decisions.text, PLANS),
        "left-dense": decisions.left_dense(load("plan")) or _missing(PLANS),
        "gpus": bench_cards.block(),
        "scaling": scaling_tables.block(),
        "scaling-short": scaling_tables.short(),
        "gathering": gathering_tables.block(),
        "schedules": schedule_cards.block(),
        "models": _models_block(),
        "eager-linear": _block(load("eager-linear"), host_tables.eager_linear, _fresh("eager-*")),
        "host-time": _host_block(),
        "limit": tables.limit_note(linear),
        "linear": _remade(tables.linear_summary(linear).markdown(), linear, _fresh("linear-*")),
        "pack": _remade(tables.pack(packs()).markdown(), packs(), _saved("--pack")),
        "pack-together": _block(load("pack-together"), host_tables.pack_together, _saved("--pack"), TOGETHER),
        "metrics": _remade(tables.metrics(load("metrics")).markdown(), load("metrics"), _saved("--metrics")),
        "neighbours": _block(load("neighbours"), fp8_tables.neighbours, _fresh("neighbours-*"), fp8_tables.BETWEEN),
        "large-m": _block(load("large-m"), large_m.table, _saved("--large-m"), large_m.NOTE),
        "noise": _block(load("noise"), fp8_tables.noise, _saved("--noise"), fp8_tables.NOISE),
        "fp8-kernels": _block(load("fp8-kernels"), fp8_tables.kernels, _saved("--fp8-kernels"), fp8_tables.KERNELS),
        "profile": _text(load("profile"), fp8_tables.profiles, _saved("--profile")),
        "power": _text(load("power"), power.text, _saved("--power")),
        "slowed": _block(_fresh_results(), fresh_tables.table, FRESH, fresh_tables.INTRO),
        "no-gain-all": _block(small, tables.small_linear, _fresh("small-*")),
    }
    return made | accuracy_cards.blocks()


def _speed_block() -> str:
    """Models beside torchao's float8, for README."""
    if not (compared := load("compare-model")):
        return _missing(_fresh("compare-*", "float8-*"))
    table = compare_tables.short(compared)
    shown = {row[-1] for row in table.rows}
    measured = short_origin([result for result in compared if gpu(result) in shown])
    return f"{replace(table, notes=()).markdown()}\n\n{_sentences(measured, *table.notes)}"


def _no_gain_block(results: list[Result]) -> str:
    """What plans avoided on whole models, and steps that lose; while there are no plans, layers that lose, too."""
    avoided = decisions.avoided(load("plan"))
    if not avoided.rows:
        return f"{tables.losing(results).markdown()}\n\n{short_origin(results)}"
    planned = f"{avoided.markdown()}\n\n{decisions.NOTE} {short_origin(load('plan'))}"
    planned_cards = {one.get("card") for one in load("plan")}
    steps = [one for one in no_gain_steps() if one["ratio_to_dense"] < 1 and one["card"] not in planned_cards]
    losing = f"Whole steps of models that were not planned:\n\n{tables.losing(steps).markdown()}" if steps else ""
    notes = " ".join(f"{tables.label(one)}: {note}" for one in steps if (note := MODELS[one["card"]].note))
    return "\n\n".join(filter(None, [planned, losing, notes]))


def _compare_block() -> str:
    layers, steps = load("compare-linear"), load("compare-model")
    if not (layers or steps):
        return _missing(_fresh("compare-*", "float8-*"))
    return _remade(compare_tables.text(layers, steps), [*layers, *steps], _fresh("compare-*", "float8-*"))


def _models_block() -> str:
    steps = all_steps()
    table = f"{tables.models(steps).markdown()}\n\n{tables.end_to_end(steps).markdown()}"
    measured = _sentences(origin(steps), launch_note(steps), f"Remake: {_card_commands(steps)}.")
    return f"{RATIOS}\n\n{table}\n\n{measured}"


def _card_commands(steps: list[Result]) -> str:
    return f"`{_fresh(*dict.fromkeys(result['card'] for result in steps))}`"


def _host_block() -> str:
    stacks, layers = load("host"), load("host-parts")
    shown = [f"{_stack(result)}\n\n{host_tables.host_time(result).markdown()}" for result in stacks]
    shown += [f"{PARTS}\n\n{host_tables.parts(result).markdown()}" for result in layers]
    return _remade("\n\n".join(shown), [*stacks, *layers], _saved("--host")) if shown else _missing(_saved("--host"))


def _block(results: list[Result], table: Callable[[list[Result]], Table], command: str, intro: str = "") -> str:
    """A table with what it was measured on; the command alone while there is no result."""
    return _text(results, lambda found: "\n\n".join(filter(None, (intro, table(found).markdown()))), command)


def _text(results: list[Result], text: Callable[[list[Result]], str], command: str) -> str:
    return _remade(text(results), results, command) if results else _missing(command)


def _saved(option: str) -> str:
    return f"{COMMAND} {option} --save"


def _fresh(*names: str) -> str:
    quoted = (f"'{name}'" if "*" in name else name for name in names)
    return f"{FRESH} {' '.join(quoted)}"


def _missing(command: str) -> str:
    return f"Not measured yet: `{command}`."


def _remade(text: str, results: list[Result], command: str) -> str:
    measured = _sentences(origin(results), launch_note(results), f"Remake: `{command}`.")
    return f"{text}\n\n{measured}"


def _sentences(*texts: str) -> str:
    return " ".join(filter(None, texts))


def _page(title: str, *paragraphs: str) -> str:
    return "\n\n".join([f"# {title}", *filter(None, paragraphs)]) + "\n"


def outputs() -> dict[Path, str]:
    """Path -> content of everything that is generated from results as text."""
    made = {_place(result): linear_card(result) for result in load("linear")}
    made |= {_place(result): end_to_end_card(result) for result in gaining_steps()}
    if load("small-linear") or no_gain_steps():
        made[CARDS / "no-gain.md"] = no_gain_card()
    made[CARDS / "models.md"] = models_card()
    if load("host") or load("host-parts"):
        made[CARDS / "host-time.md"] = host_card()
    if load("compare-linear") or load("compare-model"):
        made[CARDS / "compare.md"] = compare_card()
    made[CARDS / "plans.md"] = _page("Plans as they print", _text(load("plan"), decisions.printed, PLANS))
    made |= {CARDS / "pack.md": pack_card(), CARDS / "metrics.md": metrics_card()}
    made |= {**accuracy_cards.cards(), **scaling_tables.cards(), **schedule_cards.cards()}
    return made | filled(PAGES, blocks())


def _place(result: Result) -> Path:
    """Of the card of one result file."""
    return CARDS / f"{Path(result['file']).stem}.md"


def main() -> int:
    for path, text in outputs().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(path.relative_to(ROOT))
    for name, results in accuracy_cards.accuracy().items():
        (CARDS / f"{name}.png").write_bytes(differences.picture(results))
    time_to_loss_cards.write(time_to_loss_cards.results())
    picture.write()
    scaling_tables.write(scaling_tables.by_ranks())
    print(picture.TARGET.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
