"""Every kernel compiles for Ampere, Hopper and Blackwell without such a GPU, and how much of one it takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("compiling.py")


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_all_variants_compile_and_spill_no_register(arch):
    root = PROGRAM.parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root / "src"), str(root), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, PROGRAM, str(arch)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    usage = json.loads(done.stdout)
    assert len(usage) == 50
    for name, taken in usage.items():
        assert taken["stack"] == 0, name
        assert taken["registers"] <= taken.get("most registers", 255), name
