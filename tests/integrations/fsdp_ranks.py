"""What two gloo processes do with compressed all-gathers, and what one process does. Imported by spawned workers."""

from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from semisparse import Phase, SparseConfig, SparseSchedule, ops, recipes, sparsify
from semisparse.integrations.fsdp import compress_all_gather
from semisparse.recipes import RecipeSchedule
from tests.distributed.training import Scenario, train, whole

WORLD = 2
STEPS = 3
PHASES = [Phase("sparse", 2), Phase("dense", 2), Phase("sparse", 2)]


class Even(Scenario):
    """A scenario in which each rank holds whole tiles of each weight."""

    @property
    def features(self) -> tuple[int, int, int, int]:
        return (32, 128, 64, 8) if self.operand == "fp8" else (16, 32, 24, 8)


TRAININGS = [
    Even(wrapper, operand, "adamw") for wrapper in ("fsdp_root", "fsdp_layers") for operand in ("weight", "fp8")
]
MIXED = {
    "transposable": SparseConfig(),
    "row": SparseConfig(weight="row"),
    "fp8": SparseConfig(precision="fp8"),
    "repack": SparseConfig(repack=True),
}

WHOLE = ("transposable", "row")
"""Of these, gathered whole, too."""


class Counted(TorchDispatchMode):
    """Counts the bytes that this process hands to collectives, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            given = args[0] if "allreduce" in str(func) else args[1]
            given = given if isinstance(given, (list, tuple)) else [given]
            self.bytes.setdefault(func._opname.strip("_"), []).append(sum(one.nbytes for one in given))
        return func(*args, **(kwargs or {}))


def net(config: SparseConfig | None = None, dtype: torch.dtype = torch.float32, layers: int = 2) -> nn.Sequential:
    """Equal in every process."""
    torch.manual_seed(3)
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(layers))).to(dtype)
    sparsify(model, config)
    return model


def sharded(model: nn.Sequential, policy: MixedPrecisionPolicy | None = None, **settings) -> nn.Sequential:
    """model with each layer and the whole sharded."""
    policy = policy or MixedPrecisionPolicy()
    for layer in model:
        fully_shard(layer, mp_policy=policy, **settings)
    return fully_shard(model, mp_policy=policy, **settings)


def inputs(step: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Of every process for one step."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(8, 32, generator=generator).to(dtype) for _ in range(WORLD)]


def steps(
    model: nn.Module,
    rank: int,
    dtype: torch.dtype = torch.float32,
    count: int = STEPS,
    schedule: SparseSchedule | None = None,
) -> list[Tensor]:
    """Losses, then the whole weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    losses = []
    for step in range(count):
        x = inputs(step, dtype)[rank]
        loss = (model(x) - x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
        losses.append(loss.detach())
    return losses + [whole(parameter).detach() for parameter in model.parameters()]


def mixed(rank: int, name: str, compress: bool = True) -> list[Tensor]:
    """Gathered in bf16 from fp32 masters."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(net(MIXED[name]), policy)
    if compress:
        compress_all_gather(model)
    return steps(model, rank, torch.bfloat16)


def mixed_alone(name: str, compress: bool = True) -> list[list[Tensor]]:
    """The same in one process, written out: losses of each rank, then the weights. In 16 bits.

    Whole gathers bring rounded weights, which masks are then chosen from.
    """
    masters = [parameter.detach().clone() for parameter in net(MIXED[name]).parameters()]
    optimizer = torch.optim.AdamW([nn.Parameter(master) for master in masters], lr=0.05)
    weights = optimizer.param_groups[0]["params"]
    losses: list[list[Tensor]] = [[] for _ in range(WORLD)]
    for step in range(STEPS):
        gradients = []
        for rank, x in enumerate(inputs(step, torch.bfloat16)):
            mask = MIXED[name].weight
            seen = [weight.detach() if compress else weight.detach().bfloat16() for weight in weights]
            pruned = [ops.prune(weight, torch.bfloat16, mask).requires_grad_() for weight in seen]
            y = x
            for one in pruned:
                y = F.linear(y, one)
            loss = (y - x).float().square().mean()
            gradients.append([gradient.float() for gradient in torch.autograd.grad(loss, pruned)])
            losses[rank].append(loss.detach())
        for weight, *both in zip(weights, *gradients, strict=True):
            weight.grad = sum(both) / WORLD
        optimizer.step()
    return [own + [weight.detach() for weight in weights] for own in losses]


def counted(rank: int) -> dict[str, object]:
    """Bytes in a sparse phase, in 16 bits and in fp8, and in a dense one, with what the report says."""
    found: dict[str, object] = {}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for name, config in (("bf16", None), ("fp8", SparseConfig(precision="fp8"))):
        model = sharded(net(config), policy)
        report = compress_all_gather(model)
        schedule = SparseSchedule(model, [Phase("sparse", 1), Phase("dense", 1)])
        model(inputs(0, torch.bfloat16)[rank]).sum().backward()  # the first forward also compares phases
        for phase in ("sparse", "dense"):
            with Counted() as seen:
                model(inputs(0, torch.bfloat16)[rank]).sum().backward()
            found[f"{name} {phase}"] = seen.bytes
            schedule.step(skipped=False)
        found[f"{name} report"] = (report.compressed, report.bytes_whole, report.bytes_compressed)
    return found


def sampled(rank: int) -> dict[str, list[Tensor]]:
    """grad_output="mvue" with and without."""
    found = {}
    for name in ("compressed", "whole"):
        model = sharded(net(SparseConfig(grad_output="mvue")))
        if name == "compressed":
            compress_all_gather(model)
        SparseSchedule(model, [Phase("sparse", 5)], seed=7)
        found[name] = steps(model, rank)
    return found


def composed(rank: int) -> tuple[list[list[Tensor]], int]:
    """Plain layers, checkpointed ones, and compiled and checkpointed ones; how many graphs the last two have."""
    found = []
    for name in ("plain", "checkpointed", "compiled and checkpointed"):
        layers = list(net(SparseConfig(repack=True)))
        if "compiled" in name:
            for layer in layers:
                layer.compile(backend="aot_eager")
        if "checkpointed" in name:
            layers = [checkpoint_wrapper(layer) for layer in layers]
        model = sharded(nn.Sequential(*layers))
        compress_all_gather(model)
        torch._dynamo.utils.counters.clear()
        found.append(steps(model, rank, count=6, schedule=SparseSchedule(model, PHASES)))
    return found, torch._dynamo.utils.counters["stats"]["unique_graphs"]


SELECTED = partial(create_selective_checkpoint_contexts, ops.sac_save_ops())


def composed_whole(rank: int) -> tuple[list[list[Tensor]], int]:
    """Whole gathers of an fp8 layer: plain, then checkpointed, compiled after that and sharded last, in two ways."""
    found = []
    torch._dynamo.utils.counters.clear()
    for settings in (None, {"context_fn": SELECTED}, {}):
        layers = list(net(SparseConfig(precision="fp8"), layers=1))
        if settings is not None:
            layers = [checkpoint_wrapper(layer, **settings) for layer in layers]
            for layer in layers:
                layer.compile(backend="aot_eager", fullgraph=True)
        model = sharded(nn.Sequential(*layers))
        found.append(steps(model, rank, schedule=SparseSchedule(model, [Phase("sparse", 2), Phase("dense", 1)])))
    return found, torch._dynamo.utils.counters["stats"]["unique_graphs"]


def recipe_runs(rank: int) -> dict[str, list[list[Tensor]]]:
    """Recipes whose masks follow the weights, with and without compression."""
    found: dict[str, list[list[Tensor]]] = {}
    for recipe in (recipes.safest(), recipes.fastest(), recipes.dinov2()):
        for compress in (True, False):
            model = net(recipe.config)
            sharded(model)
            if compress:
                compress_all_gather(model)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
            schedule = RecipeSchedule(recipe, model, optimizer, 4, seed=5)
            losses = []
            for step in range(4):
                x = inputs(step)[rank]
                loss = (model(x) - x).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                losses.append(loss.detach())
            found.setdefault(recipe.name, []).append(losses)
    return found


def meta(rank: int) -> tuple[Tensor, Tensor, dict[str, list[int]]]:
    """Built without memory, sharded, compressed, and then given weights; beside one process."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(2)))
    sparsify(model)
    sharded(model)
    compress_all_gather(model)
    model.to_empty(device="cpu")
    alone = net()
    with torch.no_grad():
        for mine, whole in zip(model.parameters(), alone.parameters(), strict=True):
            mine.copy_(distribute_tensor(whole.detach(), mine.device_mesh, mine.placements))
    x = inputs(0)[rank % WORLD]
    with Counted() as seen:
        y = model(x).detach()
    return y, alone(x).detach(), seen.bytes


def accumulated(rank: int) -> dict[str, list[list[Tensor]]]:
    """Micro-batches after an evaluation in inference mode, weights kept gathered or not; with and without."""
    found: dict[str, list[list[Tensor]]] = {}
    for config in (SparseConfig(repack=True), SparseConfig(precision="fp8")):
        for kept in (True, False):
            for compress in (True, False):
                model = sharded(net(config))
                if compress:
                    compress_all_gather(model)
                    with torch.inference_mode():  # after which FSDP2 itself would not train
                        model(inputs(9)[rank])
                optimizer, losses = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True), []
                for step in range(6):
                    last = step % 3 == 2
                    model.set_requires_gradient_sync(last)
                    model.set_reshard_after_backward(last or not kept)
                    x = inputs(step)[rank]
                    loss = (model(x) - x).square().mean()
                    loss.backward()
                    losses.append(loss.detach())
                    if last:
                        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                        optimizer.step()
                        optimizer.zero_grad()
                found.setdefault(f"{config.precision} {kept}", []).append(losses)
    return found


