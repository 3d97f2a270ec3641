"""Which packed format a device's engine reads, and who can write it: found out once for each device and dtype."""

import threading
from dataclasses import dataclass
from typing import Literal

import torch
from semisparse.gemm.layout import SM90_16BIT, MetadataLayout, NotAPermutation, discover

from semisparse.gemm.engine import engine

Packer = Literal["kernel", "compressor"]


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """How matrices are packed on a device.

    layout: the metadata layout that the pack kernel writes. packer: "kernel" packs in one pass; "compressor" means that
    the engine's format is no bit permutation the kernel can write, so NVIDIA's compressor packs each direction. reason:
    why, for people.
    """

    layout: MetadataLayout
    packer: Packer
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
        return PackedFormat(SM90_16BIT, "kernel", f"no engine ({verdict.reason}); only this package reads the format")
    layout = discover(engine().compress, dtype, device=torch.device("cuda", index))
    if isinstance(layout, NotAPermutation):
        return PackedFormat(SM90_16BIT, "compressor", f"packed by NVIDIA's compressor: {layout.reason}")
    return PackedFormat(layout, "kernel", f"layout verified against NVIDIA's compressor of {verdict.version}")
