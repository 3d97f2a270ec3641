"""One of several gloo ranks is killed, stalls, or is set otherwise: the others get an error in time, and none hangs."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from semisparse import LossGuard, SparseConfig, SparseSchedule, recipes, sparsify, tuning
from semisparse.errors import RankMismatchError, SemiSparseError
from semisparse.gemm.autotune.algorithm import Choice
from semisparse.gemm.autotune.store import to_document
from semisparse.recipes import RecipeSchedule
from tests.faults.fault import Fault, ended, forked
from tests.faults.training import digest

TIMEOUT = 3.0
"""Seconds of a group in which a rank is lost; else it has time for a slow machine."""
SLACK = 2.0
"""Seconds beyond it in which a rank must have its error."""
PATIENCE = 120.0


Scenario = Callable[[int, bool, Path], None]
"""Of a rank, whether it is the odd one, and the file in which it notes the time of its end."""


class Run:
    """A few steps of data-parallel training with held masks, a guard and shared choices.

    Args:
        rank: Of this process.
        odd: Whether this is the rank that is set otherwise.
        changes: Of its settings.
    """

    def __init__(self, rank: int, odd: bool, **changes: Any) -> None:
        settings = {"refresh_every": 2, "seed": 0, "config": None, "steps": 40} | (changes if odd else {})
        torch.manual_seed(settings["seed"])
        recipe = recipes.fst(refresh_every=settings["refresh_every"])
        model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
        sparsify(model, settings["config"] or recipe.config)
        self.model: nn.Module = model if changes.get("seed") else DistributedDataParallel(model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.schedule: Any
        if settings["config"] is None and "config" not in changes:
            self.schedule = RecipeSchedule(recipe, self.model, self.optimizer, settings["steps"])
        else:
            self.schedule = SparseSchedule.sparse_then_dense(self.model, settings["steps"])
        self.rank = rank

    def step(self, number: int) -> None:
        """One step on data of this rank."""
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(100 * number + self.rank))
        self.optimizer.zero_grad()
        self.model(x).square().mean().backward()
        self.optimizer.step()
        self.schedule.step()


def die(now: Path) -> None:
    """As kill -9 does."""
    now.write_text(str(time.monotonic()))
    os.kill(os.getpid(), signal.SIGKILL)


def stall(now: Path) -> None:
    """Until this process is killed; or as long as a test may take."""
    now.write_text(str(time.monotonic()))
    time.sleep(60)
    os._exit(0)


def training(fault: Callable[[Path], None], rank: int, odd: bool, now: Path) -> None:
    """Something happens in the third step."""
    run = Run(rank, odd)
    for number in range(20):
        if odd and number == 2:
            fault(now)
        run.step(number)


def starting(fault: Callable[[Path], None], rank: int, odd: bool, now: Path) -> None:
    """Something happens before the schedule compares what ranks hold."""
    model = nn.Sequential(nn.Linear(16, 16))
    sparsify(model)
    if odd:
        fault(now)
    SparseSchedule.sparse_then_dense(model, 10)


def sharing(fault: Callable[[Path], None], rank: int, odd: bool, now: Path) -> None:
    """Something happens before choices are shared."""
    if odd:
        fault(now)
    tuning.share()


def guarding(fault: Callable[[Path], None], rank: int, odd: bool, now: Path) -> None:
    """Something happens while losses are averaged over ranks."""
    model = nn.Sequential(nn.Linear(16, 16))
    sparsify(model)
    schedule = SparseSchedule.sparse_then_dense(model, 100)
    guard = LossGuard(schedule, smoothing=4, interval=2, patience=2)
    for number in range(1, 20):
        if odd and number == 5:
            fault(now)
        schedule.resume_at(number)
        guard.update(torch.tensor(1.0))


def tuning_together(fault: Callable[[Path], None], rank: int, odd: bool, now: Path) -> None:
    """Something happens while all products of a model are tuned by all ranks: in the forward that looks for them."""

    class Ends(nn.Identity):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if odd:
                fault(now)
            return x

    model = nn.Sequential(Ends(), nn.Linear(16, 16))
    sparsify(model)
    tuning.tune(model, torch.ones(8, 16))


def gathering(fault: Callable[[Path], None], rank: int, odd: bool, now: Path) -> None:
    """Something happens while other ranks gather compressed weights."""
    from torch.distributed.fsdp import fully_shard  # which other faults do not need; on_ranks has imported it

    from semisparse.integrations.fsdp import compress_all_gather

    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    sparsify(model)
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    compress_all_gather(model)
    dist.barrier()
    for number in range(4):
        if odd and number == 2:
            fault(now)
        model(torch.ones(8, 16)).sum().backward()


def otherwise(changes: dict[str, Any], rank: int, odd: bool, now: Path) -> None:
    """One rank has other settings."""
    run = Run(rank, odd, **changes)
    for number in range(3):
        run.step(number)


def not_a_number(rank: int, odd: bool, now: Path) -> None:
    """The loss of one rank is NaN in one step: the scaler skips it on every rank, and all go on alike."""
    run, scaler = Run(rank, odd), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number in range(6):
        run.optimizer.zero_grad()
        loss = run.model(torch.full((8, 16), float(1 + rank + number))).square().mean()
        scaler.scale(loss * (float("nan") if odd and number == 3 else 1.0)).backward()
        scaler.step(run.optimizer)
        scaler.update()
        run.schedule.step(scaler)
    assert run.schedule.applied_steps == 5
    alike(digest([run.model.state_dict(), run.schedule.state_dict()["applied_steps"]]))


def another_cache(rank: int, odd: bool, now: Path) -> None:
    """Each rank measured another algorithm for a problem, and one more problem than the others."""
    entries = [({"gpu": name}, Choice(rank, rank, 1.0, None, "tuned")) for name in ("both", f"own {rank}")]
    tuning.load_state(to_document(entries))
    assert tuning.share() == 1 + dist.get_world_size()
    alike(json.dumps(sorted((str(key["gpu"]), choice.algorithm) for key, choice in tuning.choices())))


def alike(mine: str) -> None:
    """Every rank has the same text."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    assert len(set(found)) == 1, "the ranks differ"


