"""What the autotuner is asked in a layer's call, forward and backward, from its settings alone."""

import torch
from torch import Tensor

from semisparse import routes
from semisparse.config import SparseConfig
from semisparse.formats.layout import FP8, round_up, sparse_multiple
from semisparse.gemm import problem as problems
from semisparse.gemm.autotune.autotuner import Asked
from semisparse.gemm.problem import Problem
from semisparse.gemm.weight_gradient import WeightGradient
from semisparse.ops.fp8_packed import sums_dtype
from semisparse.planning.problems import DTYPES, LinearProblem


def why_no_engine(weight: Tensor, dtype: torch.dtype, config: SparseConfig) -> str:
    """Why a layer has no product that the sparse engine could compute; "" if it has.

    Args:
        weight: (N, K), where it trains.
        dtype: That the products are computed in.
        config: Of the layer.
    """
    if not config.prunes:
        return "its weight is not pruned"
    if config.backend != "dense" and weight.is_cuda and in_fp8(weight, dtype, config):
        return ""
    return routes.why_masked_dense(weight, dtype, config.backend)


def in_fp8(weight: Tensor, dtype: torch.dtype, config: SparseConfig) -> bool:
    """Whether the products of a layer are computed in fp8.

    Args:
        weight: (N, K), where it trains.
        dtype: Of the call.
        config: Of the layer.
    """
    return config.precision is not None and not routes.why_not_fp8(weight, dtype)


def engine_products(call: LinearProblem, config: SparseConfig, fp8: bool) -> dict[str, Asked]:
    """The sparse products of one call of a layer, forward and backward, in its sparse phase.

    They are the same whether the weight is packed at each forward or per step.

    Args:
        call: Sizes, dtypes, and which gradients are needed.
        config: Of the layer.
        fp8: Whether they are computed in fp8.

    Returns:
        "forward", "grad_input" and "grad_weight", those that have a 2:4 operand and are needed; and, as "sampling",
        the weight gradient of which it is measured whether it is sampled.
    """
    made = _of_activation(call) if config.operand == "activation" else _of_weight(call, config, fp8)
    needed = {"forward": True, "grad_input": call.grad_input, "grad_weight": call.grad_weight}
    sparse = {name for name, how in config.products.items() if how.startswith("sparse") and needed[name]}
    found: dict[str, Asked] = {name: problem for name, problem in made.items() if name in sparse}
    if fp8 and "grad_weight" in found and config.backend == "auto":
        dtypes = DTYPES[call.dtype], DTYPES[call.weight_dtype]
        found["sampling"] = WeightGradient(call.tokens, call.out_features, call.in_features, *dtypes, call.bias)
    return found


def _of_weight(call: LinearProblem, config: SparseConfig, fp8: bool) -> dict[str, Problem]:
    sizes, dtype = (call.out_features, call.in_features), DTYPES[call.dtype]
    if not fp8:
        return {
            "forward": problems.forward(call.tokens, *sizes, dtype, call.bias),
            "grad_input": problems.grad_input(call.tokens, *sizes, dtype),
            "grad_weight": problems.sampled_weight(call.tokens, *sizes, dtype),
        }
    # A sample of dy is padded for its own product, and dx is computed from the same e4m3 rows.
    rows = call.tokens if config.grad_output is None else round_up(call.tokens, sparse_multiple(FP8))
    return {
        "forward": problems.fp8_forward(call.tokens, *sizes, sums_dtype(dtype)),
        "grad_input": problems.fp8_grad_input(rows, *sizes, sums_dtype(dtype)),
        "grad_weight": problems.fp8_sampled_weight(call.tokens, *sizes, sums_dtype(DTYPES[call.weight_dtype])),
    }


def _of_activation(call: LinearProblem) -> dict[str, Problem]:
    sizes = call.tokens, call.out_features, call.in_features, DTYPES[call.dtype]
    return {"forward": problems.activation_forward(*sizes), "grad_weight": problems.activation_weight(*sizes)}
