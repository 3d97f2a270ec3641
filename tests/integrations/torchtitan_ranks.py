"""torchtitan.train, the program that users start, on the CPU. Imported by spawned workers, before torchtitan.

torchtitan asks which accelerator there is, and says CUDA where there is none; here the answer is the CPU. All else is
its own: command line, Trainer, sharding, loop, checkpoints. What it imports for settings that the tests do not have
(datasets, TensorBoard) need not be installed.
"""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

UNUSED = {
    "datasets": ("Dataset", "load_dataset"),
    "datasets.distributed": ("split_dataset_by_node",),
    "tensorboard": (),
    "torch.utils.tensorboard": ("SummaryWriter",),
}


def as_if_the_cpu_were_an_accelerator() -> None:
    """What torchtitan asks torch.cuda, torch.cpu answers."""
    torch._utils._get_available_device_type = lambda: "cpu"
    answers: dict[str, Any] = {
        "current_device": lambda: 0,
        "empty_cache": lambda: None,
        "get_device_name": lambda *_: "CPU",
        "get_device_properties": lambda *_: SimpleNamespace(total_memory=2**30),
        "memory_stats": lambda *_: {},
        "reset_peak_memory_stats": lambda *_: None,
    }
    for name, answer in answers.items():
        setattr(torch.cpu, name, answer)
    if not hasattr(torch.distributed, "set_timeout"):  # torch 2.13 has it under its former name
        torch.distributed.set_timeout = torch.distributed.distributed_c10d._set_pg_timeout


def without_what_is_not_used() -> None:
    """Empty modules for those of UNUSED that are not installed."""
    for name, contents in UNUSED.items():
        package = "tensorboard" if "tensorboard" in name else "datasets"
        if isinstance(sys.modules.get(package), ModuleType) or importlib.util.find_spec(package) is None:
            sys.modules[name] = ModuleType(name)
            for content in contents:
                setattr(sys.modules[name], content, None)


def graphs() -> int:
    """How many were compiled."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def worker(rank: int, world: int, port: int, folder: str, options: list[str]) -> None:
    """One process of torchrun."""
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    as_if_the_cpu_were_an_accelerator()
    without_what_is_not_used()
    from torchtitan.train import main

    from tests.integrations import torchtitan_toy as toy

    sys.argv = ["train", "--module", toy.__name__, "--config", "toy", "--dump_folder", folder, *options]
    main()
    weights = [getattr(weight, "_local_tensor", weight).detach() for part in toy.PARTS for weight in part.parameters()]
    found = {"phases": toy.PHASES, "losses": toy.LOSSES, "weights": weights, "graphs": graphs()}
    torch.save(found, Path(folder) / f"{rank}.pt")
