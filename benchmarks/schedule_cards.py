"""The card of schedules and its block on docs/recipes.md, from folders beside the runs of llama-linux."""

from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.store import CARDS, RESULTS
from semisparse_lab.report import schedule_study
from semisparse_lab.report.cards import origin
from semisparse_lab.report.timed_document import load_timed

Result = dict[str, Any]

FOLDER = RESULTS / "llama-linux"
CARD = CARDS / "llama-linux-schedules.md"
MISSING = "Not measured yet: `TOKENS=linux-tokens bash benchmarks/runs/llama_linux.sh OUT study`."


@cache
def study(folder: Path) -> tuple[list[Result], list[schedule_study.Variation]]:
    """The main runs and their variations; read once."""
    main = load_timed(folder)
    return main, schedule_study.load_study(folder, main) if main else []


def cards(folder: Path = FOLDER) -> dict[Path, str]:
    """The card, if there are results."""
    main, variations = study(folder)
    return {CARD: schedule_study.card(main, variations)} if variations else {}


def block(folder: Path = FOLDER) -> str:
    """The tables, for a page of docs/."""
    main, variations = study(folder)
    if not variations:
        return MISSING
    measured = origin(schedule_study.shown_runs(main, variations))
    where = f"Measured on {measured}. The card: [{CARD.stem}](../benchmarks/cards/{CARD.name})."
    return "\n\n".join([schedule_study.explanation(variations), schedule_study.tables(main, variations), where])
