"""How training of the Llama-style model scales over GPUs: DDP, FSDP2, and FSDP2 with compressed all-gathers.

One process per GPU, one of them writes the result, scaling-RANKS.json:

    NCCL_NVLS_ENABLE=0 torchrun --nproc-per-node 2 -m benchmarks.scaling --out DIR

with 1, 2, 4 and 8 processes. Compiling takes most of the time: --eager leaves it out. With NCCL_P2P_DISABLE=1 as well,
GPUs of one host exchange data through its memory, about as slowly as between hosts; such a result needs a --name of its
own and the --depth of the other. --toy runs on any machine, with gloo on a CPU, and measures nothing.

All variants have as many layers as fit into the GPU for the one that needs most, found by trying one and two layers;
--depth sets another number, which runs that are to be compared should share.

bf16 weights, gradients and AdamW states, so that all layouts compute the same: their losses are compared. 16,384 tokens
per GPU. Each variant is built, timed and freed before the next one, sustained; the first one is timed again at the end,
so that a drift of the clock shows. "one GPU" is the same model on each GPU without any communication.
"""

import argparse
import gc
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import semisparse
from benchmarks import store
from benchmarks.exposed import profiled
from benchmarks.ranks import CONTEXT, MODEL, TOY, Bytes, join, leave, milliseconds, setting, step_of
from benchmarks.timing import device
from semisparse import SparseConfig
from semisparse.integrations.fsdp import compress_all_gather
from semisparse.schedule.ranks import mean_over_ranks
from semisparse_lab.models.llama import Llama, LlamaConfig, build_llama

TOKENS = 16384
PRECISIONS: dict[str, SparseConfig | None] = {
    "bf16": None,
    "2:4": SparseConfig(),
    "fp8 + 2:4": SparseConfig(precision="fp8"),
}
ALONE, DDP, FSDP, COMPRESSED = "one GPU", "DDP", "FSDP2", "FSDP2, compressed"
LAYOUTS = (ALONE, DDP, FSDP, COMPRESSED)
LOSSES = 4
STEPS, ROUNDS = 4, 3
RATE = 3e-4
SPARE = 0.88
"""Share of a GPU's memory that is filled: fragments and NCCL's buffers need the rest."""
MOST_LAYERS = 32


def variants(ranks: int) -> list[tuple[str, str]]:
    """Precision and layout of each; one rank has nothing to share."""
    layouts = LAYOUTS if ranks > 1 else (ALONE,)
    return [(one, layout) for one in PRECISIONS for layout in layouts if layout != COMPRESSED or one != "bf16"]


def built(precision: str, layout: str, config: LlamaConfig, compiled: bool) -> nn.Module:
    """The model of a variant, as every rank builds it, in bf16."""
    model, settings = build_llama(config, 0, device()).bfloat16(), PRECISIONS[precision]
    if settings is not None:
        # Where weights are gathered again for the backward, packing them again needs no memory in between.
        sharded = layout in (FSDP, COMPRESSED) and settings.precision is None
        semisparse.sparsify(model, replace(settings, repack=True) if sharded else settings, select="blocks")
    for block in model.blocks:
        if compiled:
            block.compile()
    return distributed(model, layout)


def distributed(model: Llama, layout: str) -> nn.Module:
    """model in its layout."""
    if layout == ALONE:
        return model
    if layout == DDP:
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    if layout == COMPRESSED:
        compress_all_gather(model)
    return model


def measure(precision: str, layout: str, config: LlamaConfig, batch: int, given: argparse.Namespace) -> dict[str, Any]:
    """Losses, times, bytes and memory of one variant; nothing of it is left afterwards."""
    forget()
    step = step_of(built(precision, layout, config, given.compiled), config, batch, RATE)
    with torch.compiler.set_stance("force_eager"), Bytes() as seen:  # compiled code may not be seen by a mode
        losses = [step()]
    losses += [step() for _ in range(LOSSES - 1)]
    times = [milliseconds(step, given.steps) for _ in range(given.rounds)]
    found = {
        "precision": precision,
        "layout": layout,
        "losses": mean_over_ranks(torch.stack(losses)),
        "bytes_per_step": seen.sent,
        "rounds_ms": times,
        "median_ms": statistics.median(times),
        "tokens_per_second_and_gpu": 1000 * batch * config.context / statistics.median(times),
        "peak_bytes": peak(step),
        **profiled(step, 2),
    }
    del step
    return found


