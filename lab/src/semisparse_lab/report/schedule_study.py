"""The schedule study: runs that differ from the main ones in one setting or few, beside the main ones.

The folder of the main runs holds a folder study-NAME for each variation. Only runs of equal tokens are compared.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from semisparse.errors import ConfigError
from semisparse.files import write_atomically
from semisparse_lab.checks import shown
from semisparse_lab.errors import DataError
from semisparse_lab.report.cards import origin
from semisparse_lab.report.markdown import markdown
from semisparse_lab.report.summaries import spread
from semisparse_lab.report.time_to_loss import ArmRuns, at_end, by_budget, final, final_test
from semisparse_lab.report.time_to_loss_tables import share, steps_of
from semisparse_lab.report.timed_document import Document, load_timed

PREFIX = "study-"
VARIED = ("sparse_fraction", "dense_start", "refresh_every", "hold_fraction", "layers")
"""Settings that a variation may change; the others are those of the main runs."""


@dataclass(frozen=True, slots=True)
class Variation:
    """Runs with other settings than the main ones.

    Attributes:
        name: Of the folder, without its prefix.
        changed: What the settings are instead, as text.
        results: The runs.
    """

    name: str
    changed: str
    results: tuple[Document, ...]


def load_study(folder: Path, main: Sequence[Document]) -> list[Variation]:
    """The variations in a folder, by name; those without a finished run are left out.

    Args:
        folder: Of the main runs.
        main: These runs, at least one.

    Raises:
        DataError: A file is damaged, or a variation differs from the main runs in more than it may.
    """
    found = []
    for path in sorted(folder.glob(f"{PREFIX}*")):
        if results := load_timed(path):
            changed = _changed(path, main[0]["settings"], results[0]["settings"])
            found.append(Variation(path.name.removeprefix(PREFIX), changed, tuple(results)))
    return found


def _changed(path: Path, base: Document, settings: Document) -> str:
    """The settings that differ, with both values."""
    ours, theirs = _flat(path, settings), _flat(path.parent, base)
    names = [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]
    for name in names:
        if name not in VARIED:
            raise DataError(
                f"{path} has {name}={shown(ours.get(name))}, the main runs {shown(theirs.get(name))}: a variation may "
                f"differ in {', '.join(VARIED)} alone; train it again or move it away"
            )
    changed = ", ".join(f"`{name}` {_text(theirs.get(name))} → {_text(ours.get(name))}" for name in names)
    return changed or "nothing: another run"


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def _flat(path: Path, settings: Document) -> dict[str, Any]:
    """Settings with those of the training beside the others."""
    train = settings.get("train")
    if not isinstance(train, dict) or "hold_fraction" not in train:
        raise DataError(f"{path} holds results without settings of the training: train={shown(train)}; train it again")
    return {**settings, **train, "train": None}


def tables(main: Sequence[Document], study: Sequence[Variation]) -> str:
    """For each arm of the study a Markdown table of its variations, the main run of the same seed first.

    Args:
        main: The main runs.
        study: Its variations.
    """
    bases = {arm.slug: arm for arm in by_budget(main).get("tokens", [])}
    varied: dict[str, list[tuple[Variation, ArmRuns]]] = {}
    for variation in study:
        for arm in by_budget(variation.results).get("tokens", []):
            varied.setdefault(arm.slug, []).append((variation, arm))
    dense = _dense_by_course([*bases.values(), *(arm for pairs in varied.values() for _, arm in pairs)])
    made = []
    for slug, pairs in sorted(varied.items(), key=lambda each: _order(each[1][0][1])):
        base = bases.get(slug)
        made.append(_table(base, pairs, dense))
        if base is not None:
            made.append(_spread_of(base, dense))
    return "\n\n".join(made)


def _order(arm: ArmRuns) -> tuple[bool, int]:
    """As in the study, but dense bf16 last: its variations are there to compare others with."""
    return arm.order == 0, arm.order


def _dense_by_course(arms: Sequence[ArmRuns]) -> dict[float, ArmRuns]:
    """The runs of the study's first arm by the share of the steps for which the learning rate is held."""
    found: dict[float, ArmRuns] = {}
    for arm in arms:
        for run in arm.runs.values():
            if arm.order == 0:
                found.setdefault(_course(run), arm)
    return found


def _course(run: Document) -> float:
    return float(run["settings"]["train"]["hold_fraction"])