def saved(rank: int, folder: str) -> Tensor:
    """A step, then a distributed checkpoint of the model; the output that it belongs to."""
    model = sharded(net())
    compress_all_gather(model)
    steps(model, rank, count=1)
    dcp.save({"model": model.state_dict()}, checkpoint_id=f"{folder}/checkpoint")
    return model(inputs(9)[rank]).detach()


def checkpoints(rank: int) -> dict[str, object]:
    """What a state_dict holds, and whether a loaded model still gathers compressed."""
    model = sharded(net())
    compress_all_gather(model)
    steps(model, rank, count=1)
    state = model.state_dict()
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    other = sharded(net())
    compress_all_gather(other)
    other.load_state_dict(state, assign=True)
    x = inputs(9)[rank]
    with Counted() as seen:
        y = other(x)
    return {
        "plain": all(type(value._local_tensor) is Tensor and not vars(value._local_tensor) for value in state.values()),
        "whole": all(torch.equal(full[name], value.full_tensor()) for name, value in state.items()),
        "same": torch.equal(y, model(x)),
        "bytes": seen.bytes,
    }


def phase_after_evaluation(rank: int) -> bool:
    """The root keeps its weights gathered after an evaluation, and then the phase changes."""
    same = []
    x = inputs(0)[rank]
    for first in ("sparse", "dense"):
        model, plain = fully_shard(net()), net()
        compress_all_gather(model)
        for layer in (*model, *plain):
            layer.sparse_enabled = first == "sparse"
        with torch.no_grad():
            same.append(torch.equal(model(x), plain(x)))
        for layer in (*model, *plain):
            layer.sparse_enabled = first != "sparse"
        same.append(torch.equal(model(x), plain(x)))
    return all(same)


