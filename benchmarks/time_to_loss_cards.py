"""Card, picture and places of time to loss, from benchmarks/results/llama-linux. Without results they say so."""

import statistics
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from benchmarks import compare_tables
from benchmarks.origin import short_origin
from benchmarks.store import CARDS, RESULTS, load
from semisparse_lab.report import time_to_loss_card
from semisparse_lab.report.cards import machine, origin
from semisparse_lab.report.rates import load_rates, rates
from semisparse_lab.report.time_to_loss import by_budget, final_test
from semisparse_lab.report.time_to_loss_curves import curves
from semisparse_lab.report.time_to_loss_tables import diverged, ends, summary
from semisparse_lab.report.timed_document import Document, load_timed

NAME = "llama-linux"
FOLDER = RESULTS / NAME
COMMAND = f"`semisparse-lab experiment {NAME}`"
MISSING = f"Not measured yet: {COMMAND}."
HEADING = "## Loss at equal tokens and at equal seconds"
ALT = "Validation bits per byte of each arm against tokens and against seconds, and the differences to dense bf16"
NOTE = (
    "Change from the validation loss of dense bf16, in one column from that of torchao float8: mean ± sample standard "
    "deviation over the seeds; negative is better; p is of a one-sided paired t-test. *tokens / s*: over dense's. "
    "*sooner*: how many times sooner a run is at the loss with which dense bf16 ends. *mvue*: weight gradients are "
    "sampled to 2:4, too. Empty: not measured."
)


@cache
def results() -> list[Document]:
    """The stored runs of the study; read once."""
    return load_timed(FOLDER)


@cache
def tried() -> list[Document]:
    """The stored runs at other learning rates, in folders called rates; read once."""
    return load_rates(sorted(FOLDER.glob("rates*")))


def cards(found: Sequence[Document]) -> dict[Path, str]:
    """The card, if there are runs; its picture lies beside it."""
    return {CARDS / f"{NAME}.md": time_to_loss_card.card(found, f"{NAME}.png")} if found else {}


def write(found: Sequence[Document]) -> None:
    """Draw the picture, if there are runs."""
    if found:
        (CARDS / f"{NAME}.png").write_bytes(curves(found))


def front(found: Sequence[Document], small: str, fallback: str) -> str:
    """A section of README: time to loss, then a sentence on the small models; the fallback while there are no runs.

    Args:
        found: The runs.
        small: What the small models show, in a sentence.
        fallback: The section without them.
    """
    if not found:
        return fallback
    first = found[0]["settings"]
    model, dense = first["model"], [run for run in found if not run["order"] and run["finished"]]
    lasted = f" ({statistics.fmean(run['seconds'] for run in dense):,.0f} s)" if dense else ""
    sparse = f"{first['sparse_fraction']:.0%}"
    intro = (
        f"A Llama-style decoder of width {model['width']:,}, hidden width {model['hidden']:,} and depth "
        f"{model['depth']}, trained on the source of Linux with the same batches and settings in each row. Dense bf16 "
        f"takes {first['steps']:,} steps of {found[0]['tokens_per_step']:,} tokens{lasted}; the others train on as "
        f"many tokens, and in other runs for as many seconds. The 2:4 rows are sparse for {sparse} of "
        "their steps, then dense. [How, and each run](docs/accuracy.md#time-to-loss)."
    )
    picture = f"![{ALT}](benchmarks/cards/{NAME}.png)"
    windows = (
        f"*Equal tokens* is read at the end, on {first['final_windows']:,} windows of the validation set; *equal "
        f"seconds* and the picture are read on the way, on the first {first['score_windows']:,}."
    )
    note = " ".join(filter(None, [diverged(found), NOTE, windows, on_test(found), f"Measured on {gpus(found)}."]))
    return "\n\n".join(filter(None, [HEADING, intro, picture, summary(found), note, small]))


def on_test(found: Sequence[Document]) -> str:
    """The ends of equal tokens on the test set beside dense bf16, in a sentence; nothing without them."""
    arms = by_budget(found).get("tokens", [])
    dense = next((arm for arm in arms if not arm.order and arm.runs), None)
    told = [] if dense is None else ends(arms, dense, final_test)
    return f"At equal tokens, on the test set: {', '.join(told)}." if told else ""


def gpus(found: Sequence[Document]) -> str:
    """The GPUs of these runs."""
    return " and ".join(map(machine, sorted({run["gpu"] for run in found})))


def blocks(found: Sequence[Document], other_rates: Sequence[Document]) -> dict[str, str]:
    """Name -> text of each generated block of docs/accuracy.md.

    Args:
        found: The runs.
        other_rates: Those at other learning rates.
    """
    picture = f"../benchmarks/cards/{NAME}.png"
    compared = [*load("compare-model"), *load("compare-linear")]
    faster = compare_tables.beside_float8(compared)
    shown = compare_tables.with_both_sides(compared)
    return {
        NAME: time_to_loss_card.text(found, picture, "###") if found else MISSING,
        f"{NAME}-rates": (
            f"{rates(other_rates, found)}\n\nMeasured on {origin(other_rates)}." if other_rates else MISSING
        ),
        "beside-float8": f"{faster.markdown()}\n\n{short_origin(shown)}" if faster.rows else MISSING,
    }
