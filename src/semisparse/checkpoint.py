"""Which weights of a checkpoint are 2:4, and along which axis: found in the file, without a model.

Tensors are read in slices of rows, so memory stays small however large the file is.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from semisparse.errors import CheckpointError
from semisparse.pattern import GROUP, KEPT

SUFFIX, INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"

Axis = Literal["both", "columns", "rows", "none"]

_BYTES = 64 << 20  # of a slice
_MATRICES = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}


@dataclass(frozen=True, slots=True)
class WeightPattern:
    """The 2:4 pattern of one matrix (R x C) of a checkpoint.

    Attributes:
        name: The tensor's name.
        shape: R, C; of a linear layer's weight these are out_features and in_features.
        dtype: As safetensors names it.
        columns: Share of the groups of four neighbours in a row that keep at most two: 1.0 is 2:4 along the columns,
            which makes y = x W^T sparse. None where C is not a multiple of 4.
        rows: The same of four neighbours in a column, which makes dx = dy W sparse.
        zeros: Share of the entries that are zero.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    columns: float | None
    rows: float | None
    zeros: float

    @property
    def axis(self) -> Axis:
        """The axes along which every group keeps at most two."""
        found: dict[tuple[bool, bool], Axis] = {
            (True, True): "both", (True, False): "columns", (False, True): "rows", (False, False): "none",
        }  # fmt: skip
        return found[self.columns == 1.0, self.rows == 1.0]


@dataclass(frozen=True, slots=True)
class CheckpointReport:
    """The matrices of a checkpoint; print() shows a table.

    Attributes:
        weights: One per matrix of floating-point numbers, by name.
        others: Number of tensors that are no such matrices.
    """

    weights: tuple[WeightPattern, ...]
    others: int

    def __iter__(self) -> Iterator[WeightPattern]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def summary(self) -> str:
        """How many matrices are 2:4, in words."""
        count = {axis: sum(weight.axis == axis for weight in self.weights) for axis in ("both", "columns", "rows")}
        return (
            f"{sum(count.values())} of {len(self.weights)} matrices are 2:4: {count['both']} along both axes, "
            f"{count['columns']} along columns only, {count['rows']} along rows only; {self.others} other tensors"
        )

    def __str__(self) -> str:
        body = [("tensor", "shape", "dtype", "2:4 along", "columns", "rows", "zeros"), *map(cells, self.weights)]
        widths = [max(len(line[column]) for line in body) for column in range(len(body[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in body]
        return "\n".join([*(line.rstrip() for line in lines), self.summary])


def cells(weight: WeightPattern) -> tuple[str, ...]:
    """A weight as a row of text: name, shape, dtype, axis, shares of groups and of zeros."""
    shares = ("-" if share is None else percent(share) for share in (weight.columns, weight.rows))
    shape = " x ".join(map(str, weight.shape))
    return weight.name, shape, weight.dtype, weight.axis, *shares, percent(weight.zeros)


def percent(share: float) -> str:
    """A share in percent, never rounded up to 100."""
    return "100 %" if share == 1.0 else f"{min(100 * share, 99.99):.4g} %"


def check_checkpoint(path: str | Path) -> CheckpointReport:
    """Read a checkpoint and report which of its matrices are 2:4, exactly.

    Args:
        path: A .safetensors file, the .safetensors.index.json of a sharded one, or a folder with either.

    Returns:
        Every matrix of floating-point numbers. +0 and -0 count as zero, NaN does not.

    Raises:
        CheckpointError: There is no such file, it cannot be read, it has no matrix, or two files have one of a name.
        ImportError: safetensors is not installed.
    """
    weights: list[WeightPattern] = []
    others = 0
    file_of: dict[str, Path] = {}
    for file in _files(Path(path)):
        found, rest = _weights_of(file)
        for weight in found:
            first = file_of.setdefault(weight.name, file)
            if first != file:
                raise CheckpointError(
                    f"path={str(path)!r} has {weight.name!r} in {first.name} and in {file.name}; name one of the files"
                )
        weights += found
        others += rest
    if not weights:
        raise CheckpointError(
            f"path={str(path)!r} has no matrix of floating-point numbers, only {others} other tensors"
        )
    return CheckpointReport(tuple(sorted(weights, key=lambda weight: weight.name)), others)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        indices, files = sorted(path.glob(f"*{INDEX_SUFFIX}")), sorted(path.glob(f"*{SUFFIX}"))
        if len(indices) == 1:
            return _files(indices[0])
        if not files:
            raise CheckpointError(f"path={str(path)!r} is a folder without {SUFFIX} files; name a file")
        return files
    if not path.is_file():
        raise CheckpointError(f"path={str(path)!r} is not there; name a {SUFFIX} file, its {INDEX_SUFFIX} or a folder")
    if path.name.endswith(INDEX_SUFFIX):
        return _shards(path)
    if path.suffix != SUFFIX:
        raise CheckpointError(
            f"path={str(path)!r} is not a {SUFFIX} file; save the state_dict with safetensors.torch.save_file"
        )
    return [path]


def _shards(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        shards = [index.parent / name for name in sorted(names)]
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"it names {outside[0]!r}, which is not a file beside it")
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        said = f"{type(error).__name__}: {error}"  # not its repr, which can hold the whole file
        raise CheckpointError(f"path={str(index)!r} is not an index of shards ({said}); copy it again") from error
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise CheckpointError(
            f"path={str(index)!r} names shards that are not beside it: {', '.join(map(repr, missing))}; copy them"
        )
    return shards


def _weights_of(file: Path) -> tuple[list[WeightPattern], int]:
    from safetensors import SafetensorError, safe_open

    weights, others = [], 0
    try:
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118  (safe_open is not iterable)
                rows = content.get_slice(name)
                shape, dtype = rows.get_shape(), rows.get_dtype()
                if len(shape) == 2 and dtype in _MATRICES and all(shape):
                    weights.append(_pattern_of(name, (shape[0], shape[1]), dtype, rows))
                else:
                    others += 1
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"path={str(file)!r} cannot be read: {error}; copy it again") from error
    return weights, others


def _pattern_of(name: str, shape: tuple[int, int], dtype: str, rows: Any) -> WeightPattern:
    """rows: The matrix as safetensors slices it."""
    height, width = shape
    step = max(_BYTES // (8 * width) // GROUP, 1) * GROUP  # whole groups of rows
    good = {"columns": 0, "rows": 0}
    zeros = 0
    for first in range(0, height, step):
        kept = _nonzero(rows[first : first + step])
        zeros += kept.numel() - int(kept.sum())
        if width % GROUP == 0:
            good["columns"] += _good_groups(kept)
        if height % GROUP == 0:
            good["rows"] += _good_groups(kept.mT)
    groups = height * width // GROUP
    along_columns = good["columns"] / groups if width % GROUP == 0 else None
    along_rows = good["rows"] / groups if height % GROUP == 0 else None
    return WeightPattern(name, shape, dtype, along_columns, along_rows, zeros / (height * width))


def _nonzero(matrix: Tensor) -> Tensor:
    if matrix.itemsize == 1:
        return (matrix.view(torch.uint8) & 0x7F) != 0  # few operators take 8-bit floats
    return matrix != 0


def _good_groups(kept: Tensor) -> int:
    counts = kept.reshape(kept.shape[0], kept.shape[1] // GROUP, GROUP).sum(-1)
    return int((counts <= KEPT).sum())
