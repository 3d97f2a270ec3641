"""Runs a function on two GPUs, a process for each, over NCCL."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

WORLD = 2


def on_two_gpus(worker: Callable[..., None], folder: Path, *more: object) -> list[dict]:
    """What each rank saved as folder/rankRANK.pt; skips the test where there are fewer GPUs.

    Args:
        worker: Called with rank, folder and what else is given.
        folder: New, empty.
        *more: For worker.
    """
    if torch.cuda.device_count() < WORLD:
        pytest.skip("needs two GPUs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NCCL_NVLS_ENABLE", "0")
        patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.multiprocessing.spawn(worker, args=(str(folder), *more), nprocs=WORLD)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]
