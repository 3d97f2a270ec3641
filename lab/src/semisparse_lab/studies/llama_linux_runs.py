"""Running llama-linux: times of each arm first, then one file per run, in the order of importance, until time is up."""

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from semisparse.errors import ConfigError
from semisparse.stopwatch import Stopwatch
from semisparse_lab.checks import shown
from semisparse_lab.data.tokens import TokenSets
from semisparse_lab.errors import OutputExistsError
from semisparse_lab.report.run_document import finite, write_document
from semisparse_lab.report.timed_document import Document, provenance, timed_document
from semisparse_lab.strict_json import read
from semisparse_lab.studies.llama_linux import NAME, TITLE, Arm, Budget, Ended, Settings, train_arm
from semisparse_lab.studies.llama_linux import arms as every_arm
from semisparse_lab.tasks.next_token import NextToken
from semisparse_lab.train.float8 import missing as float8_missing
from semisparse_lab.train.results import PeakMemory
from semisparse_lab.train.timed import TimedRun

Say = Callable[[str], None]
Left = Callable[[], float]
_NO_MEMORY = PeakMemory(None, "read at the end of a run")


@dataclass(frozen=True, slots=True)
class Job:
    """One run.

    Attributes:
        arm: How layers compute.
        seed: Of weights and batches.
        budget: What the arms have in equal parts.
        steps: Of this run.
        seconds: That it is predicted to take, all told; None if its arm has no times yet.
        path: Of its file.
    """

    arm: Arm
    seed: int
    budget: Budget
    steps: int
    seconds: float | None
    path: Path

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.arm.title}, seed {self.seed}, {self.steps} steps (equal {self.budget})"


def jobs(
    arms: Sequence[Arm], seeds: Iterable[int], budget: Budget, chosen: Settings, tokens: TokenSets, folder: Path
) -> list[Job]:
    """The runs, one seed of every arm before the next seed.

    The first arm's run of equal seconds is the one of equal tokens, which has as many steps.

    Args:
        arms: In the order of importance.
        seeds: In order.
        budget: As Budget.
        chosen: Their settings.
        tokens: Their text.
        folder: With the times of the arms, and for the results.

    Raises:
        ConfigError: With budget "seconds", if an arm has no times there.
        OutputExistsError: A file in folder was made with other settings.
    """
    for path in sorted(folder.glob(f"{NAME}.*.seed*.json")):
        _read_as(path, chosen.document(tokens))
    times = {
        arm.slug: _read_as(path, _timed_settings(chosen)) for arm in arms if (path := _times_path(folder, arm)).exists()
    }
    if budget == "seconds" and (path := _times_path(folder, first := every_arm()[0])).exists():
        times[first.slug] = _read_as(path, _timed_settings(chosen))
    made = []
    for seed in seeds:
        for arm in arms:
            steps = chosen.steps if budget == "tokens" else _fitting(arm, chosen, times)
            known = times.get(arm.slug)
            seconds = None if known is None else predicted(known, arm, steps, chosen.scores)
            kind: Budget = "tokens" if arm.slug == every_arm()[0].slug else budget
            path = folder / f"{NAME}.{arm.slug}.{kind}.seed{seed}.json"
            made.append(Job(arm, seed, kind, steps, seconds, path))
    return made


