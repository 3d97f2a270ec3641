"""A self-check as tables of 80 columns."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from semisparse.planning.candidates import DENSE
from semisparse.selfcheck.contents import Check, Report

if TYPE_CHECKING:
    from rich.console import RenderableType

WIDTH = 80
FIRST = ("layer", "rows x reduction x columns", "variant")
"""Columns that are not wrapped."""

_GIB = 2**30
_FACTS = ("semisparse", "Python", "torch", "CUDA of torch", "driver", "triton", "cuSPARSELt", "native library")


def show_report(report: Report) -> None:
    """Print all that a self-check found.

    Args:
        report: Any.
    """
    out = Console(width=WIDTH, highlight=False, emoji=False, markup=False)
    for block in blocks(report):
        out.print(block)


def blocks(report: Report) -> "Iterable[RenderableType]":
    """Tables and lines in their order.

    Args:
        report: Any.
    """
    yield _machine(report)
    yield "\nNumerics: each path against the specification\n"
    yield _checks(report)
    yield from _rules(report.checks)
    if report.layouts:
        yield "\nPacked formats\n"
        yield _layouts(report)
    if report.layers:
        yield "\nLinear layers M x K x N, bf16, bias, eager, forward + backward, packing included\n"
        yield _layers(report)
        yield from _left_out(report)
    if report.choices:
        yield "\nWhat the autotuner chose for the products of these layers\n"
        yield _choices(report)
    if report.model is not None:
        yield from _model(report)
    yield "\n" + "\n".join(_summary(report))


def _table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    made = Table(box=None, header_style="bold", pad_edge=False)
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", no_wrap=name in (*right, *FIRST))
    return made


def _machine(report: Report) -> Table:
    made = Table(show_header=False, box=None, pad_edge=False)
    if report.gpu is not None:
        gpu = report.gpu
        limit = "" if gpu.power_limit_watts is None else f", limit {gpu.power_limit_watts:.0f} W"
        made.add_row("GPU", f"{gpu.name}, {gpu.architecture}, {gpu.memory_bytes / _GIB:.0f} GiB{limit}")
    else:
        made.add_row("GPU", "none")
    for name in _FACTS:
        if name in report.facts:
            made.add_row(name, report.facts[name])
    made.add_row("started", report.started)
    return made


def _checks(report: Report) -> Table:
    made = _table("path", "", "error", "allowed", "in, or why not", right=("error", "allowed"))
    for check in report.checks:
        why = check.reason if check.outcome != "pass" or check.reason else check.where
        made.add_row(check.name, check.outcome, _figure(check.error), _figure(check.allowed), why)
    return made


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _rules(checks: Iterable[Check]) -> Iterable[str]:
    """What is allowed, once for all paths that share it."""
    rules: dict[str, list[str]] = {}
    for check in checks:
        if check.rule:
            rules.setdefault(check.rule, []).append(check.name)
    if rules:
        yield "\nAllowed:"
    for rule, names in rules.items():
        yield f"- {'; '.join(names)}: {rule}."


def _layouts(report: Report) -> Table:
    made = _table("values", "layout", "packed by", "reason")
    for layout in report.layouts:
        made.add_row(layout.dtype, layout.outcome, layout.packer, layout.reason)
    return made


def _layers(report: Report) -> Table:
    figures = ("ms", "device ms", "host ms", "dense / this")
    made = _table("layer", "", *figures, right=figures)
    for layer in report.layers:
        size, times = layer.problem.size, layer.measurement.times
        for name, one in times.items():
            alone = ("" if value is None else f"{value:.3f}" for value in (one.device_ms, one.host_ms))
            made.add_row(size, name, f"{one.ms:.3f}", *alone, f"{times[DENSE].ms / one.ms:.2f}")
            size = ""
    return made


def _left_out(report: Report) -> Iterable[str]:
    """Candidates without times, one line for each reason."""
    whys: dict[tuple[str, str], list[str]] = {}
    for layer in report.layers:
        for name, why in layer.measurement.dropped.items():
            whys.setdefault((name, why), []).append(layer.problem.size)
    for (name, why), sizes in whys.items():
        yield f"{name}: {why} ({'; '.join(sizes)})"


def _choices(report: Report) -> Table:
    figures = ("sparse us", "dense us")
    made = _table("rows x reduction x columns", "dtype", "choice", *figures, "source", right=figures)
    for key, choice in report.choices:
        sampling = choice.decides == "sampling"
        names = ("out_features", "tokens", "in_features") if sampling else ("rows", "reduction", "columns")
        size = " x ".join(str(key.get(name, "?")) for name in names)
        if sampling:
            what = "dW dense" if choice.algorithm is None else "dW sampled"
        else:
            what = "dense" if choice.algorithm is None else f"algorithm {choice.algorithm} {choice.way}".rstrip()
        times = ("" if us is None else f"{us:.0f}" for us in (choice.sparse_us, choice.dense_us))
        made.add_row(size, str(key.get("dtype", "?")), what, *times, choice.source)
    return made


def _model(report: Report) -> "Iterable[RenderableType]":
    model = report.model
    assert model is not None
    yield f"\n{model.title}, {model.mode}\n"
    if model.why_eager:
        yield f"Not compiled: {model.why_eager}\n"
    made = _table("variant", "ms", "dense / this", right=("ms", "dense / this"))
    for name, ms in model.ms.items():
        made.add_row(name, f"{ms:.2f}", f"{model.ms[DENSE] / ms:.3f}" if DENSE in model.ms else "")
    yield made
    for name, why in model.dropped.items():
        yield f"{name}: {why}"


def _summary(report: Report) -> Iterable[str]:
    counts = {outcome: sum(check.outcome == outcome for check in report.checks) for outcome in ("pass", "skipped")}
    failed = sum(check.failed for check in report.checks)
    yield f"Numerics: {counts['pass']} right, {failed} wrong, {counts['skipped']} skipped."
    for part in report.parts:
        if part.outcome != "done":
            yield f"{part.name}: {part.outcome}: {part.reason}"
    if not report.layers and report.model is None:
        yield "Nothing was timed."
