"""Outputs of compute-sanitizer are read, programs end, guard zones are looked at, and every kernel is launched."""

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from semisparse.gemm.operands import Operands
from tests.gemm import simulated
from tests.trust import launches, sanitizer
from tests.trust.guards import ZONE, guarded
from tests.trust.launches import Kernels, counted, entry_points
from tests.trust.machine import Machine
from tests.trust.outcome import NotHere, Part

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
WRITE = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 2 bytes
=========     at {kernel}+0x1230
=========     by thread (0,0,0) in block (1,0,0)
=========     Address 0x7f00 is out of bounds
=========
printed by the program
========= Uninitialized __global__ memory read of size 4 bytes
=========     at 0x90 in some_library_kernel(float*)
=========
========= ERROR SUMMARY: 2 errors
"""
RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at prune_pack+0x40 and Read access at prune_pack+0x90 [4 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
WRITTEN = {
    "launches": {"prune_pack": 2}, "native": 0, "products": None, "unwritten": 0, "reached": 1, "of": 1, "case": "",
}  # fmt: skip
LAUNCHED = sanitizer.Launched(Counter(prune_pack=2), done=1)
CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"


def test_reports_are_read_with_their_kernels() -> None:
    found = sanitizer.read(WRITE.format(kernel="unpack"))
    assert found.count == 2 and len(found.texts) == 2
    assert (
        found.texts[0]
        == "Invalid __global__ write of size 2 bytes | at unpack+0x1230 | by thread (0,0,0) in block (1,0,0)"
    )
    assert sanitizer.read(RACE).count == 1
    assert sanitizer.read(CLEAN) == sanitizer.Reports(0, [])


@pytest.mark.parametrize(
    ("tool", "output", "figures"),
    [
        ("memcheck", WRITE.format(kernel="foreign"), [2]),
        ("initcheck", WRITE.format(kernel="unpack"), [1, 1]),
        ("initcheck", WRITE.format(kernel="unpacked"), [0, 2]),
        ("racecheck", RACE, [1]),
        ("synccheck", CLEAN, [0]),
    ],
)
def test_what_counts_depends_on_the_tool(tool: str, output: str, figures: list[int]) -> None:
    rows = sanitizer.rows_of(tool, "kernels", output, LAUNCHED)
    assert [row.figure for row in rows] == figures
    assert rows[0].passed == (figures[0] == 0)


@pytest.mark.parametrize(("output", "result"), [("no summary", LAUNCHED), (CLEAN, None), ("", None)])
def test_a_run_that_did_not_end_does_not_pass(output: str, result: sanitizer.Launched | None) -> None:
    (row,) = sanitizer.rows_of("memcheck", "kernels", output, result)
    assert not row.passed and row.faults


def test_a_program_that_hangs_is_ended_and_the_output_kept(tmp_path: Path) -> None:
    begin = time.monotonic()
    command = ["sh", "-c", "echo begun; sleep 60"]
    output, result = sanitizer.program(command, "kernels", tmp_path, "memcheck", 0.3)
    assert result is None and output.startswith("begun") and "ended after" in output
    assert time.monotonic() - begin < 30


def test_what_a_program_launched_comes_back(tmp_path: Path) -> None:
    write = f"import json, sys; json.dump({WRITTEN} | {{'case': sys.argv[6]}}, open(sys.argv[4], 'w'))"
    output, result = sanitizer.program([sys.executable, "-c", write], "by Python", tmp_path, "memcheck", 60, 7)
    assert result == WRITTEN | {"case": "7"} and output == ""
    assert json.loads((tmp_path / "memcheck-by-Python-7.json").read_text()) == result


def test_the_tool_is_found_on_path_or_said_to_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    tool = tmp_path / "cuda" / "bin" / "compute-sanitizer"
    tool.parent.mkdir(parents=True)
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    assert sanitizer.find_tool() == str(tool)
    monkeypatch.setattr(sanitizer.shutil, "which", lambda *given, **options: None)
    with pytest.raises(NotHere, match="neither on PATH nor beside nvcc"):
        sanitizer.find_tool()


@pytest.mark.parametrize("at", [-1, 64])
def test_a_write_next_to_a_buffer_tears_its_zone(at: int) -> None:
    with guarded() as guards:
        first, second = torch.empty(16, 4, dtype=torch.uint8), torch.ones(1).new_empty(2, 3)
        assert first.shape == (16, 4) and second.dtype is torch.float32 and second.isnan().all()
        first.fill_(0)
        assert guards.torn() == 0 and len(guards) == 2
        torch.as_strided(first, (1,), (1,), ZONE + at).fill_(0)
        assert guards.torn() == 1
    assert torch.empty(3).untyped_storage().nbytes() == 12


LAUNCHES = {
    "sixteen": {"tile_codes", "prune_pack", "unpack", "add_bias", "keep", "spread", "sample_pack", "sum_rows"},
    "eight": {"amax", "scale_of", "prune_pack8", "unpack", "quantise", "rescale", "sample_pack8"},
    "many": {"prune_pack_many", "prune_pack8_many", "amax_many", "scale_of"},
}


def test_together_they_are_all_kernels() -> None:
    assert set().union(*LAUNCHES.values()) == entry_points()


@pytest.mark.parametrize("name", LAUNCHES)
def test_every_kernel_is_launched_between_guard_zones(name: str) -> None:
    given = {"sixteen": (16, 16), "eight": (32, 32), "many": (((16, 16),), ((32, 32),))}[name]
    with guarded() as guards, counted() as counts:
        getattr(Kernels(Machine(DEVICE)), name)(*given)
    assert counts.keys() == LAUNCHES[name]
    assert len(guards) > len(counts) and guards.torn() == 0


class Elsewhere(torch.Tensor):
    """Says that it lies on a GPU, and so does what is computed of it."""

    device = property(lambda self: torch.device("cuda", 0))  # type: ignore[assignment]


def test_buffers_on_the_cpu_beside_those_of_a_gpu_are_looked_at_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.stack

    def stack(given):
        if len({one.device for one in given}) > 1:
            raise RuntimeError("Expected all tensors to be on the same device")
        return right(given)

    monkeypatch.setattr(torch, "stack", stack)
    with guarded() as guards:
        here = [torch.empty(16, dtype=torch.uint8) for _ in range(3)]
        assert torch.empty(4, device="meta").is_meta and here[0].new_empty(2, device="meta").is_meta
    assert len(guards) == 3
    guards._memory[0] = guards._memory[0][0].as_subclass(Elsewhere), guards._memory[0][1]
    for one in here[:2]:
        torch.as_strided(one, (1,), (1,), ZONE - 1).fill_(0)
    assert guards.torn() == 2


def test_layers_that_raise_are_not_taken_for_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer.Kernels, "run", lambda *given: None)
    monkeypatch.setattr(sanitizer, "step", lambda *given: [][0])
    tried = Part("sanitizer", 60.0)
    sanitizer.guard(Machine(DEVICE), tried, (), (), ((5, 32, 32),))
    (row,) = (row for row in tried.rows if not row.passed)
    assert row.what == "kinds and shapes of layers between guard zones" and row.figure == 0


def test_layers_do_not_depend_on_what_lies_around_their_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer.Kernels, "run", lambda *given: None)
    tried = Part("sanitizer", 60.0)
    sanitizer.guard(Machine(DEVICE), tried, (), (), ((5, 32, 32),))
    assert all(row.passed for row in tried.rows)
    right = sanitizer.step
    calls = []

    def unstable(layer, x, dy):
        calls.append(1)
        return [one + (len(calls) % 2) for one in right(layer, x, dy)]

    monkeypatch.setattr(sanitizer, "step", unstable)
    tried = Part("sanitizer", 60.0)
    sanitizer.guard(Machine(DEVICE), tried, (), (), ((5, 32, 32),))
    assert not tried.rows[-1].passed


def test_without_a_gpu_the_tools_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer, "guard", lambda *given: None)
    with pytest.raises(NotHere, match="needs a GPU"):
        sanitizer.run(Machine(torch.device("cpu")), Part("sanitizer", 1.0), tmp_path)
    assert not os.listdir(tmp_path)


def with_tools(monkeypatch: pytest.MonkeyPatch, outputs: dict[str, str]) -> tuple[Machine, list[tuple[str, ...]]]:
    """A machine on which the tools print what is given, by name; and the commands that are run."""
    machine, commands = Machine(torch.device("cpu")), []
    machine.cuda = True

    def program(command, mode, folder, name, seconds):
        commands.append((mode, *command))
        return outputs.get(name, CLEAN), WRITTEN

    monkeypatch.setattr(sanitizer, "guard", lambda *given: None)
    monkeypatch.setattr(sanitizer, "find_tool", lambda: "compute-sanitizer")
    monkeypatch.setattr(sanitizer, "program", program)
    return machine, commands


def test_every_tool_runs_after_a_run_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, commands = with_tools(monkeypatch, {"racecheck": RACE})
    tried = Part("sanitizer", 60.0)
    sanitizer.run(machine, tried, tmp_path)
    assert commands[:3] == [("kernels",), ("layers",), ("layers by Python",)]
    assert [(command[3], command[0]) for command in commands[3:]] == list(sanitizer.RUNS)
    assert {command[3] for command in commands[3:]} == set(sanitizer.TOOLS)
    assert {command[3] for command in commands[3:] if "--report-api-errors" in command} == {"memcheck"}
    assert [row.what for row in tried.rows if not row.passed] == ["racecheck over kernels: reports"]
    assert tried.details["launched by kernels"] == WRITTEN


def test_a_tool_that_does_not_know_an_option_runs_without_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def program(command, mode, folder, name, seconds):
        commands.append(command)
        return ("unrecognised option", None) if "--launch-timeout" in command else (CLEAN, WRITTEN)

    monkeypatch.setattr(sanitizer, "program", program)
    tried = Part("sanitizer", 60.0)
    assert sanitizer._with_tool("tool", "memcheck", "kernels", tmp_path, tried) == (CLEAN, LAUNCHED)
    assert commands[1] == ["tool", "--tool", "memcheck"]
    commands.clear()
    monkeypatch.setattr(sanitizer, "AT_ONCE", -1.0)  # it took longer, so that it was no matter of options
    assert sanitizer._with_tool("tool", "memcheck", "kernels", tmp_path, tried) == ("unrecognised option", None)
    assert len(commands) == 1


def test_a_case_that_ends_the_program_hides_no_later_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def program(command, mode, folder, name, seconds, first=0):
        begun.append(first)
        reached = min(at for at in (1, 3, 5) if at >= first)
        found = {"reached": reached, "of": 5, "case": f"case {reached}", "products": 2, "unwritten": 1}
        return WRITE.format(kernel="unpack") if first < 4 else CLEAN, WRITTEN | found

    monkeypatch.setattr(sanitizer, "program", program)
    output, launched = sanitizer._with_tool("tool", "memcheck", "layers", tmp_path, Part("sanitizer", 60.0))
    assert begun == [0, 2, 4] and launched is not None
    assert (launched.done, launched.of, launched.stopped) == (3, 5, ["case 1", "case 3"])
    rows = sanitizer.rows_of("memcheck", "layers", output, launched)
    assert [row.figure for row in rows] == [4, 3, 3] and not any(row.passed for row in rows)
    assert "6 launches by Python, 6 products by Python" in rows[0].size
    assert rows[-1].faults[:2] == ["case 1 ended the program", "case 3 ended the program"]


def test_a_tool_without_time_leaves_cases_out_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer, "program", lambda *given: (CLEAN, WRITTEN | {"of": 5, "case": "second"}))
    output, launched = sanitizer._with_tool("tool", "memcheck", "layers", tmp_path, Part("sanitizer", 0.0))
    rows = sanitizer.rows_of("memcheck", "layers", output, launched)
    assert [row.passed for row in rows] == [True, False] and (rows[1].figure, rows[1].limit) == (1, 5)


def test_reports_that_are_not_printed_count_as_ours() -> None:
    more = WRITE.format(kernel="unpack").replace("SUMMARY: 2 errors", "SUMMARY: 9 errors")
    more += "========= ERROR SUMMARY: 7 errors were not printed. Use --print-limit option to adjust the number\n"
    rows = sanitizer.rows_of("initcheck", "layers", more, LAUNCHED)
    assert [row.figure for row in rows] == [8, 1] and rows[0].faults[0].startswith("7 of them were not printed")


def test_results_are_filled_before_products_and_what_those_leave_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, library, _ = simulated.make_engine()
    watched, seen = [], []
    monkeypatch.setattr(launches.native, "watch", watched.append)
    library.faults[2] = lambda out: out[0, :3].fill_(float("nan"))
    right = type(library).matmul

    def matmul(self, *given):
        seen.append(bool(operands.out.isnan().all()))
        return right(self, *given)

    monkeypatch.setattr(type(library), "matmul", matmul)
    a, b, out, bias = simulated.operands(simulated.FORWARD)
    operands = Operands(engine.compress(a), b, out.zero_(), bias)
    with launches.filled() as left:
        assert watched == [1]
        for algorithm in (1, 2):
            engine.matmul(simulated.FORWARD, algorithm, operands)
    assert seen == [True, True] and [int(one) for one in left] == [0, 3] and watched == [1, -1]
    found = sanitizer.Launched(products=2, unwritten=3, done=1)
    assert [row.figure for row in sanitizer.rows_of("initcheck", launches.BY_PYTHON, CLEAN, found)] == [0, 3]


def test_a_program_says_which_case_it_is_at_and_goes_on_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    todo = [("first", lambda: None), ("second", lambda: [][0]), ("third", lambda: None)]
    monkeypatch.setattr(launches, "works", lambda machine, mode: todo)
    file, machine = tmp_path / "found.json", Machine(torch.device("cpu"))
    with pytest.raises(IndexError):
        launches.run(machine, file, "layers")
    found = sanitizer._written(file)
    assert found is not None and (found["reached"], found["of"], found["case"]) == (1, 3, "second")
    launches.run(machine, file, launches.BY_PYTHON, 2)
    found = sanitizer._written(file)
    assert found is not None and (found["reached"], found["case"], found["products"]) == (3, "", 0)


def test_a_program_that_fails_without_a_tool_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, _ = with_tools(monkeypatch, {})
    right = sanitizer.program
    monkeypatch.setattr(
        sanitizer, "program", lambda command, *given: right(command, *given) if command else ("gone", None)
    )
    tried = Part("sanitizer", 60.0)
    sanitizer.run(machine, tried, tmp_path)
    assert len(tried.rows) == len(sanitizer.RUNS) and all(row.passed for row in tried.rows)
    assert tried.all_rows()[-1].figure == 3 and "gone" in tried.raised[0]


def test_what_a_tool_reported_before_the_gpu_refused_is_kept() -> None:
    (row,) = sanitizer.rows_of("memcheck", "kernels", WRITE.format(kernel="unpack"), None)
    assert not row.passed and any("at unpack+0x1230" in fault for fault in row.faults)


def test_tools_for_which_no_time_is_left_do_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, commands = with_tools(monkeypatch, {})
    tried = Part("sanitizer", 0.0)
    sanitizer.run(machine, tried, tmp_path)
    assert len(commands) == 3 and len(tried.rows) == len(sanitizer.RUNS)
    assert not any(row.passed for row in tried.rows)
