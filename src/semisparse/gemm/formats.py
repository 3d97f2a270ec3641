"""How matrices are packed on a device: found out once for each device and dtype, and never silently.

The pack kernel writes any bit permutation (gemm/layout.py) whose blocks it holds. Where the engine's format is another
one, NVIDIA's compressor packs, which is far slower. Without an engine nobody but us reads a packed buffer, so the
kernel writes the sm90 layout.
"""

import threading
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch

from semisparse.errors import EngineError
from semisparse.gemm.engine import engine
from semisparse.gemm.layout import SM90_16BIT, MetadataLayout, NotAPermutation, discover

Packer = Literal["kernel", "compressor", "reference"]

KERNEL_BLOCK = (64, 16)
"""Rows and groups that a program of the pack kernel holds; a layout's blocks must not be larger."""


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """packer: who writes the buffers. layout: where metadata lies, None where only the engine knows. reason: why."""

    packer: Packer
    layout: MetadataLayout | None
    reason: str


_FORMATS: dict[tuple[int, torch.dtype], PackedFormat] = {}
_LOCK = threading.Lock()


def packed_format(index: int, dtype: torch.dtype) -> PackedFormat:
    """The format for CUDA device index and dtype (fp16 or bf16). The first call probes the engine and waits for it.

    Warns once where the fast way is not open. Raises EngineError when the first call comes under CUDA graph capture.
    """
    found = _FORMATS.get((index, dtype))
    if found is None:
        if engine().runtime.capturing():
            raise EngineError(f"packing {dtype} on device {index} was never tried; run one step before capturing it")
        with _LOCK:
            found = _FORMATS.get((index, dtype)) or _find(index, dtype)
            _FORMATS[index, dtype] = found
    return found


def _find(index: int, dtype: torch.dtype) -> PackedFormat:
    verdict = engine().available(index)
    layout = discover(engine().compress, dtype, device=torch.device("cuda", index)) if verdict.ok else SM90_16BIT
    reason = "layout verified against NVIDIA's compressor" if verdict.ok else f"no sparse engine: {verdict.reason}"
    obstacle = _obstacle(layout)
    if obstacle is None and isinstance(layout, MetadataLayout):
        return PackedFormat("kernel", layout, reason)
    known = layout if isinstance(layout, MetadataLayout) else None
    found = PackedFormat("compressor" if verdict.ok else "reference", known, f"{obstacle}; {reason}")
    warnings.warn(
        f"packing on device {index} is slow, by {found.packer} instead of the Triton kernel: {found.reason}; "
        "engine='dense' may be faster",
        RuntimeWarning,
        stacklevel=2,
    )
    return found


def _obstacle(layout: MetadataLayout | NotAPermutation) -> str | None:
    """Why the pack kernel cannot be used with a layout, or None."""
    if isinstance(layout, NotAPermutation):
        return f"layout unknown: {layout.reason}"
    rows, groups = KERNEL_BLOCK
    if rows % layout.block_rows or groups % layout.block_groups:
        return f"the kernel cannot write blocks of {layout.block_rows} rows x {layout.block_groups} groups"
    return None if find_spec("triton") else "triton is not installed"