def small_beside_large(rank: int) -> tuple[Tensor, Tensor]:
    """Two entries of each tile: what is gathered in bf16, and what the master's mask keeps.

    The larger one is rounded up to 2. Then the smaller one is lost in the sums by which a mask would be chosen again.
    """
    model = net(layers=1)
    weight = torch.zeros(32, 32)
    weight[::4, ::4] = 2 - 2.0**-23
    for tile in range(8):
        weight[4 * tile + 1 + tile % 3 :: 32, 1 + tile // 3 :: 4] = 1.5 * 2.0**-24
    with torch.no_grad():
        model[0].weight.copy_(weight)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    compress_all_gather(model)
    ours = model(torch.eye(32, dtype=torch.bfloat16)).detach()
    return ours, ops.prune(weight, torch.bfloat16, "transposable").mT


def scales(rank: int) -> tuple[Tensor, Tensor]:
    """fp8, with much larger weights on the second rank: gathered, and in one process."""
    model, alone = (net(SparseConfig(precision="fp8"), layers=1) for _ in range(2))
    for one in (model, alone):
        with torch.no_grad():
            one[0].weight[16:] *= 3000
    compress_all_gather(fully_shard(model))
    x = inputs(0)[rank]
    return model(x).detach(), alone(x).detach()


def not_finite(rank: int) -> list[Tensor]:
    """fp8 with NaN or Inf in the shard of the second rank: both see it in the scale."""
    found = []
    for value in (torch.nan, torch.inf, -torch.nan):
        model = net(SparseConfig(precision="fp8"), layers=1)
        with torch.no_grad():
            model[0].weight[20, 3] = value
        compress_all_gather(fully_shard(model))
        found.append(model(inputs(0)[rank]).isfinite().any().detach())
    return found


def worker(rank: int, folder: str) -> None:
    """Everything, in one pair of processes; what was seen is saved."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=120))
    from tests.integrations.fsdp_attempts import ENDS, ended

    try:
        seen: dict[str, object] = {one.name: train(one, rank, compress_all_gather) for one in TRAININGS}
        seen |= {f"mixed {name}": mixed(rank, name) for name in MIXED}
        seen |= {f"mixed {name}, whole": mixed(rank, name, compress=False) for name in WHOLE}
        for check in (
            counted,
            sampled,
            composed,
            composed_whole,
            recipe_runs,
            checkpoints,
            meta,
            accumulated,
            phase_after_evaluation,
            small_beside_large,
            scales,
            not_finite,
        ):
            seen[check.__name__] = check(rank)
        seen["saved"] = saved(rank, folder)
        seen["ended"] = {attempt.__name__: ended(attempt, rank) for attempt in ENDS}
        torch.save(seen, Path(folder) / f"rank{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
