"""Every kernel compiles for Ampere, Hopper and Blackwell without such a GPU, and how much of one it takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import EVERY_CASE

PROGRAM = Path(__file__).with_name("compiling.py")
SPILLS = {(90, "pack aligned transposable bf16 even"): 24, (90, "pack aligned transposable bf16 edges"): 64}
"""Bytes that spill, by architecture and variant. Whether a block without spills is faster is not measured yet."""

FEW = 48
"""Bytes that sample8 may spill, a few registers: how many it is changes with ptxas. Its block limits registers, so that
four programs fit on a multiprocessor."""


OTHERS = pytest.mark.skipif(not EVERY_CASE, reason="takes two minutes; SEMISPARSE_EVERY_CASE=1 compiles for it")


@pytest.mark.parametrize("arch", [90, pytest.param(80, marks=OTHERS), pytest.param(100, marks=OTHERS)])
def test_all_variants_compile_and_none_spills_but_the_known_one(arch):
    root = PROGRAM.parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root / "src"), str(root), environment.get("PYTHONPATH", "")])
    command = [sys.executable, PROGRAM, str(arch), "1" if EVERY_CASE else "4"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    every = json.loads(done.stdout)
    assert len(every) == (135 if arch >= 89 else 129)  # below, dy is not sampled in fp8
    usage = {name: taken for name, taken in every.items() if "registers" in taken}
    assert len(usage) >= len(every) // (1 if EVERY_CASE else 4)
    for name, taken in usage.items():
        assert taken["stack"] == SPILLS.get((arch, name), 0) or (
            name.startswith("sample8") and taken["stack"] <= FEW
        ), name
        assert taken["registers"] <= taken.get("most registers", 255), name
        # Started without Triton: what was not folded away, in order, and two pointers for scratch memory.
        assert taken["launch"]["found"] == taken["launch"]["wanted"], name
        assert taken["parameters"] == len(taken["launch"]["wanted"]), name
        if name.startswith(("amax", "quantise", "rescale")):
            # Matrices in pieces of 16 bytes, in both directions; a program also writes one word: a maximum or a scale.
            assert taken["moves"].get("ld.global.v4.b32", 0) > 0, name
            wide = stores(taken["moves"]).get("st.global.v4.b32", 0)
            assert name.startswith("amax") or wide > 0, name
            assert global_stores(taken["moves"]) - wide <= 1, name
        if name.startswith("sample8"):
            # dy in 16-byte pieces, e4m3 of it and of the sample in 8-byte ones.
            assert taken["moves"].get("ld.global.v2.b64", 0) == (32 if "fp32" in name else 16), name
            assert taken["moves"].get("st.global.v2.b32", 0) == 16, name
            assert taken["moves"].get("st.global.b64", 0) == 8, name
        if name.startswith("pack many") and name.replace("many", "aligned") in usage:
            # As wide as where Triton knows that addresses and rows are aligned.
            alone = usage[name.replace("many", "aligned")]["moves"]
            assert stores(taken["moves"]) == stores(alone), name
            assert widest(taken["moves"]) == widest(alone) > 0, name
            assert not any("shared" in move for move in taken["moves"]), name
        if name.startswith("pack8"):
            # Rows are read in 16-byte pieces; the transpose is written in 8-byte ones, and nothing takes another way.
            table = "many" in name  # whose words are read one by one
            assert table or not any(move.startswith("ld.global.b64") for move in taken["moves"]), name
            assert (taken["moves"].get("st.global.b64", 0) == 8) is ("row" not in name), name
            assert not any("shared" in move for move in taken["moves"]) or "partial" in name, name
        if name.startswith("pack8 many") and name.replace(" many", "").replace("even", "edges") in usage:
            alone = usage[name.replace(" many", "").replace("even", "edges")]["moves"]
            assert stores(taken["moves"]) == stores(alone), name
            assert widest(taken["moves"]) == widest(alone) > 0, name
        if name.startswith("pack transpose") and name.replace(" transpose", "", 1) in usage:
            # The loads of the kernel that writes both, and of its stores only those of the transpose.
            both = usage[name.replace(" transpose", "", 1)]["moves"]
            assert loads(taken["moves"]) == loads(both), name
            assert set(stores(taken["moves"])) == {"st.global.b32"}, name
            assert stores(both).keys() > stores(taken["moves"]).keys(), name


def stores(moves):
    return {move: count for move, count in moves.items() if move.startswith("st.")}


def loads(moves):
    return {move: count for move, count in moves.items() if move.startswith("ld.")}


def global_stores(moves):
    return sum(count for move, count in moves.items() if move.startswith("st.global"))


def widest(moves):
    return moves.get("ld.global.v2.b64", 0)
