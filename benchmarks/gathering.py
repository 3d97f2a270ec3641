"""FSDP2 with and without compressed all-gathers: bytes, gathers alone and whole steps of the Llama-style model.

One process per GPU, one of them writes the result:

    NCCL_NVLS_ENABLE=0 torchrun --nproc-per-node 2 -m benchmarks.gathering --out DIR

Needs 60 GB per GPU and about six minutes.

With NCCL_P2P_DISABLE=1 as well, GPUs of one host exchange data through its memory, as slowly as between hosts.
--toy runs on any machine, with gloo on a CPU, and measures nothing.

fp32 master weights, gathered in bf16, gradients reduced in fp32, fused AdamW; each block of the model and the root are
sharded. Packed weights are not held from forward to backward (repack). All ranks time the same number of steps.
"""

import argparse
import gc
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import semisparse
from benchmarks import store
from benchmarks.ranks import CONTEXT, MODEL, TOY, Bytes, join, leave, milliseconds, setting, step_of
from benchmarks.timing import device, peak_memory
from semisparse import SparseConfig
from semisparse.integrations.fsdp import compress_all_gather
from semisparse_lab.models.llama import Llama, build_llama

RATE = 1e-5
STEPS = 3
ROUNDS = 5

VARIANTS: dict[str, tuple[SparseConfig | None, bool]] = {
    "dense": (None, False),
    "2:4": (SparseConfig(repack=True), False),
    "2:4, compressed": (SparseConfig(repack=True), True),
    "fp8 + 2:4": (SparseConfig(precision="fp8"), False),
    "fp8 + 2:4, compressed": (SparseConfig(precision="fp8"), True),
}
"""Settings of the layers, and whether gathers are compressed."""


def sharded(name: str, toy: bool, compiled: bool) -> Llama:
    """The model of a variant, as every rank builds it."""
    config, compress = VARIANTS[name]
    model = build_llama(TOY if toy else MODEL, 0, device())
    if config is not None:
        semisparse.sparsify(model, config, select="blocks")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        if compiled:
            block.compile()
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    if compress:
        compress_all_gather(model)
    return model


def gather_of(model: Llama) -> Callable[[], None]:
    """All blocks gathered once, one after the other, and freed again."""

    def gather() -> None:
        for block in model.blocks:
            block.unshard()
            block.reshard()

    return gather


def timed(calls: dict[str, Callable[[], object]], rounds: int, count: int) -> dict[str, dict[str, Any]]:
    """Name -> times of one call, variants interleaved, with ratios to the first one of each round."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(milliseconds(call, count))
    first = next(iter(found.values()))
    return {
        name: {
            "median_ms": statistics.median(times),
            "rounds_ms": times,
            "ratio": statistics.median(one / other for one, other in zip(first, times, strict=True)),
        }
        for name, times in found.items()
    }


def measure(compiled: bool, batch: int, rounds: int, toy: bool) -> dict[str, Any]:
    """One table: everything of all variants in one mode."""
    torch.compiler.reset()
    gc.collect()  # FSDP2's modules and parameters refer to each other
    facts: dict[str, Any] = {}
    steps, gathers = {}, {}
    for name in VARIANTS:
        model = sharded(name, toy, compiled)
        steps[name] = step = step_of(model, model.config, batch, RATE)
        gathers[name] = gather_of(model)
        losses = [float(step()) for _ in range(3)]
        facts[name] = {"losses": losses, "peak_bytes": peak_memory(step)}
        if not compiled:  # under a mode compiled code may run as Python
            with Bytes() as seen:
                step()
            facts[name]["bytes_per_step"] = seen.sent
    return {
        "compiled": compiled,
        "tokens_per_rank": batch * CONTEXT,
        "facts": facts,
        "step": timed(steps, rounds, STEPS),
        "gather": timed(gathers, rounds, 4 * STEPS),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the result")
    parser.add_argument("--name", default="gathering", help="of the result's file")
    parser.add_argument("--modes", default="eager,compiled")
    parser.add_argument("--batches", default="4,1", help="sequences of 2048 tokens per rank")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--toy", action="store_true")
    given = parser.parse_args()
    join()
    tables = []
    for mode in given.modes.split(","):
        for batch in map(int, given.batches.split(",")):
            found = measure(mode == "compiled", batch, given.rounds, given.toy)
            tables.append(found)
            if dist.get_rank() == 0:
                print(f"{mode}, {batch} x {CONTEXT} tokens per rank", flush=True)
                for name in VARIANTS:
                    step, gather = found["step"][name], found["gather"][name]
                    print(
                        f"  {name:24} step {step['median_ms']:8.2f} ms ({step['ratio']:.3f})"
                        f"  gathers {gather['median_ms']:7.2f} ms ({gather['ratio']:.3f})"
                        f"  {found['facts'][name].get('bytes_per_step', '')}",
                        flush=True,
                    )
                payload = {"kind": "gathering", "toy": given.toy, **setting()}
                store.save(given.name, payload | {"tables": tables}, given.out)
    leave()


if __name__ == "__main__":
    main()
