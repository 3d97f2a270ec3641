"""Part "layouts": which packed formats were found on this GPU, and whether they were verified byte for byte."""

from collections.abc import Callable

import torch

from semisparse.formats.layout import FP8, PACKED_DTYPES
from semisparse.formats.packed import packed_format
from semisparse.gemm.autotune.algorithm import clipped, one_line
from semisparse.gemm.engine import engine
from semisparse.routes import why_not_fp8
from semisparse.selfcheck.contents import Layout, LayoutOutcome

DTYPES = (*PACKED_DTYPES, FP8)


def find_layouts(device: torch.device, add: Callable[[Layout], None]) -> None:
    """Look for the layout of each packed dtype.

    Args:
        device: A CUDA device with its index.
        add: Takes each result as it is there.
    """
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        reason = why_not_fp8(torch.empty(32, 32, device=device), torch.bfloat16) if dtype is FP8 else ""
        if reason:
            add(Layout(name, "skipped", "", (), clipped(reason)))
            continue
        try:
            add(_found(name, dtype, device))
        except Exception as error:  # one dtype is left out, and not the others
            add(Layout(name, "failed", "", (), one_line(error)))


def _found(name: str, dtype: torch.dtype, device: torch.device) -> Layout:
    found = packed_format(device.index or 0, dtype, engine())
    bits = () if found.layout is None else found.layout.bits
    outcome: LayoutOutcome = "verified" if bits else "failed"
    if not engine().available(device).ok:
        outcome = "unverified"
    return Layout(name, outcome, found.packer, bits, clipped(found.reason))
