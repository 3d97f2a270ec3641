"""Trainers of other packages with FSDP2 on two gloo processes, and on one. Imported by spawned workers.

transformers and accelerate shard on GPUs only. Here their record of the kind of processes says that they are GPUs; all
else is theirs, and runs on the CPU. Each of them saves in the middle of a sparse phase and goes on from there.
torchtitan's Trainer has tests of its own; here its parts do what it does, beside one process with the same numbers.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import DataLoader

from semisparse import Phase, SparseSchedule, recipes, semi_sparse_layers, sparsify

WORLD, STEPS, SAVED = 2, 6, 2
ROW = torch.linspace(-1, 1, 16)
RECIPE = recipes.safest(sparse_fraction=2 / 3)
SEEN = ["sparse"] * 4 + ["dense"] * 2
Found = dict[str, Any]


class Block(nn.Module):
    """What is sharded as one."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Model(nn.Module):
    """Two blocks and a loss; notes the phase of each batch, and whether the weights are shards then."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.seen: list[str] = []
        self.sharded = False

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = self.blocks[0]
        self.seen.append("sparse" if getattr(first.up, "sparse_enabled", False) else "dense")
        self.sharded = isinstance(first.up.weight, DTensor)
        y = x
        for block in self.blocks:
            y = block(y)
        return {"loss": (y - 2 * x).square().mean()}


def ended(model: nn.Module, seen: list[str], sharded: bool) -> Found:
    """Phases of the batches, whole weights, whether they were shards, and whether layers are sparse in the end."""
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return {
        "seen": seen,
        "weights": [weight.detach().clone() for weight in whole],
        "sharded": sharded,
        "sparse": any(layer.sparse_enabled for layer in semi_sparse_layers(model).values()),
    }


def as_if_on_gpus() -> None:
    """Let accelerate, which transformers builds on, shard on the CPU."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    PartialState().distributed_type = DistributedType.MULTI_GPU


def transformers(folder: Path, ranks: int, resume: bool = False) -> Found:
    from transformers import Trainer, TrainingArguments

    from semisparse.integrations.huggingface import SparseCallback

    shards = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["Block"]}
    several: dict[str, Any] = {"ddp_backend": "gloo", "fsdp": True, "fsdp_config": shards} if ranks > 1 else {}
    saving = {"save_strategy": "steps" if ranks > 1 else "no", "save_steps": SAVED}
    quiet = {"report_to": "none", "disable_tqdm": True}
    options = TrainingArguments(str(folder), use_cpu=True, max_steps=STEPS, **saving, **quiet, **several)
    assert options.device.type == "cpu"
    if ranks > 1:
        as_if_on_gpus()
    model, callback = Model(), SparseCallback(RECIPE)
    trainer = Trainer(model, options, train_dataset=[{"x": ROW}] * 128, callbacks=[callback])
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVED}") if resume else None)
    assert callback.schedule is not None and callback.schedule.applied_steps == STEPS
    return ended(model, model.seen, model.sharded)


