import json
import math
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import semisparse
from lab.tests.rewriting import described, rewrite
from lab.tests.toys import MODEL
from semisparse_lab.checkpoint import file as checkpoint
from semisparse_lab.checkpoint.description import NO_CHECKSUM
from semisparse_lab.checks import shown
from semisparse_lab.errors import CheckpointError
from semisparse_lab.models.vit import VisionTransformer, build_model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, build_model(MODEL, seed=1), {"data": "toy", "test_accuracy": 0.5})
    return path


def with_sizes(path: Path, **sizes: Any) -> None:
    rewrite(path, model={**asdict(MODEL), **sizes})


def with_header(path: Path, header: object) -> None:
    """Another header before the same data."""
    content = path.read_bytes()
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + int.from_bytes(content[:8], "little") :])


def header_of(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


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


def test_one_file_holds_everything_and_any_safetensors_reader_finds_it(saved):
    assert list(saved.parent.iterdir()) == [saved]
    description = described(saved)
    assert description["version"] == 2 and description["model"] == asdict(MODEL)
    assert description["info"] == {"data": "toy", "test_accuracy": 0.5}
    state = build_model(MODEL, seed=1).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in safetensors.torch.load_file(saved).items())


def test_the_checksum_is_returned_and_equal_models_make_equal_files(saved):
    before = saved.read_bytes()
    found = checkpoint.save(saved, build_model(MODEL, seed=1), {"data": "toy", "test_accuracy": 0.5})
    assert described(saved)["sha256"] == found and saved.read_bytes() == before


@pytest.mark.parametrize("place", ["first byte", "header", "data"])
def test_no_flipped_bit_passes(saved, place):
    content = saved.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    chosen = {"first byte": range(8), "header": range(8, header), "data": range(header, len(content), 97)}[place]
    for position in chosen:
        flipped = bytearray(content)
        flipped[position] ^= 4
        saved.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            checkpoint.load(saved)


def flip_a_bit(path: Path) -> str:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return r"is damaged or was edited: the sha256 of its contents is [0-9a-f]{64}, it says '[0-9a-f]{64}'"


def truncate(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:-100])
    return r"it has \d+ bytes, its header announces \d+"


def truncate_header(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:40])
    return "cut off in its header"


def empty(path: Path) -> str:
    path.write_bytes(b"")
    return "not a safetensors file"


def remove(path: Path) -> str:
    path.unlink()
    return r"model\.safetensors is missing"


def folder_instead(path: Path) -> str:
    path.unlink()
    path.mkdir()
    return "cannot be read: Is a directory"


def pipe_instead(path: Path) -> str:
    path.unlink()
    os.mkfifo(path)
    return "is not a regular file"


def endless_device_instead(path: Path) -> str:
    path.unlink()
    path.symlink_to("/dev/zero")
    return "is not a regular file"


def no_description(path: Path) -> str:
    path.write_bytes(safetensors.torch.save(build_model(MODEL, seed=1).state_dict()))
    return "has no description called 'semisparse-vit'"


def description_is_not_json(path: Path) -> str:
    rewrite(path, text="{")
    return "its description is not JSON"


def description_is_a_list(path: Path) -> str:
    rewrite(path, text='["a list"]')
    return "its description is not a dict"


def deep_description(path: Path) -> str:
    rewrite(path, text="[" * 100_000)
    return "nested too deeply"


def deep_info(path: Path) -> str:
    text = json.dumps({**described(path), "sha256": NO_CHECKSUM, "info": "HERE"})
    rewrite(path, text=text.replace('"HERE"', '{"a":' * 100_000 + "1" + "}" * 100_000))
    return "nested too deeply"


def deep_header(path: Path) -> str:
    with_header(path, b"[" * 100_000)
    return "nested too deeply"


def huge_header(path: Path) -> str:
    with path.open("r+b") as file:
        file.write((1 << 33).to_bytes(8, "little"))
        file.truncate(1 << 34)  # a sparse file
    return r"its header has 8589934592 bytes, more than the \d+ that are read at most"


def huge_data(path: Path) -> str:
    with path.open("r+b") as file:
        file.truncate(1 << 34)
    return r"it has 17179869184 bytes, its header announces \d+"


def names_twice(path: Path) -> str:
    text = json.dumps(header_of(path))
    with_header(path, (text[:-1] + ", " + text[1:]).encode())
    return "a name is given twice"


def header_of_numbers(path: Path) -> str:
    with_header(path, {"head.bias": 4})
    return "does not say where tensor 'head.bias' lies"


def impossible_offsets(path: Path) -> str:
    header = header_of(path)
    header["head.bias"]["data_offsets"] = [0, True]
    with_header(path, header)
    return "does not say where tensor 'head.bias' lies"


def overlapping_offsets(path: Path) -> str:
    header = header_of(path)
    header["head.bias"], header["norm.bias"] = (
        {**header["head.bias"], "data_offsets": header["norm.bias"]["data_offsets"]},
        {**header["norm.bias"], "data_offsets": header["head.bias"]["data_offsets"]},
    )
    with_header(path, header)
    return r"model\.safetensors is not a safetensors file"


