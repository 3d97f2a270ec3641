"""Training that goes on with another number of ranks: a distributed checkpoint of 4 ranks, continued by 2, then by 3.

Each of the two saves is in mid-phase, with masks that are held for a while longer where the recipe holds any. Three
ranks share 20, 28 and 6 rows unevenly, and of the last layer's 6 rows one of four ranks has none. Each step has one
batch, of which each rank takes an equal part, so that one process computes the same from the whole of it, up to the
order of sums in fp64.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from semisparse import Phase, SparseConfig, recipes
from semisparse.recipes import Recipe
from tests.faults.fault import Fault
from tests.faults.ranks import Scenario, on_ranks
from tests.support import config_of

STAGES = ((4, 0, 5), (2, 5, 9), (3, 9, 14))
"""Ranks, first step and end of each."""
STEPS = 14
PHASES = [Phase("dense", 2), Phase("sparse", 9), Phase("dense", 3)]
SEEDS = 3
TOLERANCE = 1e-12
"""Relative, of losses in fp64; weights are compared with ten times as much of the largest one."""


@dataclass(frozen=True)
class Way:
    """How a model is distributed and scheduled.

    Attributes:
        distribute: DDP; FSDP2 of each layer, or of the root alone; or FSDP2 whose gathers carry kept values.
        made: A recipe, or the layers' settings for a schedule with PHASES.
        adamw: Whether by AdamW (or the one that a recipe needs), else by SGD with momentum.
    """

    distribute: Literal["ddp", "layers", "root", "compressed"]
    made: Recipe | SparseConfig
    adamw: bool = True


WAYS = {
    "FSDP2, transposable": Way("layers", SparseConfig()),
    "FSDP2, row-wise": Way("layers", SparseConfig(weight="row")),
    "FSDP2, dinov2": Way("layers", recipes.dinov2(sparse_fraction=0.8)),
    "FSDP2, pruned inputs, SGD": Way("layers", config_of("activation"), adamw=False),
    "FSDP2 of the root, SGD": Way("root", SparseConfig(), adamw=False),
    "FSDP2 with compressed gathers": Way("compressed", SparseConfig(weight="row")),
    "DDP, transposable": Way("ddp", SparseConfig()),
    "DDP, dinov2, SGD": Way("ddp", recipes.dinov2(sparse_fraction=0.8), adamw=False),
    "DDP, sr_ste": Way("ddp", recipes.sr_ste(decay=1e-2)),
    "DDP, fst": Way("ddp", recipes.fst(refresh_every=4, grad_output=None)),
    "DDP, fst, SGD": Way("ddp", recipes.fst(refresh_every=4, grad_output=None), adamw=False),
    "DDP, s_ste": Way("ddp", recipes.s_ste(grad_output=None)),
    "DDP, step that switches on 2 ranks": Way("ddp", recipes.step(dense_range=(0.1, 0.5))),
    "DDP, step that switches on 4 ranks": Way("ddp", recipes.step(dense_range=(0.1, 0.25), weight="transposable")),
}


def resharded(name: str, count: int, folder: Path) -> dict[str, int]:
    """All stages of a way with each seed, and one process beside them."""
    from tests.faults import resharding_run  # which imports more of torch than other faults need

    way, steps = WAYS[name], 0
    for seed in range(count):
        alone, there = resharding_run.Run(way, seed, alone=True), folder / str(seed)
        there.mkdir()
        before, phases = "", list[str]()
        for number, (world, begin, end) in enumerate(STAGES):
            scenario: Scenario = partial(resharding_run.stage, way, seed, number)
            for answer in on_ranks(scenario, 60.0, world, there / str(number)):
                assert answer is not None and not answer[0], f"{name}, {world} ranks: {answer}"
            expected = []
            for step in range(begin, end):
                phases.append(alone.schedule.phase)
                expected.append(alone.step(step, 0, 1))
            ranks = [torch.load(there / f"seen{number}of{rank}.pt", weights_only=True) for rank in range(world)]
            assert {rank["loaded"] for rank in ranks} == {before}, f"{world} ranks do not load the bits that were saved"
            before = ranks[0]["saved"]
            for rank in ranks:
                assert rank["saved"] == before and rank["phase"] == alone.schedule.phase, "the ranks differ"
                _as_alone(rank, expected, alone.weights())
            _masks_as_alone([rank["masks"] for rank in ranks], [masks for _, masks in expected])
            steps += end - begin
        assert all(phases[end - 1] == phases[end] for _, _, end in STAGES[:-1]), "it is not saved in mid-phase"
    return {"steps whose masks and losses are those of one process": steps}


def _as_alone(rank: Mapping[str, Any], expected: list[tuple[float, list[Tensor]]], weights: list[Tensor]) -> None:
    for step, (loss, _) in enumerate(expected):
        found = rank["losses"][step]
        assert abs(found - loss) <= TOLERANCE * loss, f"step {step}: a loss of {found} and not {loss}"
    for one, other in zip(rank["weights"], weights, strict=True):
        assert float((one - other).abs().max()) <= 10 * TOLERANCE * float(other.abs().max()), "other weights"


def _masks_as_alone(ranks: list[list[list[Tensor]]], expected: list[list[Tensor]]) -> None:
    """Of weights each rank has the whole mask; of inputs its part of the batch."""
    for step, masks in enumerate(expected):
        for number, mask in enumerate(masks):
            found = [rank[step][number] for rank in ranks]
            parts = found if found[0].shape == mask.shape else [torch.cat(found)]
            assert all(torch.equal(part, mask) for part in parts), f"step {step}: another mask than of one process"
        assert all(len(rank[step]) == len(masks) for rank in ranks)


CHANGE = {"FSDP2, transposable": 1, "DDP, fst": 1}
FAULTS = [
    Fault("the number of gloo ranks changes, 4 to 2 to 3", name,
          "masks and losses (1e-12) of one process; bit-equal after loading; no rank waits", CHANGE.get(name, 0), SEEDS,
          partial(resharded, name), "seeds")
    for name in WAYS
]  # fmt: skip
