"""A measurer on the CPU whose times are made up."""

from collections.abc import Mapping
from typing import Any

import torch

from semisparse.planning.candidates import as_candidates
from semisparse.planning.measuring import CAST, PACK, WITHOUT, Measurer
from semisparse.planning.problems import LinearProblem
from semisparse.planning.store import Measurement
from semisparse.planning.timing import Call, Mode, Times

CPU = torch.device("cpu")
POINTWISE, CAST_MS, PACK_MS = 0.25, 0.125, 1.0
SHARES = {"dense": 1.0, "dense fp8": 0.75, "2:4": 0.875, "2:4 + mvue": 0.8125, "fp8 + 2:4": 0.5}
"""Each candidate's time of dense's."""


def dense_ms(problem: LinearProblem) -> float:
    """Powers of two, so that sums are exact."""
    return problem.tokens * problem.in_features * problem.out_features / 2**12


class SimulatedTimer:
    """Runs each call once and gives made-up times.

    Args:
        shares: Candidate -> its time of dense's; one that is missing cannot be run in the mode.
        host: Milliseconds on the host per candidate; 0 if it is missing.
    """

    def __init__(self, shares: Mapping[str, float] = SHARES, host: Mapping[str, float] | None = None) -> None:
        self.shares, self.host = dict(shares), dict(host or {})
        self.seen: list[LinearProblem] = []
        self.names: list[list[str]] = []

    def __call__(self, problem: LinearProblem, calls: Mapping[str, Call], mode: Mode) -> dict[str, Times]:
        self.seen.append(problem)
        self.names.append(list(calls))
        extra = POINTWISE if WITHOUT in calls else 0.0
        found = {}
        for name, call in calls.items():
            call()
            if name == WITHOUT:
                found[name] = Times(extra, extra, 0.0)
            elif name == CAST:
                found[name] = Times(CAST_MS, CAST_MS, 0.0)
            elif name.startswith(PACK):
                found[name] = Times(PACK_MS, PACK_MS, 0.0)
            elif name in self.shares:
                ms = dense_ms(problem) * self.shares[name] + extra
                found[name] = Times(ms, ms, self.host.get(name, 0.0))
        return found


def measurer(
    timer: SimulatedTimer | None = None, candidates: Any = None, mode: Mode = "eager", **changes: Any
) -> Measurer:
    """On the CPU, without a store; compiling changes nothing."""
    settings = as_candidates(candidates)
    changes = {"timer": timer or SimulatedTimer(), "compile": lambda function: function} | changes
    return Measurer(settings, mode, CPU, **changes)


def measurement(problem: LinearProblem, shares: Mapping[str, float] = SHARES) -> Measurement:
    """What SimulatedTimer says of a problem."""
    ms = dense_ms(problem)
    return Measurement({name: Times(ms * share, ms * share, 0.0) for name, share in shares.items()},
                       Times(CAST_MS, CAST_MS, 0.0))  # fmt: skip