DEAD: dict[str, Scenario] = {
    f"{name} {where.__name__}": partial(where, how)
    for name, how in (("killed while", die), ("stalled while", stall))
    for where in (training, starting, sharing, guarding, tuning_together, gathering)
}
OTHERWISE: dict[str, Scenario] = {
    "another refresh": partial(otherwise, {"refresh_every": 3}),
    "another length": partial(otherwise, {"steps": 80}),
    "another mask": partial(otherwise, {"config": SparseConfig(weight="row")}),
    "other weights": partial(otherwise, {"seed": 1}),
}


ALIKE: dict[str, Scenario] = {"NaN": not_a_number, "another tuning cache": another_cache}


def _rank(scenario: Scenario, timeout: float, world: int, rank: int, folder: Path) -> None:
    """Run a scenario; the last rank is the odd one. Writes the error that it ended in, and when."""
    os.environ["GLOO_SOCKET_IFNAME"] = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
                            timeout=timedelta(seconds=timeout))  # fmt: skip
    dist.barrier()
    kinds: list[str] = []
    try:
        scenario(rank, rank == world - 1, folder / "now")
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
    (folder / f"rank{rank}").write_text(json.dumps([kinds, time.monotonic()]))
    os._exit(0)  # a group whose rank is gone cannot be taken down together


@cache
def _warm() -> None:
    """What the first step of an optimizer imports takes longer than the groups wait."""
    model = nn.Linear(16, 16)
    model(torch.ones(1, 16)).sum().backward()
    torch.optim.AdamW(model.parameters()).step()


