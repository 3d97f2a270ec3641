"""Trainers of other packages on two gloo processes, and on one. Imported by spawned workers.

All rows of data are the same, so that gradients are those of one process, however rows are shared out.
"""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from semisparse import Phase, SparseSchedule, densify, recipes, semi_sparse_layers, sparsify

WORLD, STEPS = 2, 4
ROW = torch.linspace(-1, 1, 16)
RECIPE = recipes.safest(sparse_fraction=0.5)
HOSTS = ("transformers", "lightning", "accelerate")
Run = tuple[list[str], list[Tensor], bool]
"""Phases of the batches, the weights in the end, and whether the model is plain then."""


class Toy(nn.Module):
    """Two layers and a loss; notes the phase of each batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.seen: list[str] = []

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.seen.append("sparse" if getattr(self.up, "sparse_enabled", False) else "dense")
        return {"loss": (self.down(self.up(x).relu()) - x).square().mean()}


def ended(model: Toy) -> Run:
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    return model.seen, weights, not semi_sparse_layers(model)


def transformers(folder: Path, ranks: int) -> Run:
    from transformers import Trainer, TrainingArguments

    from semisparse.integrations.huggingface import SparseCallback

    settings: dict[str, Any] = {"max_steps": STEPS, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    options = TrainingArguments(str(folder), use_cpu=True, ddp_backend="gloo" if ranks > 1 else None, **settings)
    model, callback = Toy(), SparseCallback(RECIPE)
    Trainer(model, options, train_dataset=[{"x": ROW}] * 64, callbacks=[callback]).train()
    assert callback.schedule is not None and callback.schedule.applied_steps == STEPS
    return ended(model)


def lightning(folder: Path, ranks: int) -> Run:
    import lightning.pytorch as pl

    from semisparse.integrations.lightning import SparseCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.toy = Toy()

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.toy(batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    several: dict[str, Any] = {"strategy": "ddp", "devices": ranks} if ranks > 1 else {}
    module, callback = Module(), SparseCallback(RECIPE)
    trainer = pl.Trainer(max_steps=STEPS, accelerator="cpu", callbacks=[callback], **quiet, **several)
    trainer.fit(module, DataLoader([ROW] * 64, batch_size=4))
    assert callback.schedule is not None and callback.schedule.applied_steps == STEPS
    return ended(module.toy)


def accelerate(folder: Path, ranks: int) -> Run:
    from accelerate import Accelerator

    accelerator, model = Accelerator(cpu=True), Toy()
    sparsify(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = SparseSchedule(model, [Phase("sparse", STEPS // 2), Phase("dense", STEPS // 2)])
    rows = [ROW] * (4 * STEPS * ranks)
    wrapped, optimizer, batches = accelerator.prepare(model, optimizer, DataLoader(rows, batch_size=4))
    for batch in batches:
        accelerator.backward(wrapped(batch)["loss"])
        optimizer.step()
        optimizer.zero_grad()
        schedule.step(skipped=optimizer.step_was_skipped)
    densify(accelerator.unwrap_model(wrapped))
    return ended(model)


def worker(rank: int, host: str, port: int, folder: str) -> None:
    """One host in one of two processes, as torchrun starts it."""
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    os.environ["TORCHELASTIC_RUN_ID"] = "none"
    found = {"transformers": transformers, "lightning": lightning, "accelerate": accelerate}[host](Path(folder), WORLD)
    torch.save((found, dist.get_world_size()), Path(folder) / f"{host}{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
