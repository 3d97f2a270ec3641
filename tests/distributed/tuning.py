"""Two ranks that tuned different problems and share their choices; imported by spawned workers."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from semisparse import tuning

WORLD = 2


def made(choices: dict[str, int]) -> dict[str, Any]:
    """A state with an algorithm per problem."""
    entries = [
        {"key": {"gpu": name}, "choice": {"algorithm": number, "sparse_algorithm": number}}
        for name, number in choices.items()
    ]
    return {"schema": 1, "choices": entries}


MEASURED = [{"both": 3, "first": 1}, {"both": 5, "second": 7}]


def worker(rank: int, folder: str) -> None:
    """Share within a group of this rank alone, then among all, and write what was shared and what is known then."""
    torch.set_num_threads(1)
    os.environ["XDG_CACHE_HOME"] = f"{folder}/cache{rank}"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    alone = dist.new_group([0])
    tuning.load_state(made(MEASURED[rank]))
    counts = [tuning.share(alone), tuning.share()]
    known = {str(key["gpu"]): choice.algorithm for key, choice in tuning.choices()}
    torch.save({"counts": counts, "known": known}, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
