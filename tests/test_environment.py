"""What `semisparse env` knows: it never fails, and it tells the path of each capability with the reason."""

import subprocess
from typing import get_args

import pytest
import torch

import semisparse
from semisparse import environment as env
from semisparse import native
from semisparse.formats.layout import SM90_16BIT
from semisparse.formats.packed import PackedFormat, Packer
from semisparse.gemm.cusparselt import Availability

NAMES = ["weight mask", "activation mask", "packing", "sparse GEMM", "launches"]


def test_the_facts_are_those_of_this_process() -> None:
    found = env.environment()
    assert found.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert found.facts["semisparse"] == semisparse.__version__
    assert found.facts["torch"] == torch.__version__
    named = {"Python", "platform", "GPU", "driver", "CUDA of torch", "triton", "cuSPARSELt", "nvmath-python"}
    assert named < set(found.facts)
    assert found.facts["native library"] == native.status().reason
    assert all(found.facts.values())
    assert found.capabilities == env.capabilities(found.device)


def test_a_package_that_is_not_installed_is_not_found() -> None:
    assert env._package("a-package-that-is-not-there") == "not found"
    assert env._package("torch").startswith(torch.__version__.partition("+")[0])


def test_a_driver_that_cannot_be_asked_is_unknown_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 20)

    monkeypatch.setattr(env, "driver_version", broken)
    assert env.environment().facts["driver"].startswith("unknown (TimeoutExpired: ")


def test_on_a_cpu_everything_is_the_reference() -> None:
    found = env.capabilities("cpu")
    assert [capability.name for capability in found] == NAMES
    assert {capability.reason for capability in found} == {"CPU"}
    assert {capability.name: capability.path for capability in found}["sparse GEMM"] == "masked dense (reference)"


def paths_on_cuda(
    monkeypatch: pytest.MonkeyPatch, verdict: Availability, packed: PackedFormat | Exception
) -> dict[str, tuple[str, str]]:
    """Name -> (path, reason) on a GPU whose engine and packed format are as given."""

    def packed_format(index: int, dtype: torch.dtype, engine: object) -> PackedFormat:
        assert index == 1
        if isinstance(packed, Exception):
            raise packed
        return packed

    monkeypatch.setattr(env, "available", lambda device: verdict)
    monkeypatch.setattr(env, "packed_format", packed_format)
    found = env.capabilities("cuda:1")
    assert [capability.name for capability in found] == NAMES
    return {capability.name: (capability.path, capability.reason) for capability in found}


PACKERS = [
    (PackedFormat("kernel", SM90_16BIT, "layout verified"), "Triton kernel", "Triton kernel"),
    (PackedFormat("compressor", None, "no permutation"), "reference", "NVIDIA's compressor"),
    (PackedFormat("reference", SM90_16BIT, "no triton"), "reference", "reference"),
]


@pytest.mark.parametrize(("packed", "mask", "packing"), PACKERS, ids=[packed.packer for packed, _, _ in PACKERS])
def test_on_a_gpu_who_prunes_and_packs_is_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, packed: PackedFormat, mask: str, packing: str
) -> None:
    found = paths_on_cuda(monkeypatch, Availability(True, "cuSPARSELt 0.8.1", 801), packed)
    assert found["weight mask"] == found["activation mask"] == (mask, env._WHERE_PACKED)
    assert found["packing"][0].startswith(packing)
    assert found["packing"][1] == packed.reason


def test_every_packer_has_its_words() -> None:
    assert set(env._PACKERS) == set(get_args(Packer)) == {packed.packer for packed, _, _ in PACKERS}


def test_on_a_gpu_with_the_engine_it_is_named_beside_masked_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = paths_on_cuda(monkeypatch, Availability(True, "cuSPARSELt 0.8.1", 801), PACKERS[0][0])["sparse GEMM"]
    assert "cuSPARSELt 0.8.1" in path
    assert "masked dense" in path


def test_on_a_gpu_without_the_engine_the_reason_is_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = Availability(False, "nvmath-python cannot be imported")
    found = paths_on_cuda(monkeypatch, verdict, PackedFormat("kernel", SM90_16BIT, "no engine"))
    assert found["sparse GEMM"] == ("masked dense", "nvmath-python cannot be imported")


@pytest.mark.parametrize(("loaded", "path"), [(True, "native (C++)"), (False, "Python")])
def test_on_a_gpu_who_starts_the_launches_is_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, loaded: bool, path: str
) -> None:
    monkeypatch.setattr(native, "status", lambda: native.Status(loaded, "as it is"))
    found = paths_on_cuda(monkeypatch, Availability(True, "cuSPARSELt 0.8.1", 801), PACKERS[0][0])
    assert found["launches"] == (path, "as it is")


def test_a_probe_that_fails_is_told_and_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    found = paths_on_cuda(monkeypatch, Availability(False, "broken"), RuntimeError("illegal memory access"))
    for name in ("weight mask", "activation mask", "packing"):
        assert found[name] == ("unknown", "RuntimeError: illegal memory access")
