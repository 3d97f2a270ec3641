"""The training that one process and two processes must agree on, and what it records. Imported by spawned workers."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import scaling
from semisparse import Phase, SparseConfig, SparseSchedule, densify, sparsify
from tests.conftest import EVERY_CASE
from tests.distributed import pipeline, tensor_parallel
from tests.distributed.sharding import EVERY, WAYS
from tests.support import config_of

WORLD = 2
STEPS = 6
TOKENS = 8  # per process, so that the tiles of a pruned input never straddle processes
PHASES = [Phase("dense", 1), Phase("sparse", 3), Phase("dense", 2)]
SCALING = ["--toy", "--depth", "1", "--steps", "1", "--rounds", "1", *([] if EVERY_CASE else ["--only", "2:4"])]
FP8_FEATURES = (32, 96, 64, 8)
FEATURES = (16, 12, 20, 8)  # 12 and 20 rows on two processes: 6 and 10 each, so a tile of the weight straddles them


@dataclass(frozen=True)
class Scenario:
    """One way to train: how it is distributed, what is pruned and which optimizer runs."""

    wrapper: str
    operand: str
    optimizer: str

    @property
    def name(self) -> str:
        return f"{self.wrapper}-{self.operand}-{self.optimizer}"

    @property
    def features(self) -> tuple[int, int, int, int]:
        """Of the network: from its inputs to its outputs."""
        return FP8_FEATURES if self.operand == "fp8" else FEATURES

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.operand == "fp8" else torch.float64


SCENARIOS = [
    Scenario(wrapper, operand, optimizer)
    for wrapper in WAYS
    for operand in ("weight", "activation", "fp8")
    for optimizer in ("sgd", "adamw")
    if (optimizer == "adamw" or (operand != "fp8" and wrapper in EVERY))
    and (operand == "weight" or wrapper in (*EVERY, "fsdp_offload"))
]


class RecordMasks(TorchDispatchMode):
    """Keeps what every prune op returned, as a bool mask."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.semisparse.prune.default, torch.ops.semisparse.prune_tokens.default):
            self.masks.append(result != 0)
        return result


def dense(scenario: Scenario) -> nn.Sequential:
    """The same network with the same numbers in every process."""
    torch.manual_seed(3)
    first, second, third, last = scenario.features
    return nn.Sequential(
        nn.Linear(first, second), nn.GELU(), nn.Linear(second, third, bias=False), nn.GELU(), nn.Linear(third, last)
    ).to(scenario.dtype)


def swap(scenario: Scenario, model: nn.Module) -> SparseSchedule:
    """Make all but the last layer semi-sparse, and schedule them: often before the model is distributed."""
    config = SparseConfig(precision="fp8") if scenario.operand == "fp8" else config_of(scenario.operand)
    sparsify(model, config, exclude=lambda name, layer: layer.out_features == scenario.features[-1])
    return SparseSchedule(model, PHASES)


def build(scenario: Scenario, rank: int | None) -> tuple[nn.Module, SparseSchedule]:
    """The network, swapped and distributed, or swapped alone with rank=None."""
    model, schedules = dense(scenario), []
    if rank is None:
        return model, swap(scenario, model)
    distributed = WAYS[scenario.wrapper](model, lambda part: schedules.append(swap(scenario, part)))
    return distributed, schedules[0]


def optimizer_for(scenario: Scenario, model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer with state, at a rate that moves masks within a few steps."""
    if scenario.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=0.05)


def shards(scenario: Scenario, step: int) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets of every process for one step."""
    generator = torch.Generator().manual_seed(100 + step)
    return [
        (
            torch.randn(TOKENS, scenario.features[0], generator=generator, dtype=scenario.dtype),
            torch.randn(TOKENS, scenario.features[-1], generator=generator, dtype=scenario.dtype),
        )
        for _ in range(WORLD)
    ]


def whole(parameter: Tensor) -> Tensor:
    """The unsharded parameter."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def train(
    scenario: Scenario, rank: int | None, wrapped: Callable[[nn.Module], object] = lambda model: None
) -> dict[str, list[Tensor]]:
    """Losses, masks and parameters of each step; rank=None trains on all shards in one process.

    Args:
        scenario: How.
        rank: Of this process.
        wrapped: Called with the model once it is distributed.
    """
    model, schedule = build(scenario, rank)
    if rank is not None:
        wrapped(model)
    optimizer = optimizer_for(scenario, model)
    record: dict[str, list[Tensor]] = {"losses": [], "masks": [], "weights": []}
    for step in range(STEPS):
        optimizer.zero_grad()
        parts = shards(scenario, step) if rank is None else [shards(scenario, step)[rank]]
        with RecordMasks() as seen:
            for x, target in parts:
                loss = (model(x) - target).square().mean()
                # Dividing by a power of two is exact, so this is bit for bit what averaging over processes gives.
                (loss / len(parts)).backward()
                record["losses"].append(loss.detach())
        record["masks"] += seen.masks
        optimizer.step()
        schedule.step()
        record["weights"] += [whole(parameter).detach().clone() for parameter in model.parameters()]
    return record


def densify_sharded(rank: int) -> dict[str, object]:
    """densify on a model whose root is an FSDP2 module, and on one whose layers are."""
    scenario = Scenario("fsdp_root", "weight", "sgd")
    root = build(scenario, rank)[0]
    x = shards(scenario, 0)[rank][0]
    try:
        densify(root, weights="masked")
        masked = ""
    except ValueError as error:
        masked = str(error)
    before = [type(root[0]).__name__, type(root[2]).__name__]
    report = densify(root)
    plain = build(scenario, None)[0]
    densify(plain)
    layers = build(Scenario("fsdp_layers", "weight", "sgd"), rank)[0]
    try:
        densify(layers)
        wrapped = ""
    except ValueError as error:
        wrapped = str(error)
    return {
        "swapped": report.swapped,
        "before": before,
        "types": [type(root[0]).__name__, type(root[2]).__name__],
        "same": torch.equal(root(x), plain(x)),
        "masked": masked,
        "wrapped": wrapped,
        "still": [type(layers[0]).__name__, type(layers[2]).__name__],
    }


def worker(rank: int, folder: str) -> None:
    """Run every scenario as one of WORLD gloo processes and save the records."""
    torch.set_num_threads(1)
    from tests.distributed import checkpoints

    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=120))
    try:
        records: dict[str, object] = {scenario.name: train(scenario, rank) for scenario in SCENARIOS}
        records["densify"] = densify_sharded(rank)
        records["tensor_parallel"] = tensor_parallel.checks()
        records["pipeline"] = pipeline.checks()
        records["checkpoints"] = checkpoints.checks(folder)
        scaling.run(scaling.options(["--out", folder, *SCALING]))
        torch.save(records, Path(folder) / f"rank{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
