"""What the autotuner is told of GPU, driver and versions: the real function on a simulated torch.cuda."""

import subprocess
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

from semisparse import versions
from semisparse.gemm.autotune.autotuner import Autotuner
from semisparse.gemm.engine import Engine
from semisparse.gemm.runtime import CudaRuntime
from tests.gemm.simulated import FORWARD, SimulatedLibrary, SimulatedRuntime

H100 = SimpleNamespace(name="NVIDIA H100 80GB HBM3", multi_processor_count=132, major=9, minor=0)
REPORT = """NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder@U22)
GCC version:  gcc version 13.3.0 (Ubuntu 13.3.0-6ubuntu2~24.04)
"""
IDENTITY = {
    "gpu": "NVIDIA H100 80GB HBM3",
    "sm_count": 132,
    "capability": "9.0",
    "driver": "580.95.05",
    "cuda": "13.0",
    "torch": "2.11.0+cu130",
    "triton": "3.6.0",
}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """One GPU, index 3, of a machine whose parts a test may exchange."""
    made = SimpleNamespace(gpu=SimpleNamespace(**vars(H100)), report=tmp_path / "version", triton="3.6.0")
    made.report.write_text(REPORT)

    def properties(index):
        assert index == 3
        return made.gpu

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(versions, "_DRIVER_REPORT", made.report)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    monkeypatch.setattr(metadata, "version", lambda name: {"triton": made.triton}[name])
    forget()
    yield made
    forget()


def forget():
    """Let the versions be found out again."""
    versions.driver_version.cache_clear()
    versions.package_version.cache_clear()


def test_the_identity_of_a_gpu_is_all_that_times_depend_on(machine):
    assert CudaRuntime().identity(3) == IDENTITY


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gpu", lambda m, patch: setattr(m.gpu, "name", "NVIDIA H200")),
        ("sm_count", lambda m, patch: setattr(m.gpu, "multi_processor_count", 114)),
        ("capability", lambda m, patch: setattr(m.gpu, "major", 8)),
        ("capability", lambda m, patch: setattr(m.gpu, "minor", 6)),
        ("driver", lambda m, patch: m.report.write_text(REPORT.replace("580.95.05", "580.95.06"))),
        ("cuda", lambda m, patch: patch.setattr(torch.version, "cuda", "12.9")),
        ("torch", lambda m, patch: patch.setattr(torch, "__version__", "2.13.0")),
        ("triton", lambda m, patch: setattr(m, "triton", "3.7.0")),
    ],
)
def test_a_machine_that_differs_in_one_part_has_another_tuning_key(machine, monkeypatch, name, change):
    """Autotuner.key is formed from the real identity, so a part that is left out of either is found here."""

    class Real(SimulatedRuntime):
        identity = CudaRuntime.identity

    def key():
        return Autotuner(Engine(SimulatedLibrary, Real()), None).key(FORWARD, 3)

    before = key()
    assert before.items() >= IDENTITY.items()
    change(machine, monkeypatch)
    forget()
    assert {part for part, value in key().items() if before[part] != value} == {name}


def test_the_key_of_a_problem_has_these_parts_and_no_other(machine):
    runtime_ = SimulatedRuntime()
    key = Autotuner(Engine(SimulatedLibrary, runtime_), None).key(FORWARD, -1)
    assert key == {
        "gpu": "Simulated", "sm_count": 1, "capability": "9.0", "driver": "1.2.3", "cuda": "13.0", "torch": "2.11.0",
        "triton": "3.6.0", "cusparselt": 800, "dtype": "bfloat16", "b_order": "column", "d_order": "column",
        "bias": False, "token_axis": "columns", "rows": 32, "reduction": 48, "columns": 24,
    }  # fmt: skip


def test_a_driver_that_cannot_be_asked_is_unknown(machine, monkeypatch):
    machine.report.unlink()

    def broken(*arguments, **options):
        raise subprocess.TimeoutExpired("nvidia-smi", 20)

    monkeypatch.setattr(versions.shutil, "which", lambda name: name)
    monkeypatch.setattr(versions.subprocess, "run", broken)
    assert CudaRuntime().identity(3) == IDENTITY | {"driver": "unknown"}
