"""Which weights of a checkpoint are 2:4: every verdict against a definition by brute force."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from semisparse import checkpoint, reference
from semisparse.checkpoint import check_checkpoint
from semisparse.errors import CheckpointError

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


def saved(folder: Path, tensors: dict[str, Tensor], name: str = "model.safetensors") -> Path:
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / name)
    return folder / name


def pruned(mask: str, rows: int = 48, columns: int = 80) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))
    return torch.where(getattr(reference.masks, mask)(weight), weight, 0)


def by_definition(matrix: Tensor) -> float | None:
    """Share of the groups of four neighbours in a row that keep at most two."""
    rows, columns = matrix.shape
    if columns % 4:
        return None
    groups = [matrix[i, j : j + 4].tolist() for i in range(rows) for j in range(0, columns, 4)]
    return sum(sum(entry != 0 for entry in group) <= 2 for group in groups) / len(groups)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_axis_is_found_in_each_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    both, row = pruned("transposable"), pruned("row")
    tensors = {"both": both, "columns": row, "rows": row.mT, "none": torch.ones(8, 8), "zero": -torch.zeros(4, 4)}
    found = check_checkpoint(saved(tmp_path, {name: tensor.to(dtype) for name, tensor in tensors.items()}))
    assert {weight.name: weight.axis for weight in found} == {name: name for name in tensors} | {"zero": "both"}


def test_shares_are_those_of_the_definition_also_where_slices_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"even": (40, 24), "odd rows": (41, 24), "odd columns": (40, 23), "odd": (3, 5), "flat": (1, 8)}
    tensors = {
        name: torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.45)
        for name, shape in shapes.items()
    }
    path = saved(tmp_path, tensors)
    for size in (checkpoint._BYTES, 1, 8 * 24 * 12):
        monkeypatch.setattr(checkpoint, "_BYTES", size)
        for weight in check_checkpoint(path):
            matrix = tensors[weight.name]
            assert (weight.shape, weight.dtype) == (tuple(matrix.shape), "F32")
            assert weight.columns == by_definition(matrix)
            assert weight.rows == by_definition(matrix.mT)
            assert weight.zeros == int((matrix == 0).sum()) / matrix.numel()


def test_nan_is_kept_and_other_tensors_are_counted(tmp_path: Path) -> None:
    broken = torch.zeros(4, 4)
    broken[0, :3] = torch.nan
    others = {"bias": torch.ones(4), "ids": torch.ones(4, 4, dtype=torch.int64), "empty": torch.ones(0, 4)}
    report = check_checkpoint(saved(tmp_path, {"broken": broken, **others}))
    assert [(weight.name, weight.columns, weight.axis) for weight in report] == [("broken", 0.75, "rows")]
    assert report.others == 3
    assert "1 of 1 matrices are 2:4" in report.summary


def test_shards_and_folders_are_read_as_one(tmp_path: Path) -> None:
    saved(tmp_path, {"b": torch.ones(4, 4)}, "model-1.safetensors")
    saved(tmp_path, {"a": torch.zeros(4, 4)}, "model-2.safetensors")
    assert [weight.name for weight in check_checkpoint(tmp_path)] == ["a", "b"]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))
    assert [weight.name for weight in check_checkpoint(index)] == ["a"]
    assert [weight.name for weight in check_checkpoint(str(tmp_path))] == ["a"]


def test_a_share_is_never_rounded_up_to_all(tmp_path: Path) -> None:
    weight = torch.zeros(400, 400)
    weight[0, :3] = 1
    (found,) = check_checkpoint(saved(tmp_path, {"w": weight}))
    assert found.axis == "rows"
    assert "99.99 %" in str(check_checkpoint(tmp_path))


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        (None, "model.safetensors", "is not there"),
        (b"", "model.safetensors", "cannot be read"),
        (b"\xff" * 64, "model.safetensors", "cannot be read"),
        (b"{}", "model.bin", "is not a .safetensors file"),
        (b"{", "m.safetensors.index.json", "is not an index of shards"),
        (b"[]", "m.safetensors.index.json", "is not an index of shards"),
        (b'{"weight_map": {"a": "x.safetensors"}}', "m.safetensors.index.json", "x.safetensors"),
        (b'{"weight_map": {"a": "x\\u001b[31m.safetensors"}}', "m.safetensors.index.json", r"'x\\x1b\[31m"),
        (b'{"weight_map": {"a": "../x.safetensors"}}', "m.safetensors.index.json", "not a file beside it"),
        (b'{"weight_map": {"a": "/x.safetensors"}}', "m.safetensors.index.json", "not a file beside it"),
        (b"[" * 30_000, "m.safetensors.index.json", "is not an index of shards"),
    ],
)
def test_damaged_and_missing_files_are_refused(tmp_path: Path, content: bytes | None, name: str, words: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as error:
        check_checkpoint(path)
    assert str(path) in str(error.value) and str(error.value).isprintable()


def test_a_file_without_a_matrix_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="folder without"):
        check_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no matrix"):
        check_checkpoint(saved(tmp_path, {"bias": torch.ones(4)}))


def test_a_name_in_two_files_of_a_folder_is_an_error_that_names_both(tmp_path: Path) -> None:
    for name in ("first.safetensors", "second.safetensors"):
        saved(tmp_path, {"a": torch.ones(8, 8)}, name)
    with pytest.raises(CheckpointError, match=r"'a' in first\.safetensors and in second\.safetensors; name one"):
        check_checkpoint(tmp_path)
