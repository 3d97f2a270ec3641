"""C1: minutes of everything at once: shapes in turn, threads, streams, graphs, layers that come and go, and kills."""

import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.trust.cases import CASES, Case, cases, make_layer, normal, step
from tests.trust.determinism import Subject, churn, together
from tests.trust.graphs import model
from tests.trust.leaks import DEVICE_BYTES, HOST_BYTES
from tests.trust.machine import Machine, differing
from tests.trust.outcome import Part, Row
from tests.trust.resumed import KILLS, Trainings

THREADS = 4
CYCLES = 500
"""Fewest cycles, of which each is a step of some kind."""

MOST = 1_000
"""Faults after which it ends."""

WARM, EACH, POLL = 0.1, 10.0, 0.05
"""The share of time that is the warm-up; seconds until results are written again, and until they are looked at."""

SHAPES = (
    (64, 128, 256), (200, 256, 128), (513, 256, 512), (1000, 512, 256), (31, 512, 512), (1032, 128, 128),
)  # fmt: skip


def run(
    machine: Machine, part: Part, shapes: tuple[tuple[int, int, int], ...] = SHAPES, cycles: int = CYCLES,
    kills: int = KILLS,
) -> None:  # fmt: skip
    """Run for what is left of the budget once all is set up, at least half of it; a tenth is the warm-up.

    Args:
        machine: Where.
        part: Gets the rows.
        shapes: M, K, N of the layers.
        cycles: Fewest that are asked for.
        kills: Of each training beside the threads; 0 for none.
    """
    machine.tune_quickly()
    subjects = [Subject(machine, case, shape) for case in cases(machine, tuple(CASES)) for shape in shapes]
    replays = [_replayed(machine, case, shapes[0]) for case in cases(machine, ("2:4, bf16", "fp8 + 2:4"))]
    faults: list[str] = []
    counts = [0] * THREADS
    replaying = threading.Lock()
    seconds = max(part.left(), part.seconds / 2)
    begin = part.clock()
    found = Found(part, seconds, cycles, faults, counts)

    def within(share: float) -> Callable[[], bool]:
        return lambda: part.clock() - begin < share * seconds

    every = threading.Barrier(THREADS + 1)

    def work(at: int) -> None:
        chance = random.Random(at)
        with ending(every), machine.streams(1)[0]():
            for until in (within(WARM), within(1)):
                counts[at] = 0
                while until() and len(faults) < MOST:
                    cycle(at, chance)
                    counts[at] += 1
                every.wait()
                every.wait()  # memory is looked at in between

    def measure() -> None:
        with ending(every):
            for _ in range(2):
                while every.n_waiting < THREADS and not every.broken:
                    time.sleep(POLL)
                    found.tell_now_and_then()
                every.wait()
                found.memory.append((machine.allocated(), machine.resident()))
                every.wait()

    def cycle(at: int, chance: random.Random) -> None:
        churn(machine, chance.randrange(64))
        what = chance.random()
        if what < 0.8:
            subject = chance.choice(subjects)
            if int(subject.wrong()):
                faults.append(f"{subject.name}, thread {at}")
        elif what < 0.95:
            with replaying:  # a graph writes into memory of its own: one replay of it at a time
                name, replayed = chance.choice(replays)
                if replayed(chance.randrange(1000)):
                    faults.append(f"{name}, thread {at}")
        else:
            case = chance.choice(cases(machine, tuple(CASES)))
            layer = make_layer(machine, case, 64, 96)
            step(layer, *(normal(machine, 32, size, seed=1, dtype=case.dtype) for size in (64, 96)))

    works: list[Callable[[], object]] = [*(lambda at=at: work(at) for at in range(THREADS)), measure]
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        if kills:
            found.killed = killed = Trainings(Path(folder), each=kills)
            works.append(lambda: killed.run(lambda: seconds - (part.clock() - begin)))
        found.raised = together(works)
    found.tell()


@dataclass
class Found:
    """What a soak found, while it runs.

    Attributes:
        part: Gets the rows.
        seconds: That it runs.
        cycles: Fewest that are asked for.
        faults: Steps with other bits.
        counts: Cycles of each thread.
        memory: Of the device and of the process, after the warm-up and at the end.
        raised: Errors of threads.
        told: When it was written down.
        killed: Trainings beside the threads.
    """

    part: Part
    seconds: float
    cycles: int
    faults: list[str]
    counts: list[int]
    memory: list[tuple[int, int]] = field(default_factory=list)
    raised: list[str] = field(default_factory=list)
    told: float = 0.0
    killed: Trainings | None = None

    def tell_now_and_then(self) -> None:
        """Write down what there is, each EACH seconds."""
        if self.part.clock() - self.told > EACH:
            self.tell()

    def tell(self) -> None:
        """Replace the rows."""
        self.told = self.part.clock()
        done, warm = sum(self.counts), "after" if self.memory else "in"
        size = f"{done} cycles of {THREADS} threads"
        growth = [new - old for old, new in zip(*self.memory, strict=True)] if len(self.memory) == 2 else [None, None]
        self.part.renew(
            [
                Row("C1", "threads that raised", f"of {THREADS}", len(self.raised), faults=self.raised),
                Row("C1", f"cycles {warm} the warm-up", f"in {self.seconds:.0f} s", done, self.cycles, "at least"),
                Row("C1", "steps with other bits", size, len(self.faults), faults=self.faults),
                Row("C1", "growth on the device in bytes", size, growth[0], DEVICE_BYTES),
                Row("C1", "growth of the process in bytes", size, growth[1], HOST_BYTES),
                *(self.killed.rows(self.seconds) if self.killed else []),
            ]
        )


@contextmanager
def ending(every: threading.Barrier) -> Iterator[None]:
    """Where this thread raises, the others do not wait for it."""
    try:
        yield
    except BaseException:
        every.abort()
        raise


def _replayed(machine: Machine, case: Case, shape: tuple[int, int, int]) -> tuple[str, Callable[[int], int]]:
    """A captured step of a model, and what compares a replay of it, on new inputs, with an eager step."""
    m, k, n = shape
    net = model(machine, case, integers=False, sizes=(k, n))
    x, dy = (normal(machine, m, k, seed=at, dtype=case.dtype) for at in (5, 6))
    step(net, x, dy)
    recorded, replay = machine.capture(lambda: step(net, x, dy))
    machine.wait()

    def compare(seed: int) -> int:
        x.copy_(normal(machine, m, k, seed=seed, dtype=case.dtype))
        replay()
        wrong = int(differing(step(net, x, dy), recorded))
        if machine.cuda:
            torch.cuda.current_stream().synchronize()
        return wrong

    return f"replay of {case.name}", compare