def peak(step: Any) -> int:
    """Most bytes that any rank holds during a step, weights and states included; 0 without a GPU."""
    if device() != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    step()
    most = torch.tensor(torch.cuda.max_memory_allocated(), device="cuda")
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def forget() -> None:
    """Free what the last variant left, on the GPU and in torch.compile."""
    torch.compiler.reset()
    gc.collect()  # modules of FSDP2 and their parameters refer to each other
    if device() == "cuda":
        torch.cuda.empty_cache()


def depth_that_fits(config: LlamaConfig, batch: int) -> int:
    """Layers of the variant that needs most memory in a GPU, from steps of one and of two layers, without compiling."""
    if device() != "cuda":
        return config.depth
    deepest = MOST_LAYERS
    for precision in PRECISIONS:
        peaks = []
        for depth in (1, 2):
            forget()
            shape = replace(config, depth=depth)
            step = step_of(built(precision, ALONE, shape, compiled=False), shape, batch, RATE)
            step()
            peaks.append(peak(step))
            del step
        memory = SPARE * torch.cuda.get_device_properties(0).total_memory
        deepest = min(deepest, int((memory - peaks[0]) / (peaks[1] - peaks[0])) + 1)
    return max(1, deepest)


def collectives(config: LlamaConfig, steps: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a collective alone, at the bytes of one block: name -> bytes of the whole -> milliseconds."""
    ranks = dist.get_world_size()
    count = config.width * (4 * config.width + 3 * config.hidden)
    found: dict[str, dict[str, float]] = {"all-gather": {}, "reduce-scatter": {}, "all-reduce": {}}
    for share in (1.0, 9 / 16, 5 / 16):
        part = torch.zeros(int(2 * count * share) // ranks, dtype=torch.uint8, device=device())
        whole = part.new_empty(ranks * part.numel())
        gathers = milliseconds(lambda whole=whole, part=part: dist.all_gather_into_tensor(whole, part), steps)
        found["all-gather"][str(whole.numel())] = gathers
    gradients = torch.zeros(count // ranks * ranks, dtype=torch.bfloat16, device=device())
    mine = gradients.new_empty(count // ranks)
    reduced = found["reduce-scatter"], found["all-reduce"]
    reduced[0][str(gradients.nbytes)] = milliseconds(lambda: dist.reduce_scatter_tensor(mine, gradients), steps)
    reduced[1][str(gradients.nbytes)] = milliseconds(lambda: dist.all_reduce(gradients), steps)
    return found


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Of the command line, or of arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the result")
    parser.add_argument("--name", help="of the result's file; default scaling-RANKS")
    parser.add_argument("--depth", type=int, help="layers; default: as many as fit")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="per GPU")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each round")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", nargs="*", choices=PRECISIONS, default=list(PRECISIONS), help="precisions")
    parser.add_argument("--eager", dest="compiled", action="store_false", help="blocks are not compiled")
    parser.add_argument("--toy", action="store_true")
    given = parser.parse_args(arguments)
    given.compiled = given.compiled and not given.toy
    return given


def run(given: argparse.Namespace) -> None:
    """Measure all variants and write the result after each."""
    # It would split a block's graph by DDP's buckets, for an overlap that blocks compiled one by one have anyway.
    torch._dynamo.config.optimize_ddp = False
    config, batch = (TOY, 1) if given.toy else (MODEL, given.tokens // CONTEXT)
    ranks = dist.get_world_size()
    config = replace(config, depth=given.depth or depth_that_fits(config, batch))
    chosen = [variant for variant in variants(ranks) if variant[0] in given.only]
    forget()
    payload: dict[str, Any] = {
        "kind": "scaling",
        "toy": given.toy,
        **setting(),
        "model": {"width": config.width, "hidden": config.hidden, "depth": config.depth, "batch": batch},
        "tokens_per_rank": batch * config.context,
        "compiled": given.compiled,
        "collectives_ms": collectives(config, given.steps) if ranks > 1 else {},
        "variants": [],
    }
    for number, (precision, layout) in enumerate([*chosen, chosen[0]]):
        found = measure(precision, layout, config, batch, given)
        if number == len(chosen):
            payload["again_ms"] = found["median_ms"]
        else:
            payload["variants"].append(found)
        if dist.get_rank() == 0:
            again = ", again" if number == len(chosen) else ""
            print(
                f"{ranks} x {precision:10} {layout + again:20} {found['median_ms']:9.2f} ms"
                f"  exposed {found['exposed_ms']:7.2f} of {found['collectives_ms']:7.2f} ms"
                f"  {found['peak_bytes'] / 1e9:5.1f} GB  loss {found['losses'][-1]:.6f}",
                flush=True,
            )
            store.save(given.name or f"scaling-{ranks}", payload, given.out)


def main() -> None:
    given = options()
    join()
    run(given)
    leave()


if __name__ == "__main__":
    main()