def zero_sized_and_huge(path: Path) -> str:
    header = header_of(path)
    header["head.bias"]["shape"] = [0, 2**62, 2**62]
    with_header(path, header)
    return "does not fit its description"


def newer(path: Path) -> str:
    rewrite(path, version=3)
    return "has version 3; this release reads 2"


def version_of_another_type(path: Path) -> str:
    rewrite(path, version=2.0)
    return r"has version 2\.0; this release reads 2"


def without_checksum(path: Path) -> str:
    rewrite(path, sha256=None)
    return "'sha256' is missing or not a str"


def impossible_model(path: Path) -> str:
    with_sizes(path, heads=3)
    return "width=16 must be a multiple of heads=3"


def unknown_setting(path: Path) -> str:
    with_sizes(path, registers=4)
    return "'registers' is not a size of a ViT"


def missing_setting(path: Path) -> str:
    sizes = asdict(MODEL)
    del sizes["depth"]
    rewrite(path, model=sizes)
    return "'depth' is missing"


def not_safetensors(path: Path) -> str:
    path.write_bytes(b"not a tensor file")
    return "not a safetensors file"


def tensor_missing(path: Path) -> str:
    tensors = build_model(MODEL, seed=1).state_dict()
    del tensors["head.bias"]
    rewrite(path, tensors=tensors)
    return r"1 tensors; first 'head.bias': expected .* found none"


def tensor_extra(path: Path) -> str:
    rewrite(path, tensors={**build_model(MODEL, seed=1).state_dict(), "extra": torch.zeros(1)})
    return r"first 'extra': expected none"


def other_shape(path: Path) -> str:
    rewrite(path, tensors={**build_model(MODEL, seed=1).state_dict(), "head.bias": torch.zeros(9)})
    return r"'head.bias': expected \(\(4,\), torch.float32\), found \(\(9,\)"


def other_dtype(path: Path) -> str:
    rewrite(path, tensors={name: tensor.half() for name, tensor in build_model(MODEL, seed=1).state_dict().items()})
    return "torch.float16"


def bigger_model(path: Path) -> str:
    with_sizes(path, width=1 << 20)
    return "does not fit its description"


@pytest.mark.parametrize(
    "damage",
    [flip_a_bit, truncate, truncate_header, empty, remove, folder_instead, pipe_instead, endless_device_instead,
     no_description, description_is_not_json, description_is_a_list, deep_description, deep_info, deep_header,
     huge_header, huge_data, names_twice, header_of_numbers, impossible_offsets, overlapping_offsets,
     zero_sized_and_huge, newer, version_of_another_type, without_checksum, impossible_model, unknown_setting,
     missing_setting, not_safetensors, tensor_missing, tensor_extra, other_shape, other_dtype, bigger_model],
)  # fmt: skip
def test_a_damaged_or_foreign_checkpoint_is_refused_with_the_reason(saved, damage):
    message = damage(saved)
    with pytest.raises(CheckpointError, match=message) as refused:
        checkpoint.load(saved)
    assert len(str(refused.value)) < 600


WRONG_SIZES = [0, -1, True, 1.0, 8.5, math.nan, "28", None, [8], {"a": 1}, 10**9, 10**12, 10**4000]


@pytest.mark.parametrize("value", WRONG_SIZES, ids=lambda value: shown(value)[:12])
@pytest.mark.parametrize("name", asdict(MODEL))
def test_a_size_of_another_type_or_range_is_refused_at_once(saved, name, value):
    with_sizes(saved, **{name: value})
    start = time.perf_counter()
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors (does not describe a model|does not fit|is damaged)"
    ) as found:
        checkpoint.load(saved)
    assert time.perf_counter() - start < 1 and len(str(found.value)) < 600


@pytest.mark.parametrize("depth", [2, 100_000, 10_000_000])
def test_no_block_is_built_for_a_depth_that_the_file_does_not_hold(saved, depth, monkeypatch):
    with_sizes(saved, depth=depth)
    monkeypatch.setattr(VisionTransformer, "__init__", lambda *_: pytest.fail("built"))
    with pytest.raises(CheckpointError, match=rf"19 tensors do not make {depth} blocks"):
        checkpoint.load(saved)


@pytest.mark.parametrize(
    "info", [{"a": math.nan}, {"a": math.inf}, {"a": (1, 2)}, {1: "a"}, {"a": torch.zeros(1)}, ["a"], {"a": 10**5000},
             {"a": "x" * (4 << 20)}]
)  # fmt: skip
def test_info_that_would_not_come_back_is_not_saved(tmp_path, info):
    with pytest.raises(CheckpointError, match="info") as found:
        checkpoint.save(tmp_path / "model.safetensors", build_model(MODEL, seed=1), info)
    assert not list(tmp_path.iterdir()) and len(str(found.value)) < 600


def test_a_model_that_would_not_come_back_is_not_saved(tmp_path):
    for change in (lambda model: model.half(), lambda model: model.register_buffer("extra", torch.zeros(1))):
        model = build_model(MODEL, seed=1)
        change(model)
        with pytest.raises(CheckpointError, match="is not what its config describes"):
            checkpoint.save(tmp_path / "model.safetensors", model)
    assert not list(tmp_path.iterdir())


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
