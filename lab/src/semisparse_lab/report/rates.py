"""Learning rates that were tried, from their runs."""

from collections.abc import Sequence
from pathlib import Path

from semisparse_lab.checks import is_number
from semisparse_lab.errors import DataError
from semisparse_lab.report.markdown import markdown
from semisparse_lab.report.timed_document import Document, read_timed

_SHOWN = 8
"""Digits of a checksum."""


def load_rates(folders: Sequence[Path]) -> list[Document]:
    """The runs in folders, which differ in their learning rates.

    Args:
        folders: With nothing but such runs.

    Raises:
        DataError: A file is damaged.
    """
    found: list[Document] = []
    for path in sorted(path for folder in folders for path in folder.glob("*.json")):
        if (content := read_timed(path)) is None:
            continue
        train, text = content["settings"].get("train"), content["settings"].get("text")
        if not (isinstance(train, dict) and is_number(train.get("lr")) and isinstance(text, str)):
            raise DataError(f"{path} is not a result: its settings have no learning rate or no text; train it again")
        found.append(content)
    return found


def rates(tried: Sequence[Document], results: Sequence[Document] = ()) -> str:
    """The rates that were tried on each text, the best one bold, as a Markdown table; then what to know about them.

    Args:
        tried: Their runs.
        results: The study's, for which a rate was chosen.
    """
    used = {_place(run) for run in results}
    groups: dict[tuple[str, int], list[Document]] = {}
    for run in sorted(tried, key=lambda run: (run["steps"], run["settings"]["train"]["lr"])):
        groups.setdefault((run["settings"]["text"], run["steps"]), []).append(run)
    head = (
        "| text (SHA-256) | arm | seed | steps | learning rate | validation, bits per byte | |",
        "|---|---|--:|--:|--:|--:|---|",
    )
    rows, edges = [], []
    for (text, steps), runs in groups.items():
        ended = [run for run in runs if run["validation"] is not None]
        best = min(ended, key=lambda run: run["validation"]["bits_per_byte"], default=None)
        for run in runs:
            rate, score = f"{run['settings']['train']['lr']:g}", run["validation"]
            bits = "diverged" if score is None else f"{score['bits_per_byte']:.4f}"
            mark = "**" if run is best else ""
            rows.append([
                text[:_SHOWN], run["arm_title"], str(run["seed"]), f"{steps:,}", f"{mark}{rate}{mark}",
                f"{mark}{bits}{mark}", "of the runs" if _place(run) in used else "",
            ])  # fmt: skip
        if len(runs) > 1 and best in (runs[0], runs[-1]):
            edges.append(
                f"On text {text[:_SHOWN]} the best rate is the {'lowest' if best is runs[0] else 'highest'} of those "
                f"tried over {steps:,} steps, so that one beyond it may be better still."
            )
    return "\n\n".join([markdown(head, rows), *([" ".join(edges)] if edges else [])])


def _place(run: Document) -> tuple[str, float]:
    """Text and learning rate."""
    return run["settings"]["text"], run["settings"]["train"]["lr"]
