import json
from dataclasses import asdict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import semisparse
from semisparse.demo import checkpoint, files
from semisparse.demo.model import build_model
from semisparse.errors import CheckpointError
from tests.demo.toys import MODEL


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, build_model(MODEL, seed=1), {"data": "toy", "test_accuracy": 0.5})
    return path


def edit(path: Path, **changes: object) -> None:
    sidecar = path.with_suffix(".json")
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), **changes}))


def replace_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Other contents with a right checksum."""
    import hashlib

    content = safetensors.torch.save(tensors)
    path.write_bytes(content)
    edit(path, sha256=hashlib.sha256(content).hexdigest())


def test_a_checkpoint_comes_back_bit_for_bit_in_a_plain_model(saved):
    found = checkpoint.load(saved)
    expected = build_model(MODEL, seed=1).state_dict()
    state = found.model.state_dict()
    assert list(state) == list(expected) and all(torch.equal(state[name], expected[name]) for name in expected)
    assert found.info == {"data": "toy", "test_accuracy": 0.5} and found.model.config == MODEL
    linears = [module for module in found.model.modules() if isinstance(module, nn.Linear)]
    assert linears and {type(module) for module in linears} == {nn.Linear}
    assert not found.model.training
    assert all(parameter.requires_grad and parameter.device.type == "cpu" for parameter in found.model.parameters())


def test_a_loaded_model_can_be_trained_on(saved):
    model = checkpoint.load(saved).model
    model(torch.randn(2, 1, 8, 8)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(model.head.weight, build_model(MODEL, seed=1).head.weight)


def test_the_description_is_json_with_version_and_checksum(saved):
    import hashlib

    description = json.loads(saved.with_suffix(".json").read_text())
    assert description["format"] == "semisparse-vit" and description["version"] == 1
    assert description["sha256"] == hashlib.sha256(saved.read_bytes()).hexdigest()
    assert description["model"] == asdict(MODEL)


def flip_a_bit(path: Path) -> str:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return r"model\.safetensors is damaged or was replaced: its sha256 is [0-9a-f]{64}, model\.json says [0-9a-f]{64}"


def truncate(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:-100])
    return "its sha256 is"


def remove_tensors_file(path: Path) -> str:
    path.unlink()
    return r"model\.safetensors is missing"


def remove_sidecar(path: Path) -> str:
    path.with_suffix(".json").unlink()
    return r"model\.json is missing"


def folder_instead(path: Path) -> str:
    path.unlink()
    path.mkdir()
    return "cannot be read: Is a directory"


def truncate_sidecar(path: Path) -> str:
    sidecar = path.with_suffix(".json")
    sidecar.write_bytes(sidecar.read_bytes()[:40])
    return "is no JSON"


def binary_sidecar(path: Path) -> str:
    path.with_suffix(".json").write_bytes(b"\xff\xfe\x00")
    return "is no JSON"


def foreign_sidecar(path: Path) -> str:
    path.with_suffix(".json").write_text('["a list"]')
    return "'format' is not 'semisparse-vit'"


def newer(path: Path) -> str:
    edit(path, version=2)
    return "has version 2; this release reads 1"


def without_checksum(path: Path) -> str:
    edit(path, sha256=None)
    return "'sha256' is missing or no str"


def impossible_model(path: Path) -> str:
    edit(path, model={**asdict(MODEL), "heads": 3})
    return "width=16 must be a multiple of heads=3"


def unknown_setting(path: Path) -> str:
    edit(path, model={**asdict(MODEL), "registers": 4})
    return "registers"


def no_safetensors(path: Path) -> str:
    import hashlib

    path.write_bytes(b"not a tensor file")
    edit(path, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    return "is no safetensors file"


def tensor_missing(path: Path) -> str:
    tensors = build_model(MODEL, seed=1).state_dict()
    del tensors["head.bias"]
    replace_tensors(path, tensors)
    return r"1 tensors; first 'head.bias': expected .* found none"


def tensor_extra(path: Path) -> str:
    replace_tensors(path, {**build_model(MODEL, seed=1).state_dict(), "extra": torch.zeros(1)})
    return r"first 'extra': expected none"


def other_shape(path: Path) -> str:
    replace_tensors(path, {**build_model(MODEL, seed=1).state_dict(), "head.bias": torch.zeros(9)})
    return r"'head.bias': expected \(\(4,\), torch.float32\), found \(\(9,\)"


def other_dtype(path: Path) -> str:
    replace_tensors(path, {name: tensor.half() for name, tensor in build_model(MODEL, seed=1).state_dict().items()})
    return "torch.float16"


def bigger_model(path: Path) -> str:
    edit(path, model={**asdict(MODEL), "width": 1 << 20})
    return "does not fit its description"


@pytest.mark.parametrize(
    "damage",
    [flip_a_bit, truncate, remove_tensors_file, remove_sidecar, folder_instead, truncate_sidecar, binary_sidecar,
     foreign_sidecar, newer, without_checksum, impossible_model, unknown_setting, no_safetensors, tensor_missing,
     tensor_extra, other_shape, other_dtype, bigger_model],
)  # fmt: skip
def test_a_damaged_or_foreign_checkpoint_is_refused_with_the_reason(saved, damage):
    message = damage(saved)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(saved)


def test_a_model_that_is_still_sparse_is_not_saved(tmp_path):
    model = build_model(MODEL, seed=1)
    semisparse.sparsify(model, select="mlp")
    with pytest.raises(CheckpointError, match="densify"):
        checkpoint.save(tmp_path / "model.safetensors", model)
    assert not list(tmp_path.iterdir())


def test_another_ending_and_a_missing_folder_are_refused(tmp_path):
    model = build_model(MODEL, seed=1)
    with pytest.raises(CheckpointError, match=r"must end in \.safetensors"):
        checkpoint.save(tmp_path / "model.pt", model)
    with pytest.raises(CheckpointError, match="cannot be written: No such file"):
        checkpoint.save(tmp_path / "missing" / "model.safetensors", model)


def test_without_safetensors_the_error_says_what_to_install(saved, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(CheckpointError, match=r"pip install 'semisparse\[demo\]'"):
        checkpoint.load(saved)


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    files.write_atomically(path, b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
