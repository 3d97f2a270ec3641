"""A packed matrix, and what packs matrices on a device: found out once per device and dtype, and reported.

The pack kernel writes any bit permutation (layout.py) whose blocks fit into its programs. Where the engine's format is
something else, NVIDIA's compressor packs, which is far slower. Without an engine only this library reads a packed
buffer, so the kernel writes the sm90 layout.
"""

import logging
import sys
import threading
import warnings
from importlib.util import find_spec
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from semisparse import forks
from semisparse.errors import EngineError
from semisparse.formats.layout import LARGEST_BLOCK, MetadataLayout, sm90_layout
from semisparse.formats.probe import NotAPermutation, discover

logger = logging.getLogger(__name__)

Packer = Literal["kernel", "compressor", "reference"]


class PackedMatrix(NamedTuple):
    """A packed 2:4 matrix (R x C) and its packed transpose.

    Attributes:
        matrix: uint8 buffer of the matrix, packed along its columns. For a weight W (N x K) it serves y = x W~^T.
        transposed: uint8 buffer of the transpose (C x R), packed along R. For a weight it serves dx = dy W~. Empty
            where the mask is 2:4 along the columns only.
        scale: What the values must be multiplied by, one fp32 element; None for 16-bit values, which are exact.
    """

    matrix: Tensor
    transposed: Tensor
    scale: Tensor | None = None


class PackedFormat(NamedTuple):
    """How matrices are packed on a device.

    Attributes:
        packer: What writes the buffers: the Triton kernel, NVIDIA's compressor or the reference implementation.
        layout: Where the metadata lies; None where only the engine knows.
        reason: Why this packer was taken.
    """

    packer: Packer
    layout: MetadataLayout | None
    reason: str


class _Verdict(Protocol):
    @property
    def ok(self) -> bool: ...
    @property
    def reason(self) -> str: ...


class _Runtime(Protocol):
    def capturing(self) -> bool: ...


class Compressor(Protocol):
    """What is needed of an engine to find out its format: gemm.engine.Engine has it."""

    @property
    def runtime(self) -> _Runtime:
        """CUDA, as far as it is asked here."""

    def available(self, device: int) -> _Verdict:
        """Whether the engine can be used on a device, and the reason."""

    def compress(self, dense: Tensor) -> Tensor:
        """Pack a 2:4 matrix."""


_FORMATS: dict[tuple[int, torch.dtype], PackedFormat] = {}
_LOCK = threading.Lock()
forks.renewed_in_children(sys.modules[__name__], "_LOCK", threading.Lock)


def packed_format(index: int, dtype: torch.dtype, engine: Compressor) -> PackedFormat:
    """The packed format of a device and dtype. The first call probes the engine and waits for the device.

    Args:
        index: Of a CUDA device.
        dtype: Of the packed values, fp16, bf16 or float8_e4m3fn.
        engine: The process's engine, which the first call asks.

    Returns:
        The format, the same object at each call.

    Raises:
        EngineError: When the first call comes while a CUDA graph is captured.

    Warns:
        RuntimeWarning: Once, where the pack kernel cannot be used.
    """
    found = _FORMATS.get((index, dtype))
    if found is None:
        if engine.runtime.capturing():
            raise EngineError(
                f"nothing of {dtype} was packed on device {index} yet, and the format cannot be probed while a CUDA "
                "graph is captured: run one step before the capture"
            )
        with _LOCK:
            found = _FORMATS.get((index, dtype)) or _find(index, dtype, engine)
            _FORMATS[index, dtype] = found
    return found


def _find(index: int, dtype: torch.dtype, engine: Compressor) -> PackedFormat:
    verdict = engine.available(index)
    layout = _discover(index, dtype, engine) if verdict.ok else sm90_layout(dtype)
    reason = "layout verified against NVIDIA's compressor" if verdict.ok else f"no sparse engine: {verdict.reason}"
    obstacle = _obstacle(layout)
    if obstacle is None and isinstance(layout, MetadataLayout):
        logger.info("%s on device %d: packed by the Triton kernel; %s; %s", dtype, index, reason, layout)
        return PackedFormat("kernel", layout, reason)
    known = layout if isinstance(layout, MetadataLayout) else None
    found = PackedFormat("compressor" if verdict.ok else "reference", known, f"{obstacle}; {reason}")
    logger.info("%s on device %d: packed by %s; %s", dtype, index, found.packer, found.reason)
    warnings.warn(
        f"packing on device {index} is slow, by {found.packer} instead of the Triton kernel: {found.reason}; "
        "backend='dense' may be faster",
        RuntimeWarning,
        stacklevel=3,
    )
    return found


def _discover(index: int, dtype: torch.dtype, engine: Compressor) -> MetadataLayout | NotAPermutation:
    """8-bit matrices are probed as bytes: PyTorch has few functions for such dtypes, and a compressor moves bytes."""
    device = torch.device("cuda", index)
    if dtype.itemsize == 1:
        return discover(lambda matrix: engine.compress(matrix.view(dtype)), torch.uint8, device=device)
    return discover(engine.compress, dtype, device=device)


def _obstacle(layout: MetadataLayout | NotAPermutation) -> str | None:
    """Why the pack kernel cannot be used with a layout, or None."""
    if isinstance(layout, NotAPermutation):
        return f"layout unknown: {layout.reason}"
    rows, groups = LARGEST_BLOCK
    if rows % layout.block_rows or groups % layout.block_groups:
        return f"the kernel cannot write blocks of {layout.block_rows} rows x {layout.block_groups} groups"
    return None if find_spec("triton") else "triton is not installed"
