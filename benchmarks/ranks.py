"""Several GPUs: what benchmarks of one process per GPU share. They are started by torchrun."""

import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.timing import device, synchronize
from semisparse_lab.models.llama import LlamaConfig

CONTEXT = 2048
MODEL = LlamaConfig(vocabulary=32000, context=CONTEXT, width=4096, hidden=11008, depth=4, heads=32)
TOY = LlamaConfig(vocabulary=512, context=16, width=64, hidden=128, depth=2, heads=2)


class Bytes(TorchDispatchMode):
    """What this rank hands to collectives, in bytes by name."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and args:
            given = args[0] if "allreduce" in str(func) else args[1]
            given = given if isinstance(given, (list, tuple)) else [given]
            count = sum(one.nbytes for one in given if isinstance(one, Tensor))
            name = func._opname.strip("_")
            self.sent[name] = self.sent.get(name, 0) + count
        return func(*args, **(kwargs or {}))


def join() -> None:
    """Become one of the processes that torchrun started, each with a GPU of its own where there are GPUs."""
    if device() == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device() == "cuda" else "gloo")


def leave() -> None:
    """Leave the other processes, all at the same time: gloo may abort where one goes while others write results."""
    dist.barrier()
    dist.destroy_process_group()


def setting() -> dict[str, Any]:
    """What a result of several ranks says of them."""
    nccl = {name: value for name, value in os.environ.items() if name.startswith("NCCL_")}
    return {"ranks": dist.get_world_size(), "nccl": nccl}


def step_of(model: nn.Module, config: LlamaConfig, batch: int, rate: float) -> Callable[[], Tensor]:
    """One training step with fused AdamW on tokens of this rank's own; returns the loss.

    Args:
        model: A Llama, perhaps inside a wrapper.
        config: Its sizes.
        batch: Sequences per rank, of as many tokens as config.context.
        rate: Learning rate.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=device() == "cuda")
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens = torch.randint(0, config.vocabulary, (batch, config.context), generator=generator).to(device())

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        logits = model(tokens).float()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def milliseconds(call: Callable[[], object], count: int) -> float:
    """Mean time of count calls, after one more; all ranks begin together."""
    call()
    synchronize()
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(count):
        call()
    synchronize()
    return 1000 * (time.perf_counter() - begin) / count
