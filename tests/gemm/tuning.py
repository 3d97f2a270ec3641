"""Tuning with made-up times: candidates on the simulated library, a call of an autotuner, a shipped choice."""

import torch

from semisparse.gemm import problem as problems
from semisparse.gemm.autotune.algorithm import Choice
from semisparse.gemm.autotune.candidates import Candidates
from semisparse.gemm.operands import Operands
from tests.gemm.simulated import operands

FORWARD = problems.forward(24, 32, 48, torch.bfloat16)


class Timed(Candidates):
    """Real checks on the simulated library, made-up times: algorithm 4 is the fastest, dense takes `dense_us`.

    In chunks a product takes `chunk_share` of its time.
    """

    made = 0
    dense_us = 50.0
    chunk_share = 1.0

    def __init__(self, *arguments):
        super().__init__(*arguments)
        type(self).made += 1

    def time(self, algorithm, repeats, chunk=None):
        share = 1.0 if chunk is None else self.chunk_share
        return self.dense_us if algorithm is None else share * (10.0 + abs(algorithm - 4))


def call(tuner, problem=FORWARD, dense=True):
    a, b, out, bias = operands(problem)
    packed = tuner._engine.compress(a)
    return tuner.choose(problem, -1, Operands(packed, b, out, bias), (lambda *given: None) if dense else None)


def shipped_entry(algorithm=2, sparse_algorithm=2, **change):
    """A choice for FORWARD as a shipped table has it."""
    conditions = {
        "gpu": "Simulated", "cusparselt": 800, "dtype": "bfloat16", "b_order": "column", "d_order": "column",
        "token_axis": "columns", "bias": False, "rows": 32, "reduction": 48, "columns": 24,
    }  # fmt: skip
    return conditions | change, Choice(algorithm, sparse_algorithm, None, None, "shipped")
