"""Clocks that jump, back or forward, while something is tuned, measured, trained, written and read."""

import itertools
import os
import random
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn

from semisparse.gemm.autotune.autotuner import Autotuner
from semisparse.gemm.autotune.selection import LEAP, NOT_REACHED
from semisparse.gemm.autotune.store import Store
from semisparse.planning import timing
from semisparse.planning.problems import LinearProblem
from semisparse.planning.store import PlanStore
from semisparse.selfcheck.contents import Report
from semisparse.selfcheck.running import SHARES, Running
from semisparse_lab.tasks.next_token import TextScore
from semisparse_lab.train.config import TrainConfig, adamw
from semisparse_lab.train.timed import Plan, TimedRun, train_timed
from tests.faults.engine import Run, product
from tests.faults.fault import Fault
from tests.faults.kinds import KINDS, Kind, Which
from tests.gemm.simulated import make_engine
from tests.planning.simulated import CPU, measurer

JUMPS = (-1e9, -3600.0, -1.0, -0.125, 1.0, 3600.0, 1e9)
"""Seconds: a step of the time service, an hour of summer, a machine that was moved."""
TICK = 2.0**-10  # so that sums of readings are exact
READ = ("time", "monotonic", "perf_counter", "process_time")


class Clock:
    """Seconds that go on a little at each reading, and jump once.

    Args:
        at: The reading before which it jumps; -1 for never.
        by: How far.
        tick: That pass between two readings.
    """

    def __init__(self, at: int = -1, by: float = 0.0, tick: float = TICK) -> None:
        self.at, self.by, self.tick = at, by, tick
        self.readings, self.passed, self.now = 0, 0.0, 1e6

    def __call__(self) -> float:
        self.passed += self.tick
        self.now += self.tick + (self.by if self.readings == self.at else 0.0)
        self.readings += 1
        return self.now


