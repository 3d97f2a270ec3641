"""Part "numerics": each path once, in turn, within the budget."""

import math
from collections.abc import Callable, Mapping

import torch

from semisparse.gemm.autotune.algorithm import clipped, one_line
from semisparse.gemm.engine import available
from semisparse.selfcheck.contents import Check, Outcome
from semisparse.selfcheck.operands import Setting
from semisparse.selfcheck.paths import NotHere, Path, paths

ON_A_GPU, ON_THE_CPU = (1000, 512, 1024), (96, 64, 96)
"""M, K, N of the checks."""


def setting_of(device: torch.device) -> Setting:
    """What is checked on a device.

    Args:
        device: "cpu", or a CUDA device with its index.
    """
    if device.type != "cuda":
        return Setting(device, ON_THE_CPU, "CPU")
    verdict = available(device)
    return Setting(device, ON_A_GPU, "" if verdict.ok else verdict.reason)


def check_paths(
    setting: Setting,
    late: Callable[[], str],
    progress: Callable[[str], None],
    add: Callable[[Check], None],
    which: Mapping[str, Path] | None = None,
) -> None:
    """Check each path; one that raises is recorded, and the rest goes on.

    Args:
        setting: Where.
        late: Why there is no time for another path; "" while there is.
        progress: Told each path's name.
        add: Takes each result as it is there.
        which: Paths by name; default: all.
    """
    named = paths() if which is None else which
    for number, (name, path) in enumerate(named.items(), 1):
        if reason := late():
            add(Check(name, "skipped", reason=reason))
            continue
        progress(f"numerics {number} of {len(named)}: {name}")
        add(checked(name, path, setting))


def checked(name: str, path: Path, setting: Setting) -> Check:
    """The outcome of one path.

    Args:
        name: Of the path.
        path: What to check.
        setting: Where.
    """
    try:
        found = path(setting)
    except NotHere as reason:
        return Check(name, "skipped", reason=clipped(str(reason)))
    except Exception as error:  # whatever a foreign machine makes of it is part of the result
        return Check(name, "raised", reason=one_line(error))
    outcome: Outcome = "pass" if found.ok else "fail"
    finite = math.isfinite(found.error)
    remark = "" if finite else "the result is not finite where it must be, or is no 2:4 matrix"
    if finite and setting.no_engine and setting.device.type == "cuda":
        remark = clipped(f"without sparse products: {setting.no_engine}")
    worst = float(found.error) if finite else None
    return Check(name, outcome, worst, float(found.allowed), found.where, found.rule, remark)
