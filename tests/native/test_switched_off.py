"""Who implements the CUDA key of the hot ops is decided by whether the library is there and wanted."""

import os

import pytest

from tests import fresh

PROBE = """
import torch
from semisparse import native
from semisparse.ops import register
has = torch._C._dispatch_has_kernel_for_dispatch_key
print(register.CUDA_SIDE, native.status().loaded, has("semisparse::pack", "CUDA"), native.status().reason)
"""


def said(**variables: str) -> str:
    done = fresh.run("-c", PROBE, env=os.environ | variables)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


@pytest.mark.usefixtures("library")
def test_with_the_library_it_is_cpp() -> None:
    assert said(SEMISPARSE_NATIVE="1").startswith("native True True launch.so is loaded")


def test_switched_off_it_is_python() -> None:
    assert said(SEMISPARSE_NATIVE="0") == "python False True switched off by SEMISPARSE_NATIVE=0"
