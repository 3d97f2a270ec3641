"""Tables of time to loss: how runs ended, what they took, arms beside the references, and all of it in a few lines."""

import statistics
from collections.abc import Callable, Sequence

from semisparse_lab.report.markdown import markdown
from semisparse_lab.report.summaries import spread
from semisparse_lab.report.time_to_loss import (
    ArmRuns,
    Compared,
    at_end,
    at_equal_seconds,
    by_budget,
    final,
    final_test,
    last_on_the_way,
    times_faster,
)
from semisparse_lab.report.timed_document import Document

REFERENCES = 2
"""The first so many arms are those that others are compared with: dense bf16 and torchao float8."""
COMPARED = (
    "Differences are taken seed by seed; negative is better; p is of a one-sided paired t-test that the arm is below "
    "the other one."
)


def losses(arms: Sequence[ArmRuns]) -> str:
    """The losses with which the runs of each arm ended, as a Markdown table.

    Args:
        arms: Of one budget.
    """
    head = (
        "| arm | seeds | steps | validation, nats per token | validation, bits per byte | test, bits per byte |",
        "|---|---|--:|--:|--:|--:|",
    )
    reads = (lambda run: run["validation"]["nats_per_token"]), final, final_test
    return markdown(
        head, ([arm.name, arm.seeds, steps_of(arm), *(spread(arm.values(read), 4) for read in reads)] for arm in arms)
    )


def steps_of(arm: ArmRuns) -> str:
    """The steps of an arm's runs, each number once."""
    return ", ".join(sorted({f"{run['steps']:,}" for run in arm.runs.values()}))


