"""The card of time to loss: the bars, tables at equal tokens and at equal seconds, and their picture."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from semisparse.errors import ConfigError
from semisparse.files import write_atomically
from semisparse_lab.checks import shown
from semisparse_lab.errors import DataError
from semisparse_lab.report.bars import bars, steps_needed
from semisparse_lab.report.cards import origin
from semisparse_lab.report.time_to_loss import by_budget
from semisparse_lab.report.time_to_loss_curves import curves
from semisparse_lab.report.time_to_loss_tables import COMPARED, REFERENCES, against, elsewhere, losses, seconds
from semisparse_lab.report.timed_document import Document, load_timed

HEADINGS = {"tokens": "Runs of equal tokens", "seconds": "Runs of equal seconds"}
PICTURE = "Validation bits per byte against tokens and seconds, and differences to dense bf16"
NOTE = (
    f"Mean ± sample standard deviation over the seeds. {COMPARED} Seconds are of pure training: batch, forward, "
    "backward, clipping, optimizer and schedule; compiling and scoring are left out and stand in columns of their own. "
    "At equal seconds, both arms are read where the shorter of the two runs ends, on a straight line between the "
    "neighbouring scores on the way, which are of fewer windows than those at the end. Bits per byte are exact: the "
    "cross-entropies of the tokens over the bytes for which they stand."
)
OTHER_SECONDS = (
    "Runs of equal tokens end at different seconds: the slower arm is then read before its learning rate has fallen, "
    "which favours the faster one. Runs of equal seconds do not have this fault."
)


def write_card(results: Path, out: Path) -> Path:
    """Write out/NAME.md and out/NAME.png from the runs in a folder, and return the path of the card.

    Args:
        results: The folder with result files, any number of arms and seeds.
        out: The folder for the card.

    Raises:
        DataError: The folder has no run, or a damaged one.
        ConfigError: The card cannot be written.
    """
    found = load_timed(results)
    if not found:
        raise DataError(f"results={str(results)!r} holds no finished run")
    name = found[0]["experiment"]
    try:
        write_atomically(out / f"{name}.png", curves(found))
        write_atomically(out / f"{name}.md", card(found, f"{name}.png").encode())
    except OSError as error:
        raise ConfigError(f"out={str(out)!r} cannot be written: {error.strerror or error}") from error
    return out / f"{name}.md"


def card(results: Sequence[Document], plot: str) -> str:
    """The card of timed runs of one experiment.

    Args:
        results: The runs.
        plot: Name of the picture.
    """
    settings = f"Settings: `{json.dumps(results[0]['settings'])}`"
    return f"# {results[0]['title']}\n\n{text(results, plot, '##')}\n\n{settings}\n"


def text(results: Sequence[Document], plot: str, level: str) -> str:
    """All that is said of timed runs of one experiment.

    Args:
        results: The runs.
        plot: The picture, as it is linked to.
        level: Marks of the headings.
    """
    lines = [setup(results), f"![{PICTURE}]({plot})", bars(results), steps_needed(results)]
    for budget, arms in by_budget(results).items():
        lines += [f"{level} {HEADINGS.get(budget, budget)}", losses(arms)]
        lines += [against(arms, reference, budget) for reference in arms if reference.order < REFERENCES]
        lines += [elsewhere(arms, arms[0]), OTHER_SECONDS if budget == "tokens" else "", seconds(arms)]
    measured = f"Measured on {origin(results)}, torchao {results[0].get('torchao') or 'not installed'}."
    return "\n\n".join(filter(None, [*lines, NOTE, f"{measured} Remake: {remake(results)}."]))


def setup(results: Sequence[Document]) -> str:
    """The model, its text and its training, in a few sentences; all runs have the same.

    Args:
        results: The runs.

    Raises:
        DataError: Their settings are not those of the study.
    """
    settings = results[0]["settings"]
    try:
        return _setup(results)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"settings={shown(settings)} are not those of this study ({error!r}); train it again"
        ) from error


def _setup(results: Sequence[Document]) -> str:
    first = results[0]
    settings, share = first["settings"], first["multiplications"]
    model, train = settings["model"], settings["train"]
    known = next((run["parameters"] for run in results if run.get("parameters")), None)
    size = f", {known / 1e6:,.1f} M parameters" if known else ""
    return (
        f"Model: width {model['width']:,}, hidden width {model['hidden']:,}, depth {model['depth']}, {model['heads']} "
        f"heads, context {model['context']:,}, vocabulary {model['vocabulary']:,}{size}; "
        f"{share['block_linears'] / sum(share.values()):.1%} of its multiplications are in the linear layers in which "
        f"the arms differ. A step has {first['tokens_per_step']:,} tokens; {settings['steps']:,} steps are the run of "
        f"dense bf16. AdamW at a peak learning rate of {train['lr']:g}, held for {train['hold_fraction']:.0%} of the "
        f"steps after a warm-up of {train['warmup_fraction']:.0%}, then half a cosine. The 2:4 arms are sparse for "
        f"{settings['sparse_fraction']:.0%} of their steps{_before(settings)}, then dense in the same precision; masks "
        f"are chosen anew {_each(settings['refresh_every'])}. Text {settings['text'][:8]} (SHA-256). Scores on the "
        f"way, which the picture shows, are of the first {settings['score_windows']:,} windows of the validation set; "
        f"those at the end of its first {settings['final_windows']:,}, and of the test set's. The first windows are of "
        "neighbouring files, so that differences there are not those of the whole."
    )


def _before(settings: dict[str, Any]) -> str:
    return f" after a dense start of {settings['dense_start']:.0%}" if settings["dense_start"] else ""


def _each(steps: int) -> str:
    return "at each step" if steps == 1 else f"every {steps} steps"


def remake(results: Sequence[Document]) -> str:
    """The commands that make these runs again.

    Args:
        results: The runs.
    """
    settings = results[0]["settings"]
    seeds = ",".join(map(str, sorted({run["seed"] for run in results})))
    run = (
        f"semisparse-lab experiment llama-linux --steps {settings['steps']} --lr {settings['train']['lr']:g} "
        f"--hold {settings['train']['hold_fraction']:g} --sparse-fraction {settings['sparse_fraction']:g}"
    )
    run += f" --dense-start {settings['dense_start']:g}" if settings["dense_start"] else ""
    run += f" --refresh-every {settings['refresh_every']}" if settings["refresh_every"] > 1 else ""
    budgets = [f"`{run} --seeds {seeds} --budget {budget}`" for budget in by_budget(results)]
    return ", ".join(["`semisparse-lab data linux`", f"`{run} --time-only 60`", *budgets])
