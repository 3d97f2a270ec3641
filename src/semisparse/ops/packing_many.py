"""Packing many matrices at once, into buffers that keep their addresses."""

from collections.abc import Sequence

import torch
from torch import Tensor

from semisparse.formats.packed import PackedMatrix
from semisparse.ops.packing import pack


def pack_many(
    matrices: Sequence[Tensor],
    buffers: Sequence[PackedMatrix],
    dtype: torch.dtype,
    mask: str,
    codes: Sequence[Tensor | None] | None = None,
    scales: Sequence[Tensor | None] | None = None,
) -> None:
    """Overwrite buffers with what pack gives for each matrix, byte for byte, and raise their versions.

    A graph that saved a buffer before then raises PyTorch's error for in-place changes in its backward.

    Args:
        matrices: Each as pack takes it; of one stored dtype and on one device.
        buffers: One for each matrix, with the sizes that pack returns. The transpose is left out where its buffer is
            empty.
        dtype: As pack's.
        mask: As pack's.
        codes: As pack's, one or None for each matrix; None where no matrix has any.
        scales: As codes.

    Raises:
        ShapeError, TensorError, ConfigError, EngineError: As pack.
    """
    nothing = [None] * len(matrices)
    for matrix, into, held, scale in zip(matrices, buffers, codes or nothing, scales or nothing, strict=True):
        packed, transposed = pack(matrix.detach(), dtype, mask, held, scale)
        into.matrix.copy_(packed)
        if into.transposed.numel():
            into.transposed.copy_(transposed)