def _table(base: ArmRuns | None, pairs: Sequence[tuple[Variation, ArmRuns]], dense: dict[float, ArmRuns]) -> str:
    """The variations of one arm."""
    first, seeds = pairs[0][1], {seed for _, arm in pairs for seed in (*arm.runs, *arm.diverged)}
    head = (
        "| variation | changed | seed | steps | validation | test | to main | to dense | seconds | dense's / its |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    )
    rows = [cells for variation, arm in pairs for cells in _rows(variation.name, variation.changed, arm, base, dense)]
    if base is not None:
        same = replace(
            base,
            runs={seed: run for seed, run in base.runs.items() if seed in seeds},
            diverged=tuple(seed for seed in base.diverged if seed in seeds),
        )
        rows[:0] = _rows("main", "", same, None, dense) or [["main", "", "", "", "not there", *[""] * 5]]
    return f"{(base or first).title} (arm `{first.slug}`):\n\n{markdown(head, rows)}"


def _rows(name: str, changed: str, arm: ArmRuns, base: ArmRuns | None, dense: dict[float, ArmRuns]) -> list[list[str]]:
    """A row for each seed of one variation."""
    alone = [replace(arm, runs={seed: run}, diverged=()) for seed, run in arm.runs.items()]
    alone += [replace(arm, runs={}, diverged=(seed,)) for seed in arm.diverged]
    return [_cells(name, changed, one, base, dense) for one in alone]


def _cells(name: str, changed: str, arm: ArmRuns, base: ArmRuns | None, dense: dict[float, ArmRuns]) -> list[str]:
    """The row of one run of a variation."""
    runs = arm.runs
    if not runs:
        return [name, changed, ", ".join(map(str, arm.diverged)), "", "diverged", *[""] * 5]
    reference = None if arm.order == 0 else dense.get(_course(next(iter(runs.values()))))
    return [
        name,
        changed,
        arm.seeds,
        steps_of(arm),
        spread(arm.values(final), 4),
        spread(arm.values(final_test), 4),
        _difference(arm, base),
        _difference(arm, reference),
        spread([run["seconds"] for run in runs.values()], 1),
        _faster(arm, reference),
    ]


def _difference(arm: ArmRuns, reference: ArmRuns | None) -> str:
    """Of the validation bits per byte, in percent; empty without a common seed."""
    return "" if reference is None else share(at_end(arm, reference))


def _faster(arm: ArmRuns, reference: ArmRuns | None) -> str:
    """The reference's seconds of training over the arm's, where one kind of GPU gave both; empty otherwise."""
    pairs = (
        [] if reference is None else [(reference.runs[s], run) for s, run in arm.runs.items() if s in reference.runs]
    )
    ratios = [theirs["seconds"] / ours["seconds"] for theirs, ours in pairs if theirs["gpu"] == ours["gpu"]]
    return f"{spread(ratios, 2)}x" if ratios else ""


def _spread_of(base: ArmRuns, dense: dict[float, ArmRuns]) -> str:
    """What the differences of single seeds are to be compared with, as a sentence."""
    bits = base.values(final)
    if len(bits) < 2:
        return "The main arm has no second seed, so that nothing tells how much seeds differ."
    seeds, apart = ", ".join(map(str, base.runs)), statistics.stdev(bits) / statistics.fmean(bits)
    said = f"The main arm over its seeds {seeds}: validation {spread(bits, 4)}, a spread of {100 * apart:.2f} %"
    against = "" if base.order == 0 else _difference(base, dense.get(_course(next(iter(base.runs.values())))))
    return f"{said}; {against} to dense." if against else f"{said}."


def shown_runs(main: Sequence[Document], study: Sequence[Variation]) -> list[Document]:
    """The runs that the tables are made of: the variations, and the main runs beside them, dense bf16 among these."""
    varied = [run for variation in study for run in variation.results]
    arms = {run["arm"] for run in varied}
    return [*varied, *(run for run in main if run["budget"] == "tokens" and (run["arm"] in arms or not run["order"]))]


def explanation(study: Sequence[Variation]) -> str:
    """How to read the tables."""
    seeds = sorted({run["seed"] for variation in study for run in variation.results})
    single = "Each variation has one seed" if len(seeds) == 1 else "Each seed has a row, and few have more than one"
    return (
        f"{single} ({', '.join(map(str, seeds))}), so that a difference can be chance. Below each table stands how "
        "much the main arm differs over its seeds, and its difference to dense. Runs of one seed begin with equal "
        "weights and have equal batches, but are not repeated bit for bit: their losses part within the first steps, "
        "those of equal schedules, too. *to main* is against the main run of the same seed, *to dense* against dense "
        "bf16 of the same seed with the same course of the learning rate; both are of validation bits per byte at the "
        "end of runs of equal tokens, negative is better. Seconds are of pure training, without compiling and scoring; "
        "*dense's / its*, above 1 where the arm is faster, is left out where the two ran on different GPUs."
    )


def card(main: Sequence[Document], study: Sequence[Variation]) -> str:
    """The card of the study.

    Args:
        main: The main runs.
        study: Its variations, at least one.
    """
    return "\n\n".join(
        [
            f"# Schedules: {main[0]['title']}",
            explanation(study),
            tables(main, study),
            f"Measured on {origin(shown_runs(main, study))}.",
            "Remake: `semisparse-lab data linux`, then `TOKENS=linux-tokens bash benchmarks/runs/llama_linux.sh OUT "
            "runs` and the same with `OUT study`; `semisparse-lab card OUT`.\n",
        ]
    )


def write_study(results: Path, out: Path) -> Path | None:
    """Write out/NAME-schedules.md where a folder holds variations beside the main runs, and return its path.

    Args:
        results: The folder of the main runs, at least one.
        out: The folder for the card.

    Raises:
        DataError: As load_study.
        ConfigError: The card cannot be written.
    """
    main = load_timed(results)
    if not (study := load_study(results, main)):
        return None
    path = out / f"{main[0]['experiment']}-schedules.md"
    try:
        write_atomically(path, card(main, study).encode())
    except OSError as error:
        raise ConfigError(f"out={str(out)!r} cannot be written: {error.strerror or error}") from error
    return path