def lightning(folder: Path, ranks: int, resume: bool = False) -> Found:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import ModelParallelStrategy

    from semisparse.integrations.lightning import SparseCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def configure_model(self) -> None:
            if ranks > 1 and not isinstance(self.model.blocks[0].up.weight, DTensor):
                for part in (*self.model.blocks, self.model):
                    fully_shard(part, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.model(batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    module, callback = Module(), SparseCallback(RECIPE)
    saving = ModelCheckpoint(folder / "saved", filename="{step}", every_n_train_steps=SAVED, save_top_k=-1)
    several: dict[str, Any] = {"strategy": ModelParallelStrategy(), "devices": ranks} if ranks > 1 else {}
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        max_steps=STEPS, accelerator="cpu", callbacks=[callback, saving], default_root_dir=folder, **quiet, **several
    )
    saved = str(folder / "saved" / f"step={SAVED}.ckpt") if resume else None
    trainer.fit(module, DataLoader([ROW] * 128, batch_size=4), ckpt_path=saved)
    assert callback.schedule is not None and callback.schedule.applied_steps == STEPS
    return ended(module.model, module.model.seen, module.model.sharded)


def accelerate(folder: Path, ranks: int, resume: bool = False) -> Found:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState

    plugin = None
    if ranks > 1:
        PartialState(cpu=True)
        as_if_on_gpus()
        policy = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["Block"]}
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False, **policy)
    accelerator, model = Accelerator(cpu=True, fsdp_plugin=plugin), Model()
    sparsify(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = SparseSchedule(model, [Phase("sparse", 4), Phase("dense", STEPS - 4)])
    rows = [ROW] * (4 * STEPS * ranks)
    wrapped, optimizer, batches = accelerator.prepare(model, optimizer, DataLoader(rows, batch_size=4))
    accelerator.register_for_checkpointing(schedule)
    if resume:
        accelerator.load_state(str(folder / "saved"))
        batches = accelerator.skip_first_batches(batches, SAVED)
    for batch in batches:
        accelerator.backward(wrapped(batch)["loss"])
        optimizer.step()
        optimizer.zero_grad()
        schedule.step(skipped=optimizer.step_was_skipped)
        if ranks > 1 and not resume and schedule.applied_steps == SAVED:
            accelerator.save_state(str(folder / "saved"))
    assert schedule.applied_steps == STEPS
    return ended(model, model.seen, model.sharded)


def torchtitan(folder: Path, ranks: int, resume: bool = False) -> Found:
    from torchtitan.components.optimizer.optimizer import default_adamw
    from torchtitan.models.llama3 import model_registry

    from semisparse.integrations.torchtitan import ScheduleHook, SemiSparseConverter

    hook = ScheduleHook(STEPS, RECIPE)
    converter = SemiSparseConverter.Config(sparse=RECIPE.config, select=["feed_forward"])
    spec = replace(model_registry("debugmodel", converters=[converter]), post_optimizer_build_fn=hook)

    def built(shard: bool) -> nn.Module:
        with torch.device("meta"):
            model = spec.model.build()
        if shard:
            _shard(model)
        torch.manual_seed(0)
        model.to_empty(device="cpu").init_states(buffer_device=None)
        for block in model.layers.values():
            block.attention.inner_attention.forward = _attend  # its own wants masks of a compiled kernel
        return model

    model = whole = built(shard=False)
    if ranks > 1:  # shards draw other numbers than whole weights
        model = built(shard=True)
        with torch.no_grad():
            for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
                ours.copy_(distribute_tensor(theirs, ours.device_mesh, ours.placements))
    optimizers = default_adamw(lr=1e-3).build(model_parts=[model])
    spec.post_optimizer_build_fn(optimizers, [model], None)
    first, seen = next(iter(semi_sparse_layers(model).values())), []
    for step in range(STEPS):
        seen.append("sparse" if first.sparse_enabled else "dense")
        tokens = torch.randint(0, 500, (2, 16), generator=torch.Generator().manual_seed(step))
        (model(tokens).float().square().mean() / ranks).backward()  # its gradients are summed over the ranks
        optimizers.step()
        optimizers.zero_grad()
    sharded = isinstance(first.weight, DTensor)
    return ended(model, seen, sharded)


def _shard(model: nn.Module) -> None:
    """As torchtitan shards a decoder, but for how gloo sums."""
    from torchtitan.distributed.fsdp import apply_fsdp_to_decoder

    mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("fsdp",))
    kept = {"param_dtype": torch.float32, "reduce_dtype": torch.float32, "reshard_after_forward_policy": "default"}
    apply_fsdp_to_decoder(model, mesh, pp_enabled=False, cpu_offload=False, **kept)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


def _attend(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    heads = (operand.transpose(1, 2) for operand in (q, k, v))
    return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)


HOSTS = {"transformers": transformers, "lightning": lightning, "accelerate": accelerate, "torchtitan": torchtitan}
SAVING = ("transformers", "lightning", "accelerate")


def worker(rank: int, host: str, port: int, folder: str, resume: bool) -> None:
    """One host in one of two processes, as torchrun starts it."""
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    os.environ["TORCHELASTIC_RUN_ID"] = "none"
    if host not in SAVING:
        dist.init_process_group("gloo")
    found = HOSTS[host](Path(folder), WORLD, resume)
    torch.save(found, Path(folder) / f"{host}{rank}{'-resumed' * resume}.pt")
    dist.barrier()
    dist.destroy_process_group()
