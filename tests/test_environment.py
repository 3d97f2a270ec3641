"""What `semisparse env` knows: it never fails, and it tells the path of each capability with the reason."""

import subprocess

import pytest
import torch

import semisparse
from semisparse import environment as env
from semisparse.gemm.cusparselt import Availability
from semisparse.gemm.formats import PackedFormat
from semisparse.gemm.layout import SM90_16BIT

NAMES = ["weight mask", "activation mask", "packing", "sparse GEMM"]


def test_the_facts_are_those_of_this_process() -> None:
    found = env.environment()
    assert found.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert found.facts["semisparse"] == semisparse.__version__
    assert found.facts["torch"] == torch.__version__
    assert {"Python", "platform", "GPU", "driver", "CUDA of torch", "triton", "cuSPARSELt", "nvmath-python"} < set(
        found.facts
    )
    assert all(found.facts.values())
    assert found.capabilities == env.capabilities(found.device)


def test_a_package_that_is_not_installed_is_not_found() -> None:
    assert env._package("a-package-that-is-not-there") == "not found"
    assert env._package("torch").startswith(torch.__version__.partition("+")[0])


def test_a_driver_that_cannot_be_asked_is_unknown_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 20)

    monkeypatch.setattr(env.shutil, "which", lambda name: name)
    monkeypatch.setattr(env.subprocess, "run", broken)
    assert env.environment().facts["driver"].startswith("unknown (TimeoutExpired: ")


def test_on_a_cpu_everything_is_the_reference() -> None:
    found = env.capabilities("cpu")
    assert [capability.name for capability in found] == NAMES
    assert {capability.reason for capability in found} == {"CPU"}
    assert found[-1].path == "masked dense (reference)"


def paths_on_cuda(
    monkeypatch: pytest.MonkeyPatch, verdict: Availability, packed: PackedFormat | Exception
) -> dict[str, tuple[str, str]]:
    """Name -> (path, reason) on a GPU whose engine and packed format are as given."""

    def packed_format(index: int, dtype: torch.dtype) -> PackedFormat:
        assert index == 1
        if isinstance(packed, Exception):
            raise packed
        return packed

    monkeypatch.setattr(env, "available", lambda device: verdict)
    monkeypatch.setattr(env, "packed_format", packed_format)
    found = env.capabilities("cuda:1")
    assert [capability.name for capability in found] == NAMES
    return {capability.name: (capability.path, capability.reason) for capability in found}


def test_on_a_gpu_with_the_engine_the_sparse_path_and_its_conditions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = Availability(True, "cuSPARSELt 0.8.1", 801)
    found = paths_on_cuda(monkeypatch, verdict, PackedFormat(SM90_16BIT, "kernel", "layout verified"))
    assert found["weight mask"] == found["activation mask"] == ("Triton kernel", env._WHERE_PACKED)
    assert found["packing"] == ("the same kernel, one pass for both directions", "layout verified")
    assert found["sparse GEMM"] == ("cuSPARSELt 0.8.1 or masked dense, whichever measured faster", env._WHERE_PACKED)


def test_on_a_gpu_whose_format_is_unknown_the_compressor_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = Availability(True, "cuSPARSELt 0.9.0", 900)
    found = paths_on_cuda(monkeypatch, verdict, PackedFormat(SM90_16BIT, "compressor", "no permutation"))
    assert found["weight mask"][0] == "reference"
    assert found["packing"] == ("NVIDIA's compressor, once for each direction", "no permutation")


def test_on_a_gpu_without_the_engine_the_reason_is_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = Availability(False, "nvmath-python cannot be imported")
    found = paths_on_cuda(monkeypatch, verdict, PackedFormat(SM90_16BIT, "kernel", "no engine"))
    assert found["sparse GEMM"] == ("masked dense", "nvmath-python cannot be imported")


def test_a_probe_that_fails_is_told_and_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    found = paths_on_cuda(monkeypatch, Availability(False, "broken"), RuntimeError("illegal memory access"))
    assert found["packing"] == ("unknown", "RuntimeError: illegal memory access")
    assert found["weight mask"][0] == "unknown"
