"""Benchmarks of semi-structured training: whole steps (default), single linear layers (--linear; --eager for
packing at each forward and per step alone), both beside torchao's float8 and with a sampled gradient (--compare),
compiled layers between pointwise operations (--neighbours), products of many tokens, whole and in chunks (--large-m),
noise of fp8 (--noise), where a step's time goes (--profile), what plans predict (--plan), where 2:4 does not help
(--no-gain), host time of small layers (--host), packing (--pack), following the masks (--metrics), what the first
sparse product of a process changes (--power); and the tuning of common linear shapes for the table that ships (--tune).

    python benchmarks/benchmark_semi_structured_training.py [--card sam-vit-l ...] [--save [DIR]]
    python benchmarks/benchmark_semi_structured_training.py --linear [--mkn 13008,1024,4096 ...] [--save [DIR]]
    python benchmarks/benchmark_semi_structured_training.py --eager [--mkn 13008,1024,4096 ...] [--save [DIR]]
    python benchmarks/benchmark_semi_structured_training.py --compare [--rows float8 2:4 mvue] [--card llama ...]
        [--mkn 16384,4096,11008 ...] [--save [DIR]] [--prepare]
    python benchmarks/benchmark_semi_structured_training.py --neighbours [--rows float8 ...] [--save [DIR]]
    python benchmarks/benchmark_semi_structured_training.py --large-m [--mkn 131072,4096,11008 ...] [--save [DIR]]
    python benchmarks/benchmark_semi_structured_training.py --noise [--mkn 16384,4096,11008 ...] [--save [DIR]]
    python benchmarks/benchmark_semi_structured_training.py --fp8-kernels [--save [DIR]]
    python benchmarks/benchmark_semi_structured_training.py --profile [--card llama-4096 ...] [--save [DIR]]
    python benchmarks/benchmark_semi_structured_training.py --plan [--card llama gpt2 ...] [--save [DIR]] [--prepare]
    python benchmarks/benchmark_semi_structured_training.py --host [--save [DIR]]
    python benchmarks/benchmark_semi_structured_training.py --no-gain [--card bert-base ...] [--save [DIR]]
    python benchmarks/benchmark_semi_structured_training.py --pack [--save [DIR]]
    python benchmarks/benchmark_semi_structured_training.py --tune [--mkn 16384,4096,11008 ...] [--save [DIR]]
    python benchmarks/benchmark_semi_structured_training.py --power [--save [DIR]]
    python benchmarks/benchmark_semi_structured_training.py --metrics [--card llama ...] [--save [DIR]]

Prints tables of at most 120 columns; --save also writes JSON (everything) and CSV (the first table) as soon as each
result is there. benchmarks/cards.py generates cards, README and docs from the JSON. --toy tries the program at toy
size on any device, without a GPU too; its figures mean nothing, and it refuses to write into benchmarks/results.
"""

import argparse
import gc
import os
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the file runs as a script from anywhere

import torch

from benchmarks import compare, float8, host, jobs, prepare, store
from benchmarks.models import CARDS
from benchmarks.planned_models import PLANNED
from benchmarks.timing import ROUNDS
from semisparse.gemm.engine import available


def _shape(text: str) -> tuple[int, int, int]:
    try:
        tokens, in_features, out_features = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not M,K,N, as in 13008,1024,4096") from None
    return tokens, in_features, out_features


