"""Tuning of the linear shapes of common models, for the table that ships: what each product runs, 16-bit and fp8.

Measures nothing else. benchmarks/shipped_table.py takes the choices from the result.
"""

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.table import Table
from benchmarks.timing import device
from semisparse import SemiSparseLinear, SparseConfig, tuning

SHAPES = (
    *((13008, k, n) for k, n in ((1024, 1024), (1024, 3072), (1024, 4096), (4096, 1024))),
    *((8192, k, n) for k, n in ((768, 768), (768, 2304), (768, 3072), (3072, 768))),
    *((16384, k, n) for k, n in ((2048, 2048), (2048, 8192), (8192, 2048))),
    *((16384, k, n) for k, n in ((4096, 4096), (4096, 11008), (11008, 4096))),
)
"""M x K x N of ViT-L, of BERT-base and GPT-2 124M, and of two Llama-like models."""
CONFIGS = {
    "2:4 + mvue": SparseConfig(grad_output="mvue"),
    "fp8 + 2:4 + mvue": SparseConfig(precision="fp8", grad_output="mvue"),
}


def benchmark(shapes: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
    """Tune all products of a bf16 layer of each shape, with and without bias.

    Args:
        shapes: M x K x N.

    Returns:
        Per layer and product what was chosen, and the autotuner's state.
    """
    chosen: list[dict[str, str]] = []
    for tokens, in_features, out_features in shapes:
        x = torch.randn(tokens, in_features, device=device(), dtype=torch.bfloat16, requires_grad=True)
        for name, config in CONFIGS.items():
            for bias in (True, False):
                sizes = {"device": x.device, "dtype": x.dtype, "config": config}
                report = tuning.tune(SemiSparseLinear(in_features, out_features, bias=bias, **sizes), x, progress=print)
                layer = f"{tokens} x {in_features} x {out_features}, {name}" + (", bias" if bias else "")
                chosen += [
                    {"layer": layer, "product": product.split()[-1], "outcome": row.outcome, "choice": str(row.choice)}
                    for row in report
                    for product in row.products
                ]
    return {"chosen": chosen, "tuning": tuning.state()}


def table(results: Sequence[dict[str, Any]]) -> Table:
    """A line per product of a layer."""
    rows = [
        (one["layer"], one["product"], one["outcome"], one["choice"][:48])
        for result in results
        for one in result["chosen"]
    ]
    return Table(("M x K x N", "product", "outcome", "choice"), tuple(rows))
