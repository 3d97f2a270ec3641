"""Forks while another thread is inside semisparse: the child must not wait for a thread that it does not have."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from semisparse import SparseConfig, SparseSchedule, forks, sparsify, tuning
from semisparse.formats import packed
from semisparse.gemm.autotune.autotuner import autotuner
from semisparse.gemm.engine import engine
from semisparse.ops import packing_many
from tests.faults.engine import _tuner, product
from tests.faults.fault import Fault, ended, forked
from tests.faults.training import digest
from tests.gemm.simulated import make_engine

PATIENCE = 20
"""Seconds after which a child hangs; one takes a tenth."""


class Packing:
    """A training whose weights are packed once per step, which takes locks of layers and of plans."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
        sparsify(self.model, SparseConfig(precision="fp8"))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.schedule = SparseSchedule.sparse_then_dense(self.model, 20, pack="per_step")

    def steps(self, first: int, end: int) -> str:
        """Train; the digest of the weights."""
        for number in range(first, end):
            x = torch.randn(16, 32, generator=torch.Generator().manual_seed(number))
            self.model(x).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
        return digest(self.model.state_dict())


def locks(*owners: object) -> list[Any]:
    """The locks of these that a child gets anew."""
    found = [getattr(owner, name) for owner in owners for name in forks._LOCKS[owner]]
    assert found, "no lock"
    return found


def held(count: int, folder: Path) -> dict[str, int]:
    """One lock after the other is held by a thread while a process is forked: the child trains on, and tunes."""
    sparse = make_engine()[0]
    tuner = _tuner(sparse, folder / "choices")
    every = locks(packed, packing_many, engine(), autotuner(), sparse, tuner)
    for turn in range(count):
        begin, answer = 2 + turn % 12, folder / "digest"
        run, lock = Packing(), every[turn % len(every)]
        run.steps(0, begin)
        mine = locks(run.schedule.packed_weights)
        assert run.schedule.packed_weights.layers == 2, "nothing is packed per step"
        with elsewhere([lock, *mine]):
            child = forked(partial(_go_on, run, begin, answer, lambda: product(sparse, tuner, sparse)))
        code = ended(child)
        assert code != -signal.SIGALRM, "the child waits for a lock of a thread that is not there"
        assert code == 0 and answer.read_text() == run.steps(begin, begin + 2), "the two processes differ"
        answer.unlink()
    return {"children that hang": 0}


def _go_on(run: Packing, begin: int, answer: Path, multiplies: Callable[[], object]) -> None:
    signal.alarm(PATIENCE)
    tuning.load_state(tuning.state())
    multiplies()
    answer.write_text(run.steps(begin, begin + 2))


@contextmanager
def elsewhere(locks: list[Any]) -> Iterator[None]:
    """Another thread holds locks inside the block."""
    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        with ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            taken.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    try:
        yield
    finally:
        done.set()
        thread.join()


FAULTS = [
    Fault("fork while another thread packs, tunes or multiplies", "",
          "the child waits for no lock, and has the same bits", 6, 60, held, "forks"),
]  # fmt: skip
