"""A plan as text of 80 columns: layers that are alike are one line."""

import textwrap
import unicodedata

from semisparse.planning.candidates import DENSE
from semisparse.planning.choosing import MARGIN
from semisparse.planning.contents import PlanContents, PlanRow

WIDTH = 80
_GIB = 2**30
_LISTED = 4
"""Names in one line of reasons."""
_FILLER = "\0"
"""Follows each character of two columns while text is laid out, so that its length is its width."""


def shown(plan: PlanContents) -> str:
    """The whole plan.

    Args:
        plan: Any.
    """
    groups = grouped(plan)
    lines = [*_table(plan, groups), "", *sums(plan)]
    whys: dict[str, list[str]] = {}
    for name, rows in groups:
        if rows[0].config is None:
            whys.setdefault(rows[0].why, []).append(name)
    if whys:
        lines += ["", "Stay dense:"]
        lines += [line for why, names in whys.items() for line in _wrapped(f"{why}: {_listed(names)}", "  ")]
    left_out: dict[tuple[str, str], list[str]] = {}
    for name, rows in groups:
        for candidate, why in rows[0].dropped.items():
            if candidate != DENSE:
                left_out.setdefault((candidate, why), []).append(name)
    if left_out:
        lines += ["", "Not measured:"]
        for (candidate, why), names in left_out.items():
            lines += _wrapped(f"{candidate}, {why}: {_listed(names)}", "  ")
    return "\n".join(lines)


def grouped(plan: PlanContents) -> list[tuple[str, list[PlanRow]]]:
    """Rows that are alike but for the numbers in their names, under one name such as blocks.*.fc1 (24).

    Args:
        plan: Any.
    """
    groups: dict[object, list[PlanRow]] = {}
    for row in plan.rows:
        groups.setdefault((_pattern(row.name), row.calls, row.choice, row.why, row.shared is None), []).append(row)
    named = []
    for rows in groups.values():
        name = rows[0].name if len(rows) == 1 else f"{_pattern(rows[0].name)} ({len(rows)})"
        named.append((name or "(root)", rows))
    return named


def sums(plan: PlanContents) -> list[str]:
    """What all layers together are worth, as lines.

    Args:
        plan: Any.
    """
    measured = [row for row in plan.rows if row.times]
    dense = sum(plan.time_of(row.times[DENSE]) for row in measured)
    saved = sum(plan.saving_of(row) for row in plan.rows)
    kind = "alone, as the mode runs them" if plan.host_weight is None else "on the GPU"
    found = f"Linear layers {kind}: {dense:.2f} ms dense, {dense - saved:.2f} ms planned."
    lines = [found if measured else "No linear layer was measured."]
    if plan.step is not None and plan.predicted_ms is not None:
        times = f"{plan.step.ms:.2f} ms dense, {plan.predicted_ms:.2f} ms predicted"
        lines.append(f"Step: {times} ({plan.step.ms / plan.predicted_ms:.2f}x).")
    if plan.host_weight:
        lines.append("The host bounds this step in part: its time was weighed in the choice.")
        lines += _without_the_host(plan, measured)
    if plan.extra_bytes:
        lines.append(f"Kept for the backward beyond dense: {plan.extra_bytes / _GIB:+.2f} GiB.")
    lines.append(f"{len(plan.configs)} of {len(plan.rows)} linear layers are swapped.")
    lines.append(str(plan.packing))
    lines.append(f"Measured in mode {plan.mode} on {plan.machine.get('GPU', 'an unknown GPU')}.")
    return [line for text in (*lines, *plan.remarks) for line in _wrapped(text, "")]


def _without_the_host(plan: PlanContents, measured: list[PlanRow]) -> list[str]:
    """What the GPU alone could save, where that is more than the plan does."""
    fastest = sum(min(times.on_device for times in row.times.values()) for row in measured)
    planned = sum(row.times[row.choice].on_device for row in measured)
    if plan.mode != "eager" or fastest > (1 - MARGIN) * planned:
        return []
    return [
        f"torch.compile or a CUDA graph takes the host out of the way: the layers could then take {fastest:.2f} ms. "
        'Plan with mode="compiled" or mode="graph".'
    ]


def _table(plan: PlanContents, groups: list[tuple[str, list[PlanRow]]]) -> list[str]:
    body = [["layer", "M x K x N", "dense ms", "ms", "choice"]]
    for name, rows in groups:
        row = rows[0]
        sizes = [problem.size.replace(" ", "") for problem, _ in row.calls]
        size = "" if not sizes else sizes[0] if len(sizes) == 1 else f"{sizes[0]}, +{len(sizes) - 1}"
        if row.times:
            dense = sum(plan.time_of(one.times[DENSE]) for one in rows)
            times = [f"{dense:.3f}", f"{dense - sum(plan.saving_of(one) for one in rows):.3f}"]
        else:
            times = ["", ""]
        body.append([_spread(name), size, *times, _spread(row.choice)])
    widths = [max(len(line[column]) for line in body) for column in range(5)]
    widths[4] = min(widths[4], max(16, WIDTH - sum(widths[1:4]) - 8 - 8))  # the layer's name has 8 columns at least
    widths[0] = min(widths[0], max(8, WIDTH - sum(widths[1:]) - 8))
    return [
        "  ".join([
            _cut(name, widths[0]).ljust(widths[0]),
            size.ljust(widths[1]),
            dense.rjust(widths[2]),
            ms.rjust(widths[3]),
            _cut(choice, widths[4]),
        ]).rstrip().replace(_FILLER, "")
        for name, size, dense, ms, choice in body
    ]  # fmt: skip


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + rest


def _pattern(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _cut(text: str, width: int) -> str:
    """The end of text says more than its beginning."""
    if len(text) <= width:
        return text
    end = text[-(width - 2) :]
    return ".." + (end if end[0] != _FILLER else "." + end[1:])


def _spread(text: str) -> str:
    return "".join(one + _FILLER * (unicodedata.east_asian_width(one) in "WF") for one in text)


def _wrapped(text: str, indent: str) -> list[str]:
    spread = _spread(text)
    width = WIDTH - (_FILLER in spread)  # a character and what follows it may be parted
    lines = textwrap.wrap(spread, width, initial_indent=indent, subsequent_indent=indent + "  ")
    return [line.replace(_FILLER, "") for line in lines]
