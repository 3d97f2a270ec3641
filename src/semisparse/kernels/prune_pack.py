"""Prune and pack in one pass: a dense matrix is read once, W~ and W~^T are written in the engine's format."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from semisparse.errors import EngineError, ShapeError, TensorError
from semisparse.kernels import tiles, words
from semisparse.kernels.metadata import GROUP_BIT, engine_words, nibble_address, word_offsets

Mode = Literal["transposable", "codes", "row", "soft"]


@triton.jit
def _load(base, row_offsets, row_stride, columns, mask_rows, mask_columns, EDGE: tl.constexpr, more):
    """The 4 lines of a row of tiles, one tensor each; lines past the edge read as zeros."""
    lines = ()
    for i in tl.static_range(4):
        place = base + (row_offsets * 4 + i)[:, None] * row_stride + columns
        lines = lines + (tl.load(place),)
    return lines
