"""What timed runs say: their ends, and pairs of arms at equal tokens and at equal seconds, tested seed by seed.

Values between two scores of a run are interpolated on a straight line, over steps or over seconds of pure training.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from semisparse_lab.report.timed_document import Document

STEP, SECONDS, NATS, BITS = range(4)
"""Places in a score of a document: [step, seconds, nats per token, bits per byte]."""


@dataclass(frozen=True, slots=True)
class ArmRuns:
    """All runs of one arm.

    Attributes:
        slug: The arm's short name.
        title: Its title.
        order: Its place among the study's arms.
        runs: By seed, those whose loss stayed finite.
        diverged: Seeds of the others.
    """

    slug: str
    title: str
    order: int
    runs: dict[int, Document]
    diverged: tuple[int, ...]

    @property
    def name(self) -> str:
        """The title without its phases, for narrow tables."""
        return self.title.split(" for ", 1)[0]

    @property
    def seeds(self) -> str:
        """All seeds, and which of them diverged."""
        return ", ".join([*map(str, self.runs), *(f"{seed} diverged" for seed in self.diverged)])

    def values(self, read: Callable[[Document], float]) -> list[float]:
        """What read says of each run."""
        return [read(run) for run in self.runs.values()]


@dataclass(frozen=True, slots=True)
class Compared:
    """An arm beside a reference, over the seeds that both have.

    Attributes:
        seeds: These seeds.
        values: The arm's validation bits per byte, by seed.
        reference: The reference's.
        seconds: At which both were read, by seed; empty for ends of runs.
        p: Of a one-sided paired t-test that the arm is below the reference; None for fewer than two seeds, or where
            all differences are equal.
    """

    seeds: tuple[int, ...]
    values: tuple[float, ...]
    reference: tuple[float, ...]
    seconds: tuple[float, ...]
    p: float | None

    @property
    def shares(self) -> list[float]:
        """Differences as shares of the reference."""
        return [ours / theirs - 1 for ours, theirs in zip(self.values, self.reference, strict=True)]


def by_budget(results: Sequence[Document]) -> dict[str, list[ArmRuns]]:
    """The arms of each budget, in the order of the study: results carry it as "order".

    The first arm's runs of equal tokens have as many steps as its runs of equal seconds would, and stand for them.

    Args:
        results: The runs.
    """
    found: dict[str, dict[str, list[Document]]] = {}
    budgets = {result["budget"] for result in results}
    for result in sorted(results, key=lambda result: (result["order"], result["seed"])):
        for budget in [result["budget"]] if result["order"] else budgets:
            found.setdefault(budget, {}).setdefault(result["arm"], []).append(result)
    return {
        budget: [
            ArmRuns(
                slug,
                runs[0]["arm_title"],
                runs[0]["order"],
                {run["seed"]: run for run in runs if run["test"] is not None},
                tuple(run["seed"] for run in runs if run["test"] is None),
            )
            for slug, runs in arms.items()
        ]
        for budget, arms in sorted(found.items(), reverse=True)
    }


def final(run: Document) -> float:
    """Validation bits per byte at the end of a run."""
    return float(run["validation"]["bits_per_byte"])


def final_test(run: Document) -> float:
    """Test bits per byte at the end of a run."""
    return float(run["test"]["bits_per_byte"])


def last_on_the_way(run: Document) -> float:
    """The last of the scores on the way of a run, which are of fewer windows."""
    return float(run["scores"][-1][BITS])


def at_end(arm: ArmRuns, reference: ArmRuns, read: Callable[[Document], float] = final) -> Compared:
    """The ends of both arms' runs.

    Args:
        arm: Which is compared.
        reference: With what.
        read: The score of a run.
    """
    seeds = tuple(seed for seed in arm.runs if seed in reference.runs)
    values, others = (tuple(read(each.runs[seed]) for seed in seeds) for each in (arm, reference))
    return Compared(seeds, values, others, (), below(values, others))


def at_equal_seconds(arm: ArmRuns, reference: ArmRuns) -> Compared:
    """Both arms at the second at which the shorter run ends, seed by seed; interpolated on the scores on the way.

    Args:
        arm: Which is compared.
        reference: With what.
    """
    seeds = tuple(seed for seed in arm.runs if seed in reference.runs)
    pairs = [(arm.runs[seed], reference.runs[seed]) for seed in seeds]
    seconds = tuple(min(ours["scores"][-1][SECONDS], theirs["scores"][-1][SECONDS]) for ours, theirs in pairs)
    values = tuple(bits_at(pair[0], second) for pair, second in zip(pairs, seconds, strict=True))
    others = tuple(bits_at(pair[1], second) for pair, second in zip(pairs, seconds, strict=True))
    return Compared(seeds, values, others, seconds, below(values, others))


def bits_at(run: Document, where: float, across: int = SECONDS) -> float:
    """Validation bits per byte of a run after so many seconds of training, or steps, on a line between its scores.

    Args:
        run: With scores on the way.
        where: Between its first and its last score; outside them the nearer one is taken.
        across: SECONDS or STEP.
    """
    places, bits = ([point[place] for point in run["scores"]] for place in (across, BITS))
    return float(np.interp(where, places, bits))


def seconds_to(run: Document, bits: float) -> float | None:
    """Seconds of training after which a run first scores at most so many bits per byte; None if it never does.

    Args:
        run: With scores on the way.
        bits: Per byte, on the validation set.
    """
    before: tuple[float, float] | None = None
    for point in run["scores"]:
        second, found = point[SECONDS], point[BITS]
        if found is not None and found <= bits:
            if before is None:
                return float(second)
            return before[0] + (second - before[0]) * (before[1] - bits) / (before[1] - found)
        before = None if found is None else (second, found)
    return None


def times_faster(arm: ArmRuns, reference: ArmRuns) -> list[float]:
    """For each seed of both: how many times sooner the arm reaches the loss at which the reference's run ends.

    Seeds whose run never reaches it are left out.

    Args:
        arm: Which is compared.
        reference: With what.
    """
    found = []
    for seed, run in arm.runs.items():
        if seed in reference.runs:
            last = reference.runs[seed]["scores"][-1]
            if (needed := seconds_to(run, last[BITS])) is not None:
                found.append(last[SECONDS] / needed)
    return found


def below(values: Sequence[float], reference: Sequence[float]) -> float | None:
    """p of a one-sided paired t-test that values are below the reference's; None where it says nothing.

    Args:
        values: One per seed.
        reference: One per seed, in the same order.
    """
    differences = [ours - theirs for ours, theirs in zip(values, reference, strict=True)]
    if len(differences) < 2 or statistics.pstdev(differences) == 0:
        return None
    from scipy.stats import ttest_rel

    return float(ttest_rel(values, reference, alternative="less").pvalue)
