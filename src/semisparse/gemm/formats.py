"""Which packed format a device's engine reads: found out once for each device and dtype."""

import threading
from dataclasses import dataclass

import torch

from semisparse.gemm.engine import engine
from semisparse.gemm.layout import MetadataLayout, NotAPermutation, discover


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """How matrices are packed on a device.

    layout: where the metadata lies, or None where that is no bit permutation; then only the engine reads a buffer.
    reason: what was found, for people.
    """

    layout: MetadataLayout | None
    reason: str


_FORMATS: dict[tuple[int, torch.dtype], PackedFormat] = {}
_LOCK = threading.Lock()


def packed_format(index: int, dtype: torch.dtype) -> PackedFormat:
    """The format for CUDA device index and dtype (fp16 or bf16). The first call probes the engine and waits for it."""
    found = _FORMATS.get((index, dtype))
    if found is None:
        with _LOCK:
            found = _FORMATS.get((index, dtype)) or _find(index, dtype)
            _FORMATS[index, dtype] = found
    return found


def _find(index: int, dtype: torch.dtype) -> PackedFormat:
    verdict = engine().available(index)
    if not verdict.ok:
        return PackedFormat(None, verdict.reason)
    layout = discover(engine().compress, dtype, device=torch.device("cuda", index))
    if isinstance(layout, NotAPermutation):
        return PackedFormat(None, f"layout unknown: {layout.reason}")
    return PackedFormat(layout, "layout verified against NVIDIA's compressor")