def measure(
    arm: Arm, steps: int, chosen: Settings, tokens: TokenSets, folder: Path, ready: float, say: Say = print
) -> Path:
    """Time an arm for some steps of each of its phases, and write folder/llama-linux.ARM.times.json.

    Args:
        arm: How layers compute.
        steps: Of each phase.
        chosen: The settings.
        tokens: The text.
        folder: For the file.
        ready: Seconds that it took to load packages and text.
        say: Told of the times, in a line.

    Returns:
        The path of the file.
    """
    halved, both = arm, steps
    if arm.recipe is not None:
        halved, both = replace(arm, recipe=replace(arm.recipe, sparse_fraction=0.5)), 2 * steps
    brief = replace(chosen, scores=2, final_windows=chosen.score_windows, dense_start=0.0, sparse_fraction=0.5)
    ended = train_arm(halved, 0, brief, tokens, both)
    run = ended.run
    score_seconds = run.score_seconds / len(run.scores)
    document = {
        "kind": "times",
        "settings": _timed_settings(chosen),
        "arm": arm.slug,
        "seconds_per_step": {phase.kind: phase.seconds_per_step for phase in run.phases},
        "start_seconds": sum(run.start_seconds),
        "score_seconds": score_seconds,
        "final_seconds": ended.final_seconds * chosen.final_windows / chosen.score_windows,
        "ready_seconds": ready,
        "peak_memory": asdict(ended.peak_memory),
        "sparse_products": {phase.kind: phase.sparse_products for phase in run.phases},
        **provenance(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_document(_times_path(folder, arm), finite(document))
    each = ", ".join(
        f"{1000 * seconds:.2f} ms per {kind} step" for kind, seconds in document["seconds_per_step"].items()
    )
    say(f"{arm.title}: {each}, {document['start_seconds']:.0f} s to compile, {score_seconds:.1f} s a score")
    return _times_path(folder, arm)


def predicted(times: Document, arm: Arm, steps: int, scores: int) -> float:
    """Seconds that a run of an arm takes, from its times: to get ready, to compile, to train and to score.

    Args:
        times: What measure wrote.
        arm: How layers compute.
        steps: Of the run.
        scores: On its way.
    """
    begin = times["ready_seconds"] + times["start_seconds"] + times["final_seconds"]
    return float(begin + scores * times["score_seconds"] + steps * mean_step(times, arm))


def mean_step(times: Document, arm: Arm) -> float:
    """Seconds per step of a whole run, from the seconds of its phases."""
    share = 0.0 if arm.recipe is None else arm.recipe.sparse_fraction
    each = times["seconds_per_step"]
    return float(share * each.get("sparse", 0.0) + (1 - share) * each.get("dense", 0.0))


def listed(todo: Sequence[Job], tokens: TokenSets, chosen: Settings) -> str:
    """The runs with their predicted seconds, as a Markdown table.

    Args:
        todo: The runs.
        tokens: Their text.
        chosen: Their settings.
    """
    most = NextToken(tokens, chosen.model.context, chosen.train.batch_size).most_steps
    lines = ["| run | steps | of the text | predicted seconds | |", "|---|--:|--:|--:|---|"]
    for job in todo:
        seconds = "no times yet" if job.seconds is None else f"{job.seconds:.0f}"
        state = "there" if job.path.exists() else "too long for the text" if job.steps > most else ""
        lines.append(f"| {job.path.name} | {job.steps} | {job.steps / most:.0%} | {seconds} | {state} |")
    total = sum(job.seconds or 0 for job in todo if not job.path.exists())
    share = chosen.model.multiplications()
    return "\n".join(
        [
            *lines,
            "",
            f"{total:.0f} s are still to do. {share['block_linears'] / sum(share.values()):.1%} of the model's "
            "multiplications are in the linear layers in which the arms differ.",
        ]
    )


def run_jobs(
    todo: Iterable[Job], chosen: Settings, tokens: TokenSets, left: Left = lambda: math.inf, say: Say = print
) -> list[Path]:
    """Train what is not there yet and write a file per run; returns the paths of those that are there at the end.

    While a run trains, PATH.partial has what it has so far. A run that is predicted to take longer than is left is not
    started, and one whose time is up stops; its partial file stays. torchao changes how a process compiles, so that
    after its arm no other one is started. Where torchao is not installed its arm is not started.

    Args:
        todo: The runs, in order.
        chosen: Their settings.
        tokens: Their text.
        left: Seconds that are left.
        say: Told of each run, in a line.
    """
    there, changed = [], False
    for job in todo:
        seconds = left()
        if job.path.exists():
            say(f"{job.name}: there already, skipped")
            there.append(job.path)
        elif seconds <= 0 or (job.seconds is not None and job.seconds > seconds):
            takes = "" if job.seconds is None else f", it takes about {job.seconds:.0f} s"
            say(f"{job.name}: not started, {max(0.0, seconds):.0f} s are left{takes}")
        elif job.arm.float8 and (reason := float8_missing()):
            say(f"{job.name}: not started, {reason}")
        elif changed and not job.arm.float8:
            say(f"{job.name}: not started, torchao has changed how this process compiles; call again")
        else:
            changed = job.arm.float8 and chosen.compiled
            if _run(job, chosen, tokens, left, say):
                there.append(job.path)
    return there


def _run(job: Job, chosen: Settings, tokens: TokenSets, left: Left, say: Say) -> bool:
    """Train one run; whether it has a result."""
    elapsed, partial = Stopwatch(), job.path.with_suffix(".partial")
    job.path.parent.mkdir(parents=True, exist_ok=True)

    def document(ended: Ended) -> Document:
        facts = {
            "experiment": NAME, "title": TITLE, "arm": job.arm.slug, "arm_title": job.arm.title,
            "order": [arm.slug for arm in every_arm()].index(job.arm.slug), "seed": job.seed,
            "budget": job.budget, "steps": job.steps, "settings": chosen.document(tokens),
            "recipe": None if job.arm.recipe is None else job.arm.recipe.describe(),
            "tokens_per_step": chosen.train.batch_size * chosen.model.context,
            "multiplications": chosen.model.multiplications(),
            "wall_seconds": elapsed(),
        }  # fmt: skip
        return timed_document(facts, asdict(ended))

    def watch(run: TimedRun) -> bool:
        last = run.scores[-1]
        if chosen.train.device != "cpu":
            _check_sparse(job, run)
        unfinished = Ended(run, None, None, 0.0, _NO_MEMORY, 0)
        write_document(partial, document(unfinished))
        say(
            f"{job.name}: step {last.step}, {last.seconds:.1f} s of training, "
            f"validation {last.score.bits_per_byte:.4f} bits per byte"
        )
        return left() > 0 and math.isfinite(last.score.nats_per_token)

    ended = train_arm(job.arm, job.seed, chosen, tokens, job.steps, watch)
    last = ended.run.scores[-1].score.nats_per_token if ended.run.scores else math.nan
    if not ended.run.finished and math.isfinite(last):
        say(f"{job.name}: time is up; {partial.name} has what there is")
        return False
    write_document(job.path, document(ended))
    with contextlib.suppress(OSError):
        partial.unlink()
    if ended.test is None:
        say(f"{job.name}: diverged")
    else:
        say(f"{job.name}: test {ended.test.bits_per_byte:.4f} bits per byte, {ended.run.seconds:.1f} s of training")
    return True


def _check_sparse(job: Job, run: TimedRun) -> None:
    """A sparse phase on a GPU must have multiplied sparse."""
    for phase in run.phases:
        if phase.kind == "sparse" and not phase.sparse_products:
            raise ConfigError(
                f"{job.name}: no sparse product ran in steps {phase.start} to {phase.end}; `semisparse env` says why"
            )


def _fitting(arm: Arm, chosen: Settings, times: dict[str, Document]) -> int:
    """Steps of an arm that take the seconds of the first arm's run."""
    first = every_arm()[0]
    for needed in (first, arm):
        if needed.slug not in times:
            raise ConfigError(f"budget='seconds' needs the times of arm {needed.slug!r}; run with --time-only 60 first")
    return round(chosen.steps * mean_step(times[first.slug], first) / mean_step(times[arm.slug], arm))


def _times_path(folder: Path, arm: Arm) -> Path:
    return folder / f"{NAME}.{arm.slug}.times.json"


def _timed_settings(chosen: Settings) -> dict[str, Any]:
    """What the seconds of a step depend on, besides the arm."""
    return {
        "model": asdict(chosen.model),
        "batch_size": chosen.train.batch_size,
        "layers": chosen.train.layers,
        "score_windows": chosen.score_windows,
        "refresh_every": chosen.refresh_every,
        "compiled": chosen.compiled,
    }


def _read_as(path: Path, wanted: dict[str, Any]) -> Document:
    """The document at path, if it was made with the settings in wanted."""
    try:
        found = read(path)
    except (OSError, ValueError) as error:
        raise OutputExistsError(f"{path} is there but not a result: {error}; move it away") from error
    other = found.get("settings") if isinstance(found, dict) else None
    if other != json.loads(json.dumps(wanted)):
        raise OutputExistsError(
            f"{path} was made with settings={shown(other)}, not {wanted}; choose another folder or move it away"
        )
    made: Document = found
    return made
