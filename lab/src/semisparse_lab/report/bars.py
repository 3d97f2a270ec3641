"""Whether 2:4 keeps the loss and gains time: the bars that were set before the runs, and how results stand to them."""

import math
import statistics
from collections.abc import Sequence

from semisparse_lab.report.markdown import markdown
from semisparse_lab.report.time_to_loss import ArmRuns, Compared, at_end, at_equal_seconds, by_budget, final
from semisparse_lab.report.time_to_loss_tables import REFERENCES, p_of, share
from semisparse_lab.report.timed_document import Document

LOSS = 0.003
"""How far above dense bf16 an arm may end at equal tokens, as a share of its bits per byte."""
SURE = 0.05
"""Below this p, an arm is below another one."""
NOT_MEASURED = "not measured yet"
_FARTHEST = 2.0
"""How many times longer than the longest runs steps_needed reaches."""


def bars(results: Sequence[Document]) -> str:
    """Each bar for each arm that is 2:4: figure, seeds, met or missed; as a Markdown table.

    Args:
        results: The runs.
    """
    tokens, seconds = _by_order(results)
    head, rows = ("| arm | bar, at equal | figure (p) | seeds | |", "|---|---|--:|---|---|"), []
    for order in sorted({*tokens, *seconds} - set(range(REFERENCES))):
        for place, (what, group) in enumerate(
            (
                (f"tokens: at most {LOSS:.1%} above dense bf16 (validation)", tokens),
                (f"seconds: below dense bf16, p < {SURE}", seconds),
                (f"seconds: below torchao float8, p < {SURE}", seconds),
            )
        ):
            name = (tokens.get(order) or seconds[order]).name
            cells = _judged(group.get(order), group.get(1 if place == 2 else 0), equal_tokens=not place)
            rows.append([name, what, *cells])
    return markdown(head, rows) if rows else ""


def _by_order(results: Sequence[Document]) -> tuple[dict[int, ArmRuns], dict[int, ArmRuns]]:
    """The arms of runs of equal tokens and of equal seconds, by their order."""
    groups = by_budget(results)
    tokens, seconds = ({arm.order: arm for arm in groups.get(budget, [])} for budget in ("tokens", "seconds"))
    return tokens, seconds


def _judged(arm: ArmRuns | None, reference: ArmRuns | None, equal_tokens: bool) -> tuple[str, str, str]:
    """Figure, seeds and verdict. A seed that diverged misses any bar."""
    if arm is None or (reference is None and not arm.diverged):
        return "", "", NOT_MEASURED
    empty = Compared((), (), (), (), None)
    compared = empty if reference is None else (at_end if equal_tokens else at_equal_seconds)(arm, reference)
    p = "" if equal_tokens or compared.p is None else f" ({p_of(compared)})"
    seeds = ", ".join([*map(str, compared.seeds), *(f"{seed} diverged" for seed in arm.diverged)])
    return f"{share(compared)}{p}", seeds, verdict(compared, bool(arm.diverged), equal_tokens)


def verdict(compared: Compared, diverged: bool, equal_tokens: bool) -> str:
    """Whether a bar is met.

    Args:
        compared: The arm beside the reference.
        diverged: Whether a seed of the arm diverged.
        equal_tokens: Whether it is the bar on the loss at equal tokens; otherwise the arm has to be below.
    """
    if diverged:
        return "**missed**"
    if not compared.seeds:
        return NOT_MEASURED
    mean = statistics.fmean(compared.shares)
    if equal_tokens:
        return "**met**" if mean <= LOSS else "**missed**"
    if mean < 0 and compared.p is None:
        return "open: too few seeds for a test"
    return "**met**" if mean < 0 and compared.p is not None and compared.p < SURE else "**missed**"


def steps_needed(results: Sequence[Document]) -> str:
    """How many more steps than float8 each 2:4 arm needs that ends above it at equal seconds, in a sentence.

    An arm has runs of two lengths, of equal tokens and of equal seconds. Its loss is taken to be linear in the
    logarithm of the steps.

    Args:
        results: The runs.
    """
    tokens, seconds = _by_order(results)
    said = []
    for order in sorted(seconds.keys() & tokens.keys() - set(range(REFERENCES))):
        if 1 not in seconds:
            break
        ends = [tokens[order].runs, seconds[order].runs, seconds[1].runs]
        if shared := sorted(ends[0].keys() & ends[1].keys() & ends[2].keys()):
            bits = [statistics.fmean(final(runs[seed]) for seed in shared) for runs in ends]
            steps = [ends[place][shared[0]]["steps"] for place in range(3)]
            if (needed := _needed(bits, steps)) is not None:
                said.append(f"{seconds[order].name} had {steps[1] / steps[2]:.2f} times the steps of "
                            f"{seconds[1].name} and would need {needed}")  # fmt: skip
    if not said:
        return ""
    return (
        f"In the same seconds, {'; '.join(said)}, by a straight line in the logarithm of the steps through the ends of "
        "its runs of both lengths."
    )


def _needed(bits: Sequence[float], steps: Sequence[int]) -> str | None:
    """Steps over float8's at which the line through an arm's two ends is at float8's loss; None if it is below already.

    Args:
        bits: At the ends of the arm's runs of equal tokens and of equal seconds, and of float8's.
        steps: Of these.
    """
    (first, second, aim), (short, long, other) = bits, steps
    if second <= aim:
        return None
    farthest = f"more than {_FARTHEST * long / other:.2f}"
    if second >= first or long <= short:
        return farthest
    needed = short * math.exp((first - aim) / (first - second) * math.log(long / short))
    return farthest if needed > _FARTHEST * long else f"{needed / other:.2f}"
