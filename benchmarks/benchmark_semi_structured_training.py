"""Benchmarks of semi-structured training: whole steps (default), single linear layers (--linear), packing (--pack),
following the masks (--metrics).

    python benchmarks/benchmark_semi_structured_training.py [--card sam-vit-l ...] [--save [DIR]]
    python benchmarks/benchmark_semi_structured_training.py --linear [--mkn 13008,1024,4096 ...] [--save [DIR]]
    python benchmarks/benchmark_semi_structured_training.py --pack [--save [DIR]]
    python benchmarks/benchmark_semi_structured_training.py --metrics [--card llama ...] [--save [DIR]]

Prints a pandas table; --save also writes JSON and CSV, from which benchmarks/cards.py generates cards and README.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the file runs as a script from anywhere

import pandas as pd
import torch

from benchmarks import end_to_end, linear, metrics, pack, store
from benchmarks.models import CARDS

Rows = Callable[[dict[str, Any]], list[dict[str, Any]]]


def _shape(text: str) -> tuple[int, int, int]:
    try:
        tokens, in_features, out_features = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not M,K,N, as in 13008,1024,4096") from None
    return tokens, in_features, out_features


def _linear_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [
        {
            "M x K x N": " x ".join(map(str, result["mkn"])),
            "variant": name,
            "ms": timing["median_ms"],
            "p20": timing["p20_ms"],
            "p80": timing["p80_ms"],
            "dense / variant": result["ratio_to_dense"].get(name),
            "limit": result["limit"].get(name),
            "TFLOP/s": result["tflops"].get(name),
            "peak MiB": result["peak_memory_bytes"].get(name, 0) / 2**20 or None,
        }
        for name, timing in result["times_ms"].items()
    ]
    shape = rows[0]["M x K x N"]
    return rows + [{"M x K x N": shape, "variant": f"{name}: {error}"} for name, error in result["errors"].items()]


def _end_to_end_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "step": result["card"],
            "variant": kind,
            "ms": timing["median_ms"],
            "p20": timing["p20_ms"],
            "p80": timing["p80_ms"],
            "dense / variant": result["ratio_to_dense"] if kind == "sparse" else 1.0,
            "limit": result["limit"] if kind == "sparse" else None,
            "peak GiB": result["peak_memory_bytes"][kind] / 2**30,
            "compile s": result["compile_seconds"][kind],
        }
        for kind, timing in result["times_ms"].items()
    ]


def _pack_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    times = {f"{name} us": value for name, value in result["microseconds"].items()}
    ratios = {"copy / pack": result["rate_of_copy"], "tile op / pack": result["faster_than_tile_op"]}
    return [{"N x K": " x ".join(map(str, result["nk"])), **times, **ratios}]


def _metrics_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    times = {f"{name} ms": timing["median_ms"] for name, timing in result["times_ms"].items()}
    return [{"step": result["card"], "interval": result["interval"], **times, "share": result["share_of_step"]}]


def _jobs(options: argparse.Namespace) -> list[tuple[str, str, Rows, Callable[[], dict[str, Any]]]]:
    """(name, kind, table, run) of everything that was asked for."""
    if options.pack:
        return [
            (f"pack-{n}x{k}", "pack", _pack_rows, lambda n=n, k=k: pack.benchmark(n, k, options.rounds))
            for n, k in pack.SHAPES
        ]
    if options.metrics:
        return [
            (f"metrics-{card}", "metrics", _metrics_rows, lambda card=card: metrics.benchmark(card, options.rounds))
            for card in (options.card or ["llama"])
        ]
    if options.linear:
        return [
            (
                f"linear-{'x'.join(map(str, mkn))}",
                "linear",
                _linear_rows,
                lambda mkn=mkn: linear.benchmark(*mkn, options.rounds),
            )
            for mkn in options.mkn
        ]
    return [
        (card, "end-to-end", _end_to_end_rows, lambda card=card: end_to_end.benchmark(card, options.rounds))
        for card in (options.card or CARDS)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--linear", action="store_true", help="single linear layers instead of whole steps")
    which.add_argument("--pack", action="store_true", help="the pack kernel alone")
    which.add_argument("--metrics", action="store_true", help="what MaskMetrics costs beside a step")
    parser.add_argument("--mkn", nargs="+", type=_shape, default=list(linear.SHAPES), metavar="M,K,N")
    parser.add_argument("--card", nargs="+", choices=CARDS)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved blocks per variant")
    parser.add_argument("--save", nargs="?", type=Path, const=store.RESULTS, metavar="DIR")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: these benchmarks measure a GPU")
    pd.set_option("display.width", 200, "display.max_columns", 20, "display.max_colwidth", 60, "display.precision", 3)
    print("peaks by data sheet (TFLOP/s):", store.PEAKS_TFLOPS.get(torch.cuda.get_device_name(), "unknown"))
    for name, kind, rows, job in _jobs(options):
        result = job()
        table = pd.DataFrame(rows(result))
        print(table.to_string(index=False, na_rep=""), flush=True)
        if options.save:
            path = store.save(name, {"kind": kind, **result}, options.save)
            table.to_csv(path.with_suffix(".csv"), index=False)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
