"""Tuning with made-up times: a trial on the simulated library, a call of a tuner, rows of a shipped table."""

import json

import torch

from semisparse.gemm import problem as problems
from semisparse.gemm.trial import Operands, Trial
from tests.gemm.simulated import operands

FORWARD = problems.forward(24, 32, 48, torch.bfloat16)


class Timed(Trial):
    """Real checks on the simulated library, made-up times: algorithm 4 is the fastest, dense takes `dense_us`."""

    made = 0
    dense_us = 50.0

    def __init__(self, *arguments):
        super().__init__(*arguments)
        type(self).made += 1

    def time(self, algorithm, repeats):
        return self.dense_us if algorithm is None else 10.0 + abs(algorithm - 4)


def table(rows=()):
    return json.dumps({"schema": 1, "rows": list(rows)})


def call(tuner, problem=FORWARD, dense=True):
    a, b, out, bias = operands(problem)
    packed = tuner._engine.compress(a)
    return tuner.choose(problem, -1, Operands(packed, b, out, bias, (lambda: None) if dense else None))


def shipped_row(**change):
    return {
        "gpu": "Simulated", "cusparselt": 800, "dtype": "bfloat16", "b_order": "column", "d_order": "column",
        "token_axis": "columns", "bias": False, "rows": [17, 32], "reduction": [33, 64], "columns": [1, 64],
        "algorithm": 2, "sparse_algorithm": 2,
    } | change  # fmt: skip