def parser() -> argparse.ArgumentParser:
    """The options; their help is this module's docstring."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = made.add_mutually_exclusive_group()
    which.add_argument("--linear", action="store_true", help="single linear layers instead of whole steps")
    which.add_argument("--eager", action="store_true", help="single eager layers, packing at each forward and per step")
    which.add_argument("--compare", action="store_true", help="rows beside dense: layers and models, see --rows")
    which.add_argument("--host", action="store_true", help="host time of small layers, and where it goes")
    which.add_argument("--no-gain", action="store_true", help="small layers, and whole steps that the host bounds")
    which.add_argument("--pack", action="store_true", help="the pack kernel alone, and all packs of a model")
    which.add_argument("--neighbours", action="store_true", help="compiled layers between pointwise operations")
    which.add_argument("--large-m", action="store_true", help="products of many tokens, whole and in chunks")
    which.add_argument("--noise", action="store_true", help="what rounding to fp8 leaves of a layer's results")
    which.add_argument("--fp8-kernels", action="store_true", help="the passes of fp8 over tensors, against copies")
    which.add_argument("--profile", action="store_true", help="where the milliseconds of a compiled step go")
    which.add_argument("--plan", action="store_true", help="what semisparse.plan predicts, and what is measured")
    which.add_argument("--power", action="store_true", help="what a process's first sparse product changes")
    which.add_argument("--metrics", action="store_true", help="what MaskMetrics costs beside a step")
    which.add_argument("--tune", action="store_true", help="tuning of common linear shapes, for the table that ships")
    made.add_argument("--mkn", nargs="+", type=_shape, default=[], metavar="M,K,N", help="shapes of single layers")
    made.add_argument("--card", nargs="+", choices={**CARDS, **PLANNED}, default=[], help="models of whole steps")
    made.add_argument(
        "--rows",
        nargs="+",
        choices=compare.ROWS,
        help=f"rows; of --compare {' '.join(compare.DEFAULT_ROWS)} if none are named; float8 needs `{float8.INSTALL}`",
    )
    made.add_argument("--rounds", type=int, help=f"interleaved blocks per variant: {ROUNDS}; {host.ROUNDS} for --host")
    made.add_argument("--save", nargs="?", type=Path, const=store.RESULTS, metavar="DIR")
    made.add_argument(
        "--prepare", action="store_true", help="compile the models of --compare and --plan side by side first"
    )
    made.add_argument("--toy", action="store_true", help="toy size, on any device: tries the program, measures nothing")
    return made


def chosen(options: argparse.Namespace) -> Iterable[jobs.Job]:
    """The jobs that were asked for, in order."""
    rounds, toy = options.rounds or ROUNDS, options.toy
    if options.host:
        return jobs.hosts(options.rounds, toy)
    if options.eager:
        return jobs.eager_layers(options.mkn, rounds, toy)
    if options.compare:
        return jobs.compared(options.card, options.mkn, options.rows or compare.DEFAULT_ROWS, rounds, toy)
    if options.neighbours:
        return jobs.between(options.mkn, options.rows, rounds, toy)
    if options.large_m:
        return jobs.many_tokens(options.mkn, rounds, toy)
    if options.noise:
        return jobs.noises(options.mkn, toy)
    if options.fp8_kernels:
        return jobs.fp8_passes(rounds, toy)
    if options.profile:
        return jobs.profiles(options.card, options.rows, toy)
    if options.plan:
        return jobs.plans(options.card, rounds, toy)
    if options.pack:
        return jobs.packing(rounds, toy)
    if options.tune:
        return jobs.tunings(options.mkn, toy)
    if options.power:
        return jobs.powers(toy)
    if options.metrics:
        return jobs.following(options.card, rounds, toy)
    if options.linear:
        return jobs.layers(options.mkn, rounds, toy)
    if options.no_gain:
        return jobs.no_gain(options.card, options.mkn, rounds, toy)
    return jobs.steps(options.card, rounds, toy)


def _prepare(options: argparse.Namespace) -> None:
    kind = "plan" if options.plan else "compare"
    cards = options.card or (list(PLANNED) if options.plan else compare.MODELS)
    work = prepare.tasks(kind, cards, options.rows or compare.DEFAULT_ROWS)
    print(f"compiled {len(work)} models side by side in {prepare.prepare(work, options.toy):.0f} s", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the jobs; each result is printed and saved before the next one starts, and a failure stops no other job."""
    command = parser()
    options = command.parse_args(arguments)
    if not torch.cuda.is_available() and not options.toy:
        command.error("no CUDA device: these benchmarks measure a GPU (--toy tries the program without one)")
    if not options.toy and not (engine := available()).ok:
        command.error(f"no sparse engine, so nothing sparse would be measured: {engine.reason}")
    if options.toy and options.save == store.RESULTS:
        command.error("--toy measures nothing: give --save another folder than benchmarks/results")
    known = PLANNED if options.plan else CARDS
    if unknown := [card for card in options.card if card not in known]:
        command.error(f"--card {unknown[0]} is not one of {', '.join(known)}, the models of what was asked for")
    if options.rows and not (options.compare or options.neighbours or options.profile):
        command.error("--rows chooses rows of --compare, --neighbours or --profile, none of which is given")
    if options.prepare and not (options.compare or options.plan):
        command.error("--prepare compiles the models of --compare or --plan, neither of which is given")
    if "float8" in (options.rows or ()):
        try:
            float8.checked_version()
        except float8.MissingPeerError as error:
            command.error(str(error))
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{name}; peaks by data sheet (TFLOP/s): {store.PEAKS_TFLOPS.get(name, 'unknown')}")
    if options.prepare:
        _prepare(options)
    failed = [job.name for job in chosen(options) if not _done(job, options)]
    if failed:
        sys.exit(f"failed, as said above: {', '.join(failed)}")


def _done(job: jobs.Job, options: argparse.Namespace) -> bool:
    """Run one job, print and save its result; False if it failed, which leaves the others their turn."""
    try:
        result = job.measure()
    except Exception:
        print(f"\n{job.name} failed", flush=True)
        traceback.print_exc()
        return False
    finally:  # for the next one, after a failure too
        gc.collect()
        torch.cuda.empty_cache()
    shown = job.show(result)
    print(f"\n{job.name}", *(table.text() for table in shown), sep="\n\n", flush=True)
    if options.save:
        toy = {"toy": True} if options.toy else {}
        path = store.save(job.name, {"kind": job.kind, **toy, **result}, options.save)
        shown[0].write_csv(path.with_suffix(".csv"))
    return True


if __name__ == "__main__":
    os.environ.setdefault("SEMISPARSE_TUNE", "all")  # the shipped table is made from results, which must not rest on it
    main()
