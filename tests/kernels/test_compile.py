"""Every kernel compiles for Ampere, Hopper and Blackwell without such a GPU, and how much of one it takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from semisparse.kernels.arguments import DEFAULT_BLOCK

PROGRAM = Path(__file__).with_name("compiling.py")
# Bytes of stack that a thread may need. On sm100, which nobody has measured yet, some variants spill a few registers.
STACK = {80: 0, 90: 0, 100: 64}


@pytest.mark.parametrize("arch", STACK)
def test_all_variants_compile_and_hardly_spill(arch):
    root = PROGRAM.parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root / "src"), str(root), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, PROGRAM, str(arch)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    usage = json.loads(done.stdout)
    assert len(usage) == 12
    for name, taken in usage.items():
        assert taken["stack"] <= STACK[arch], name
        if name.startswith("pack"):
            assert taken["registers"] <= DEFAULT_BLOCK.registers, name