def on_ranks(scenario: Scenario, timeout: float, world: int, folder: Path) -> list[tuple[list[str], float] | None]:
    """What each rank ended in and when; None for one that was killed."""
    _warm()
    if getattr(scenario, "func", None) is gathering:
        import_module("semisparse.integrations.fsdp")  # takes half a second, and groups of lost ranks wait for three
    folder.mkdir()
    begin = time.monotonic()
    children = [forked(partial(_rank, scenario, timeout, world, rank, folder)) for rank in range(world)]
    for child in children[:-1]:
        ended(child)
    if timeout == TIMEOUT:
        os.kill(children[-1], signal.SIGKILL)  # a rank that stalls
    ended(children[-1])
    assert time.monotonic() - begin < PATIENCE, "a rank hangs"
    answers = [folder / f"rank{rank}" for rank in range(world)]
    return [json.loads(answer.read_text()) if answer.exists() else None for answer in answers]


def lost(how: str, world: int, count: int, folder: Path) -> dict[str, int]:
    """One rank is gone: each survivor has an error within the timeout of the group and two seconds."""
    chosen = [name for name in DEAD if name.startswith(how)]
    slowest = 0.0
    for turn in range(count):
        name, there = chosen[turn % len(chosen)], folder / str(turn)
        survivors = on_ranks(DEAD[name], TIMEOUT, world, there)[:-1]
        begin = float((there / "now").read_text())
        for answer in survivors:
            assert answer is not None and answer[0], f"{name}: a survivor ended without an error"
            seconds = answer[1] - begin
            assert seconds < TIMEOUT + SLACK, f"{name}: a survivor waited {seconds:.1f} s"
            assert "RuntimeError" in answer[0], f"{name}: {answer[0][0]}"
            slowest = max(slowest, seconds)
    return {"survivors that hang": 0, "ms until the slowest survivor had its error": round(1000 * slowest)}


def other(world: int, count: int, folder: Path) -> dict[str, int]:
    """One rank is set otherwise: every rank says so."""
    chosen = list(OTHERWISE)
    for turn in range(count):
        name = chosen[turn % len(chosen)]
        for answer in on_ranks(OTHERWISE[name], 60.0, world, folder / str(turn)):
            assert answer is not None and answer[0], f"{name}: a rank ended without an error"
            assert RankMismatchError.__name__ in answer[0], f"{name}: {answer[0][0]}"
            assert SemiSparseError.__name__ in answer[0]
    return {"RankMismatchError on every rank": count}


def together(world: int, count: int, folder: Path) -> dict[str, int]:
    """One rank meets something that the others do not: afterwards all hold the same."""
    chosen = list(ALIKE)
    for turn in range(count):
        name = chosen[turn % len(chosen)]
        for answer in on_ranks(ALIKE[name], 60.0, world, folder / str(turn)):
            assert answer is not None and not answer[0], f"{name}: {answer}"
    return {"ranks that differ": 0}


_IN_TIME = f"an error on each survivor within the timeout of the group ({TIMEOUT:.0f} s) and {SLACK:.0f} s"

FAULTS = [
    *(Fault("one gloo rank is killed", f"{world} ranks", _IN_TIME, change, 24, partial(lost, "killed while", world),
            "times") for world, change in ((2, 2), (4, 0))),
    *(Fault("one gloo rank stalls", f"{world} ranks", _IN_TIME, 0, 12, partial(lost, "stalled while", world), "times")
      for world in (2, 4)),
    *(Fault("one gloo rank has other settings or weights", f"{world} ranks", "RankMismatchError on every rank", change,
            12, partial(other, world), "times") for world, change in ((2, 1), (4, 0))),
    *(Fault("one gloo rank has a loss of NaN, or another tuning cache", f"{world} ranks", "all ranks go on alike",
            change, 12, partial(together, world), "times") for world, change in ((2, 1), (4, 0))),
]  # fmt: skip
