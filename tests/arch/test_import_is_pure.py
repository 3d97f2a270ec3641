"""Importing semisparse only defines names. Seen in processes of their own, because this one has imported everything."""

import os
import subprocess

import pytest

from tests import fresh
from tests.arch.source import ROOT

PROBE = """
import os, sys
import torch, torch.nn.utils.parametrize, torch.utils.data, torch.optim, torch.distributed

calls = []
class Watched(type(os.environ)):
    def __getitem__(self, key):
        calls.append(f"environ {key}")
        return super().__getitem__(key)
environ = os.environ
os.environ.__class__ = Watched

for name in ("init", "_lazy_init", "is_available", "device_count", "current_device", "get_device_capability",
             "get_device_properties", "get_device_name"):
    def watched(*args, _name=name, _real=getattr(torch.cuda, name), **kwargs):
        calls.append(f"cuda {_name}")
        return _real(*args, **kwargs)
    setattr(torch.cuda, name, watched)

OWNERS = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "torch" and module}
OWNERS |= {"Tensor": torch.Tensor, "Module": torch.nn.Module, "Linear": torch.nn.Linear,
           "Optimizer": torch.optim.Optimizer, "environ": dict(os.environ)}
def snapshot():
    return {owner: dict(value if isinstance(value, dict) else vars(value)) for owner, value in OWNERS.items()}
before, modules = snapshot(), set(sys.modules)
state = (torch.get_num_threads(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(),
         torch.is_grad_enabled(), torch.initial_seed(), len(sys.meta_path), len(sys.path_hooks))

import semisparse
# EXTRA

calls = [call for call in calls if call.startswith("cuda") or "SEMISPARSE" in call]
# Whether ops on CUDA are C++ is decided once, when they are defined.
calls = [call for call in calls if call != "environ SEMISPARSE_NATIVE"]
assert not calls, calls
for owner, names in snapshot().items():
    for name, value in before[owner].items():
        assert name in names and names[name] is value, f"{owner}.{name} was changed"
assert state == (torch.get_num_threads(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(),
                 torch.is_grad_enabled(), torch.initial_seed(), len(sys.meta_path), len(sys.path_hooks))
assert not torch.cuda.is_initialized()
guests = {name.split(".")[0] for name in set(sys.modules) - modules} & {
    "triton", "typer", "click", "rich", "matplotlib", "sklearn", "nvmath", "safetensors", "hypothesis", "pytest",
    "transformers", "accelerate", "lightning", "torchtitan", "timm"}
assert not guests, guests
print("pure")
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SEMISPARSE")}
    return fresh.run("-c", code, env=environment)


def probe(extra: str) -> str:
    return PROBE.replace("# EXTRA", extra)


@pytest.mark.parametrize(
    "extra", ["", "import semisparse.testing, semisparse.reference, semisparse.ops, semisparse.integrations.run"]
)
def test_importing_defines_names_and_nothing_else(extra: str) -> None:
    result = run(probe(extra))
    assert result.stdout.strip() == "pure", result.stderr


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("import triton", "triton"),
        ("torch.cuda.is_available()", "cuda is_available"),
        ("os.environ.get('SEMISPARSE_TUNE')", "environ SEMISPARSE_TUNE"),
        ("os.getenv('SEMISPARSE_TUNE')", "environ SEMISPARSE_TUNE"),
        ("torch.nn.Linear.forward = None", "Linear.forward was changed"),
        ("torch.nn.functional.linear = None", "torch.nn.functional.linear was changed"),
        ("torch.set_default_dtype(torch.float64)", "AssertionError"),
    ],
)
def test_the_probe_notices_what_it_should(extra: str, message: str) -> None:
    result = run(probe(extra))
    assert result.returncode != 0
    assert message in result.stderr


def test_asking_for_cuda_as_conftest_does_imports_no_triton() -> None:
    result = run("import sys, torch; torch.cuda.is_available(); print('triton' in sys.modules)")
    assert result.stdout.strip() == "False", result.stderr


def test_gpu_tests_fail_rather_than_skip_when_a_gpu_is_required(tmp_path) -> None:
    code = "import pytest\n@pytest.mark.gpu\ndef test_needs_a_gpu():\n    assert False, 'it ran'\n"
    (tmp_path / "test_gpu_mark.py").write_text(code)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: needs a GPU\n")
    command = ["-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-p", "tests.conftest",
               "-c", tmp_path / "pytest.ini", tmp_path]  # fmt: skip
    for required, outcome in (("", "1 skipped"), ("1", "1 failed")):
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "SEMISPARSE_REQUIRE_GPU": required}
        result = fresh.run(*command, env=environment, cwd=ROOT)
        assert outcome in result.stdout, result.stdout + result.stderr
        assert ("needs a CUDA device" in result.stdout) == (not required)
