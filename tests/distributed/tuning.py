"""Two ranks that share their choices, tune one model together, and of which one fails; for spawned workers."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from semisparse import _tune, tuning
from semisparse.gemm import problem as problems
from semisparse.gemm.autotune import tiles
from semisparse.gemm.autotune.autotuner import Autotuner
from semisparse.planning import wanted
from semisparse.planning.wanted import Wanted
from tests.gemm.simulated import make_engine
from tests.gemm.tuning import Timed, call

WORLD = 2
CPU = torch.device("cpu")


def made(choices: dict[str, int]) -> dict[str, Any]:
    """A state with an algorithm per problem."""
    entries = [
        {"key": {"gpu": name}, "choice": {"algorithm": number, "sparse_algorithm": number}}
        for name, number in choices.items()
    ]
    return {"schema": 1, "choices": entries}


MEASURED = [{"both": 3, "first": 1}, {"both": 5, "second": 7}]


def worker(rank: int, folder: str) -> None:
    """Share within a group of this rank alone, then among all, then tune; write what came of it."""
    torch.set_num_threads(1)
    tiles.TILE.update(dict.fromkeys(tiles.TILE, 1))  # so that small products are tuned, in this process
    os.environ["XDG_CACHE_HOME"] = f"{folder}/cache{rank}"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    alone = dist.new_group([0])
    tuning.load_state(made(MEASURED[rank]))
    counts = [tuning.share(alone), tuning.share()]
    known = {str(key["gpu"]): choice.algorithm for key, choice in tuning.choices()}
    torch.save({"counts": counts, "known": known} | tuned_together(rank), Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


def tuned_together(rank: int) -> dict[str, Any]:
    """What came of tuning four problems on the simulated library, how many this rank measured, its error in the end."""
    engine, lines = make_engine()[0], []
    tuner = Autotuner(engine, None, make_candidates=Timed, shipped=tuple)
    for module in (_tune, wanted, tuning):
        patch.object(module, "autotuner", lambda: tuner).start()
    patch.object(wanted, "engine", lambda: engine).start()
    patch.object(_tune, "measure", lambda problem, device: call(tuner, problem)).start()
    needed = [Wanted(problems.forward(8 * tokens, 32, 48, torch.bfloat16), CPU, ["layer"]) for tokens in (1, 2, 3, 4)]
    found = {one.key: one for one in needed}
    with patch.object(_tune, "wanted_by", lambda *model: (found, {})):
        report = tuning.tune(torch.nn.Identity(), progress=lines.append)
    choices = sorted((int(str(key["columns"])), choice.algorithm) for key, choice in tuner.choices())

    def fails(*model: object) -> tuple[dict[str, Wanted], dict[str, str]]:
        if rank == 0:
            raise RuntimeError("mine")
        return found, {}

    error = ""
    try:
        with patch.object(_tune, "wanted_by", fails):
            tuning.tune(torch.nn.Identity())
    except RuntimeError as raised:
        error = f"{type(raised).__name__}: {raised}"
    outcomes = [row.outcome for row in report]
    return {"outcomes": outcomes, "measured": len(lines), "choices": choices, "error": error}