def tuning(count: int, folder: Path) -> dict[str, int]:
    """The clock jumps before each of its readings in turn: the product is right, and what is kept was tuned whole."""
    whole = Clock()
    engine = make_engine()[0]
    best = product(engine, _tuner(engine, folder / "whole", whole), engine)
    not_kept = 0
    for turn in range(count):
        clock = Clock(turn // len(JUMPS) % whole.readings, JUMPS[turn % len(JUMPS)])
        there, engine = folder / str(turn), make_engine()[0]
        choice = product(engine, _tuner(engine, there, clock), engine)
        assert choice.algorithm is not None, "all candidates are lost"
        missed = [name for name, why in choice.rejected if why == NOT_REACHED]
        if clock.by < 0:
            assert (choice, clock.readings) == (best, whole.readings), (
                f"{clock.by} s: another choice, or another way to it"
            )
        elif clock.by < LEAP:
            assert missed or choice == best, f"{clock.by} s: candidates are left out without a word"
        else:
            assert choice.note or choice == best, f"{clock.by} s: a choice that a leap cut short is kept"
        if choice.note:
            assert clock.by > LEAP and "clock" in choice.note and not there.exists(), "it is kept for other processes"
            not_kept += 1
        engine = make_engine()[0]
        again = product(engine, _tuner(engine, there, Clock()), engine)
        assert again.source == ("tuned" if choice.note else "disk"), again
        assert not choice.note or again == best, "the next process does not tune anew"
    return {"tunings that were right": count, "of them cut short by a leap, and not kept": not_kept}


def _tuner(engine: Any, folder: Path, clock: Clock) -> Autotuner:
    return Autotuner(engine, Store(folder / "semisparse"), make_candidates=Run, shipped=tuple, clock=clock)


PROBLEMS = [LinearProblem(16, 32, 32), LinearProblem(32, 32, 32), LinearProblem(16, 64, 32)]


def budgets(count: int, folder: Path) -> dict[str, int]:
    """A plan is measured under a budget: it ends, says what it did not reach, and keeps only what it measured whole."""
    budget, tick = 60.0, 2.0
    even = Clock(tick=tick)
    whole = measurer(clock=even, seconds=1e9).measure(PROBLEMS)
    readings, said = even.readings, 0
    for turn in range(count):
        clock, store = Clock(turn // len(JUMPS) * 3 % readings, JUMPS[turn % len(JUMPS)], tick), folder / str(turn)
        lines: list[str] = []
        found = measurer(clock=clock, seconds=budget, store=PlanStore(store), progress=lines.append).measure(PROBLEMS)
        assert clock.passed <= 2 * tick * readings and not any("-" in _spent(line) for line in lines), lines
        for problem in PROBLEMS:
            one = found[problem]
            for name in whole[problem].times:
                assert name in one.times or "budget" in " ".join(one.dropped.values()), f"{name} is left out unsaid"
            kept = PlanStore(store).load(measurer()._key(problem))
            assert (kept is not None) == one.final, "what a jump cut short is kept, or what was measured is lost"
            said += not one.final
        # However often it went back: no problem is begun once the budget has passed.
        long = Clock(turn % 8, -abs(clock.by), budget / 8)
        late = measurer(clock=long, seconds=budget).measure(PROBLEMS)
        assert late[PROBLEMS[-1]].times == {}, "a clock that goes back prolongs the budget"
        again = measurer(store=PlanStore(store)).measure(PROBLEMS)
        assert again == whole, "a second plan does not measure what the first one missed"
    return {"problems that a leap left out, and the next plan measured": said}


def _spent(line: str) -> str:
    return "".join(re.findall(r"\((.*) s spent\)", line))


def parts(count: int, folder: Path) -> dict[str, int]:
    """A self-check whose clock jumps: no part lasts less than no time, and all are in the report."""
    for turn in range(count):
        clock = Clock(turn % 12, JUMPS[turn % len(JUMPS)], 1.0)
        report = Report("", False, 200.0, "cuda", {}, [])
        made = Running(report, CPU, lambda line: None, lambda found: None, clock)
        late = [_part(made, name) for name in SHARES]
        assert [part.name for part in report.parts] == list(SHARES)
        assert all(part.seconds >= 0 for part in report.parts), report.parts
        assert clock.by > 0 or not any(late), "a clock that goes back ends the self-check"
        assert clock.by < LEAP or not 0 < clock.at < clock.readings or late[-1], "a leap is not said"
        with _host_clock(turn % 10, JUMPS[turn % len(JUMPS)]):
            assert timing.host_ms(lambda: None) == 1000 * TICK / 10, "a jump is in a host time"
    return {"durations below zero": 0}


def _part(made: Running, name: str) -> bool:
    made.part(name, lambda: None)
    return bool(made.late())


@contextmanager
def _host_clock(at: int, by: float) -> Iterator[None]:
    with patch.object(torch.cuda, "synchronize"), patch.object(time, "perf_counter", Clock(at, by)):
        yield


@contextmanager
def jumping(draw: random.Random) -> Iterator[None]:
    """Each reading of any clock of this process is at another time, up to thirty years away."""

    def seconds(*clock: object) -> float:
        return draw.uniform(0, 1e9)

    def nanoseconds(*clock: object) -> int:
        return draw.randrange(10**18)

    others = {f"{name}_ns": nanoseconds for name in READ} | {"clock_gettime": seconds}
    with patch.multiple(time, **dict.fromkeys(READ, seconds), **others):
        yield


def files(kind: Kind, count: int, folder: Path) -> dict[str, int]:
    """Every clock jumps while a file is saved and read, and its stamps are of 1970 or of the year 2100."""
    assert kind.write is not None
    versions = []
    for which in (0, 1):
        kind.write(folder, cast(Which, which))
        versions.append(kind.read(folder))
    draw, stamps = random.Random(count), (0.0, 4e9)
    for turn in range(count):
        orphan = folder / _orphan(kind.file)
        orphan.write_bytes(b"rest of a save that was killed")
        for path in (orphan, folder / kind.file, folder):
            os.utime(path, (stamps[turn % 2],) * 2)
        with jumping(draw):
            assert kind.read(folder) == versions[1 - turn % 2], "a stamp decides what is read"
            kind.write(folder, cast(Which, turn % 2))
            assert kind.read(folder) == versions[turn % 2], "what was saved is not read"
        assert [path.name for path in folder.iterdir()] == [kind.file], "a rest stays because of its stamp"
    return {"saves that were read back": count}


def _orphan(name: str) -> str:
    from semisparse.files import _SUFFIX, _stem

    return f"{_stem(Path(name))}{'0' * 16}{_SUFFIX}"


def trained(clock: Clock | None = None) -> tuple[TimedRun, Sequence[Tensor]]:
    """A timed run of the lab with its weights."""
    torch.manual_seed(0)
    model, config = nn.Linear(4, 4), TrainConfig(epochs=1, batch_size=1, lr=1e-2)
    batches = ((torch.full((1, 4), float(number % 3)), torch.zeros(1)) for number in itertools.count())
    with patch.object(time, "perf_counter", clock or Clock()):
        run = train_timed(model, lambda x, y: model(x).square().mean(), batches, lambda: TextScore(1.0, 2.0, 3),
                          adamw(model, config), config, Plan(steps=40, score_every=10, curve_every=5))  # fmt: skip
    return run, [parameter.detach() for parameter in model.parameters()]


def training(count: int, folder: Path) -> dict[str, int]:
    """A training that is timed: the same weights and losses, and times that never fall."""
    clock = Clock()
    even, weights = trained(clock)
    for turn in range(count):
        by = JUMPS[turn % len(JUMPS)]
        run, found = trained(Clock(turn * 7 % clock.readings, by))
        assert all(torch.equal(one, other) for one, other in zip(found, weights, strict=True)), "other weights"
        assert [point.loss for point in run.curve] == [point.loss for point in even.curve] and run.finished
        seconds = [0.0, *(point.seconds for point in run.curve)]
        assert seconds == sorted(seconds) and run.seconds == seconds[-1] and run.score_seconds >= 0
        (phase,) = run.phases
        assert phase.seconds_per_step == TICK, "a jump is in the time of a step"
        assert by > 0 or run.seconds <= even.seconds, "a clock that goes back adds time"
    return {"runs with the weights of an undisturbed one": count}


FAULTS = [
    Fault("a clock jumps", "tuning", "nothing is lost, endless, below zero or kept as if it were whole", 70, 300,
          tuning, "times"),
    Fault("a clock jumps while a plan is measured within a budget", "",
          "the budget is no longer, what it did not reach is said, and only what is whole is kept", 14, 105, budgets,
          "times"),
    Fault("a clock jumps", "self-check and host times",
          "nothing is lost, endless, below zero or kept as if it were whole", 84, 300, parts, "times"),
    Fault("a clock jumps", "timed training", "nothing is lost, endless, below zero or kept as if it were whole", 14,
          300, training, "times",
          "a leap forward of up to 10 s counts as time that a tuning took, and any leap as time that a step of "
          "training on the CPU took; medians leave it out, sums do not"),
    *(Fault("every clock jumps while a file is saved and read", kind.name, "what was saved is read, and no rest stays",
            2, 50, partial(files, kind), "saves") for kind in KINDS if kind.write is not None),
]  # fmt: skip