def seconds(arms: Sequence[ArmRuns]) -> str:
    """What the runs of each arm took, as a Markdown table; means over the seeds.

    Args:
        arms: Of one budget.
    """
    head = (
        "| arm | ms per sparse step | dense step | training, s | compiling, s | scoring, s | tokens / s | peak GiB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    )
    rows = []
    for arm in arms:
        runs = list(arm.runs.values())
        if not runs:
            continue
        memory = [run["peak_memory"]["bytes"] for run in runs if run["peak_memory"].get("bytes")]
        rows.append([
            arm.name,
            *(_step_ms(runs, kind) for kind in ("sparse", "dense")),
            spread([run["seconds"] for run in runs], 1),
            f"{statistics.fmean(sum(run['start_seconds']) for run in runs):.0f}",
            f"{statistics.fmean(run['score_seconds'] + run['final_seconds'] for run in runs):.0f}",
            f"{statistics.fmean(run['tokens_per_second'] for run in runs):,.0f}",
            f"{max(memory) / 2**30:.1f}" if memory else "",
        ])  # fmt: skip
    return markdown(head, rows)


def _step_ms(runs: Sequence[Document], kind: str) -> str:
    """Milliseconds per step of the phases of one kind; nothing if there are none."""
    found = [phase["seconds_per_step"] for run in runs for phase in run["phases"] if phase["kind"] == kind]
    times = [1000 * each for each in found if each is not None]
    return f"{statistics.fmean(times):.1f}" if times else ""


def against(arms: Sequence[ArmRuns], reference: ArmRuns, budget: str) -> str:
    """Each arm beside a reference, at the end of the runs and at equal seconds, as a Markdown table.

    Args:
        arms: Of one budget.
        reference: One of them, with runs.
        budget: What their runs have in equal parts.
    """
    end = "at the end, equal tokens" if budget == "tokens" else "at the end"
    head = (
        f"| to {reference.name} | seeds | {end} | p | at equal seconds | p | sooner at its last loss |",
        "|---|---|--:|--:|--:|--:|--:|",
    )
    rows = []
    for arm in arms:
        if arm is reference or not (ended := at_end(arm, reference)).seeds:
            continue
        equal = at_equal_seconds(arm, reference)
        rows.append([
            arm.name, ", ".join(map(str, ended.seeds)), share(ended), p_of(ended), share(equal), p_of(equal),
            reached(arm, reference),
        ])  # fmt: skip
    return markdown(head, rows) if rows else ""


def elsewhere(arms: Sequence[ArmRuns], reference: ArmRuns) -> str:
    """The ends of runs on other text than the tables', beside a reference, in a sentence; nothing for one arm.

    Args:
        arms: Of one budget.
        reference: One of them, with runs.
    """
    told = ends(arms, reference, final_test, last_on_the_way)
    return (
        f"The ends of these runs on the test set, and on the windows of the scores on the way alone, to "
        f"{reference.name}: {'; '.join(told)}."
        if told
        else ""
    )


def ends(arms: Sequence[ArmRuns], reference: ArmRuns, *reads: Callable[[Document], float]) -> list[str]:
    """The ends of each arm's runs beside a reference, "NAME +1.00 % and -2.00 %"; arms without a common seed left out.

    Args:
        arms: Of one budget.
        reference: One of them, with runs.
        reads: The scores, one figure for each.
    """
    pairs = [(arm, [at_end(arm, reference, read) for read in reads]) for arm in arms if arm is not reference]
    return [f"{arm.name} {' and '.join(map(share, compared))}" for arm, compared in pairs if compared[0].seeds]


def share(compared: Compared) -> str:
    """Mean difference in percent with its spread; nothing where no seed is shared."""
    return f"{spread([100 * each for each in compared.shares], 2, '+')} %" if compared.seeds else ""


def p_of(compared: Compared) -> str:
    """p in three digits; nothing where there is none."""
    if compared.p is None:
        return ""
    return "< 0.001" if compared.p < 0.0005 else f"{compared.p:.3f}"


def reached(arm: ArmRuns, reference: ArmRuns) -> str:
    """How many times sooner an arm is at the reference's last loss, and for how many seeds if not for all.

    Args:
        arm: Which is compared.
        reference: With what.
    """
    sooner = times_faster(arm, reference)
    return f"{spread(sooner, 2)}x{_some(arm, reference)}" if sooner else "never"


def _some(arm: ArmRuns, reference: ArmRuns) -> str:
    """For how many of the shared seeds the reference's last loss is reached; nothing if for all."""
    shared = sum(seed in reference.runs for seed in arm.runs)
    there = len(times_faster(arm, reference))
    return "" if there == shared else f" ({there} of {shared})"


def summary(results: Sequence[Document]) -> str:
    """The arms beside the references in a few lines, as a Markdown table.

    Args:
        results: The runs.
    """
    groups = by_budget(results)
    tokens, equal = ({arm.slug: arm for arm in groups.get(budget, [])} for budget in ("tokens", "seconds"))
    known = sorted({**equal, **tokens}.values(), key=lambda arm: arm.order)
    dense, float8 = (next((arm for arm in known if arm.order == place), None) for place in range(REFERENCES))
    if dense is None:
        return ""
    head = (
        "| bits per byte | seeds | equal tokens | equal seconds (p) | equal seconds, to float8 (p) | tokens / s | "
        "sooner |",
        "|---|---|--:|--:|--:|--:|--:|",
    )
    rows = []
    for arm in (arm for arm in known if arm is not dense):
        ended = _compared(at_end, tokens, arm, dense)
        to_dense, to_float8 = (_compared(at_equal_seconds, equal, arm, other) for other in (dense, float8))
        tested = [share(each) + (f" ({p_of(each)})" if each.p is not None else "") for each in (to_dense, to_float8)]
        if arm is float8:
            tested[1] = "-"
        both = [(group[arm.slug], group[dense.slug]) for group in (equal, tokens) if arm.slug in group]
        soonest = _soonest(both, tried=arm.slug in equal)
        rows.append([arm.name, _seeds(ended, to_dense, to_float8), share(ended), *tested, _pace(*both[0]), soonest])
    return markdown(head, rows)


def _compared(
    read: Callable[[ArmRuns, ArmRuns], Compared], group: dict[str, ArmRuns], arm: ArmRuns, other: ArmRuns | None
) -> Compared:
    """What read says of both arms' runs of one budget; of no seed where one of them has none."""
    if other is None or arm.slug == other.slug or not {arm.slug, other.slug} <= group.keys():
        return Compared((), (), (), (), None)
    return read(group[arm.slug], group[other.slug])


def _pace(arm: ArmRuns, dense: ArmRuns) -> str:
    """Tokens per second over dense's, means over the seeds."""
    speeds = [[run["tokens_per_second"] for run in each.runs.values()] for each in (arm, dense)]
    return f"{statistics.fmean(speeds[0]) / statistics.fmean(speeds[1]):.2f}x" if all(speeds) else ""


def _soonest(both: Sequence[tuple[ArmRuns, ArmRuns]], tried: bool) -> str:
    """How many times sooner the arm is at dense's last loss, in its runs that are there for most seeds, then first.

    Args:
        both: The arm's and dense's runs, of each budget.
        tried: Whether the arm had dense's seconds: its runs of equal tokens end too early to say "never".
    """
    best = max(both, key=lambda pair: (len(times_faster(*pair)), sum(times_faster(*pair))))
    if not (sooner := times_faster(*best)):
        return "never" if tried and best[0].runs and best[1].runs else ""
    return f"{statistics.fmean(sooner):.2f}x{_some(*best)}"


def _seeds(*compared: Compared) -> str:
    """The number of seeds of the comparisons; one by one where they differ."""
    counts = [len(each.seeds) for each in compared if each.seeds]
    return " / ".join(map(str, counts if len(set(counts)) > 1 else counts[:1]))


def diverged(results: Sequence[Document]) -> str:
    """A sentence on runs that diverged; nothing if none did.

    Args:
        results: The runs.
    """
    lost = {
        f"{arm.name}, seed {', '.join(map(str, arm.diverged))}" + (f" (equal {budget})" if arm.order else ""): None
        for budget, arms in by_budget(results).items()
        for arm in arms
        if arm.diverged
    }
    return f"Diverged: {'; '.join(lost)}." if lost else ""
