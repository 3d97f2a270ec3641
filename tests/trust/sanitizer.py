"""B4: compute-sanitizer over every kernel and the native layer, and guard zones around every buffer."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from semisparse import native
from semisparse.gemm.autotune.autotuner import VARIABLE
from tests.trust import apart
from tests.trust.cases import CASES, cases, fill, make_layer, normal, step
from tests.trust.guards import Guards, guarded
from tests.trust.launches import BY_PYTHON, EIGHT, LAYERS, SIXTEEN, Kernels, counted, entry_points
from tests.trust.machine import Machine, differing
from tests.trust.outcome import NotHere, Part, Row

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
RUNS = (*((tool, "kernels") for tool in TOOLS), ("memcheck", "layers"), ("initcheck", BY_PYTHON))
"""All tools over the Triton kernels; over layers, which run those of cuSPARSELt and cuBLAS too, what sees addresses.

launches.filled says why Python starts all products under initcheck. What C++ starts is seen by memcheck alone."""

# Of NVIDIA's manual. The callers that a report names are PyTorch's, and are left out. Python starts no other program
# that uses the GPU. It takes longer to import PyTorch than the tool waits for a program by default.
OPTIONS = (
    "--print-limit", "10000", "--target-processes", "application-only", "--launch-timeout", "120",
    "--show-backtrace", "device",
)  # fmt: skip
# PyTorch asks for attributes that a driver does not have. A wrong access ends its kernel alone; by default no other one
# could be launched after it.
MORE = {"memcheck": ("--report-api-errors", "no", "--destroy-on-device-error", "kernel")}

PATIENCE = 150.0
"""Seconds for one run of a tool."""

AT_ONCE = 3.0
"""Seconds that Python needs at least to import PyTorch under a tool."""

MOST_PROGRAMS = 12
"""Programs that a tool gets for one mode: each goes on behind the case that ended the one before."""

SUMMARY = re.compile(r"^=+ (?:ERROR SUMMARY: (\d+) errors?\s*$|RACECHECK SUMMARY: (\d+) hazard)", re.MULTILINE)
UNPRINTED = re.compile(r"^=+ ERROR SUMMARY: (\d+) errors? \w+ not printed", re.MULTILINE)
_BANNERS = ("COMPUTE-SANITIZER", "ERROR SUMMARY", "RACECHECK SUMMARY", "LEAK SUMMARY", "Target application")


@dataclass(frozen=True)
class Reports:
    """What a tool said.

    Attributes:
        count: Of its summaries; None where there is none.
        texts: The first lines of each report, joined.
        unprinted: Reports that it counted and did not print, so that their kernels are not known.
    """

    count: int | None
    texts: list[str]
    unprinted: int = 0


@dataclass
class Launched:
    """What the programs of one tool and mode launched.

    Attributes:
        launches: By Python, of each kernel.
        native: Products that C++ started.
        of: Cases of the mode.
        done: Cases that came to their end.
        stopped: Cases that ended a program.
        products: Those with results that were filled before; None where none were.
        unwritten: Entries of these results that the product did not write.
    """

    launches: Counter[str] = field(default_factory=Counter)
    native: int = 0
    of: int = 1
    done: int = 0
    stopped: list[str] = field(default_factory=list)
    products: int | None = None
    unwritten: int = 0

    def add(self, result: dict[str, Any], first: int) -> None:
        """Add what launches.run wrote in a program that began with the case first."""
        self.launches.update(result["launches"])
        self.native, self.of = self.native + result["native"], result["of"]
        self.done, self.unwritten = self.done + result["reached"] - first, self.unwritten + result["unwritten"]
        if result["products"] is not None:
            self.products = (self.products or 0) + result["products"]
        if not _ended(result):
            self.stopped.append(result["case"])

    @property
    def size(self) -> str:
        """In words."""
        by_python = f"{len(self.launches)} kernels, {sum(self.launches.values())} launches by Python"
        if self.products is None:
            return f"{by_python}, {self.native} products by C++"
        return f"{by_python}, {self.products} products by Python, none by C++"


def _ended(result: dict[str, Any]) -> bool:
    return bool(result["reached"] == result["of"])


def read(output: str) -> Reports:
    """The reports in a tool's output.

    Args:
        output: Of compute-sanitizer, with what the program printed in between.
    """
    found = [int(one or other) for one, other in SUMMARY.findall(output)]
    texts: list[list[str]] = []
    for line in output.splitlines():
        if not line.startswith("========= "):
            continue
        text = line[len("========= ") :]
        if text[:1] not in ("", " ") and not text.startswith(_BANNERS):
            texts.append([text.strip()])
        elif texts and text.strip() and len(texts[-1]) < 3:
            texts[-1].append(text.strip())
    unprinted = sum(map(int, UNPRINTED.findall(output)))
    return Reports(sum(found) if found else None, [" | ".join(one) for one in texts], unprinted)


def find_tool() -> str:
    """The path of compute-sanitizer: on PATH, or beside nvcc.

    Raises:
        NotHere: It is in neither place.
    """
    folders = [Path(found).resolve().parent for found in [shutil.which("nvcc")] if found]
    folders += [Path(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    folders.append(Path("/usr/local/cuda/bin"))
    places = [os.environ.get("PATH", ""), *(str(one) for one in folders)]
    places += [str(one.parent / "compute-sanitizer") for one in folders]
    tool = shutil.which("compute-sanitizer", path=os.pathsep.join(places))
    if tool is None:
        raise NotHere("compute-sanitizer is neither on PATH nor beside nvcc")
    return tool


def run(machine: Machine, part: Part, folder: Path, runs: Sequence[tuple[str, str]] = RUNS) -> None:
    """Guard zones first, then the tools.

    Args:
        machine: Where.
        part: Gets the rows.
        folder: Gets the outputs of the tools.
        runs: Tool and what it runs.

    Raises:
        NotHere: There is no GPU, or no compute-sanitizer.
    """
    with part.attempt("guard zones"):
        guard(machine, part)
    if not machine.cuda:
        raise NotHere("compute-sanitizer needs a GPU")
    tool, folder = find_tool(), folder / "sanitizer"
    folder.mkdir(parents=True, exist_ok=True)
    for mode in dict.fromkeys(mode for _, mode in runs):
        # Without a tool first: it compiles the kernels and measures the choices, which then are on disk.
        with part.attempt(f"{mode} without a tool"):
            output, result = program([], mode, folder, "warm", min(PATIENCE, max(part.left(), 1.0)))
            if result is None or not _ended(result):
                raise RuntimeError(f"it did not end: {' | '.join(output.strip().splitlines()[-2:])[-200:]}")
            part.details[f"launched by {mode}"] = result
    for name, mode in runs:
        if part.left() <= 0:
            part.add(Row("B4", f"{name} over {mode}: runs", "no time was left", 0, 1, "at least"))
            continue
        with part.attempt(f"{name} over {mode}"):
            output, result = _with_tool(tool, name, mode, folder, part)
            for row in rows_of(name, mode, output, result):
                part.add(row)


def _with_tool(tool: str, name: str, mode: str, folder: Path, part: Part) -> tuple[str, Launched | None]:
    """What a tool said of all cases of a mode; after one that ends the program another program does the rest."""
    output, result, options = _begin(tool, name, mode, folder, part)
    if result is None:
        return output, None
    outputs, launched = [output], Launched()
    launched.add(result, 0)
    while not _ended(result) and len(outputs) < MOST_PROGRAMS and part.left() > AT_ONCE:
        first = result["reached"] + 1
        if first == result["of"]:
            break
        seconds = min(PATIENCE, part.left())
        output, result = program([tool, "--tool", name, *options], mode, folder, name, seconds, first)
        outputs.append(output)
        if result is None:
            break
        launched.add(result, first)
    return "\n".join(outputs), launched


def _begin(
    tool: str, name: str, mode: str, folder: Path, part: Part
) -> tuple[str, dict[str, Any] | None, tuple[str, ...]]:
    """As program; once more without options where a tool ends at once, as one does that does not know one of them."""
    output, result, begin = "", None, part.left()
    options: tuple[str, ...] = ()
    for options in ((*OPTIONS, *MORE.get(name, ())), ()):
        command = [tool, "--tool", name, *options]
        output, result = program(command, mode, folder, name, min(PATIENCE, max(part.left(), 1.0)))
        if result is not None or begin - part.left() > AT_ONCE:
            break
    return output, result, options


def rows_of(name: str, mode: str, output: str, launched: Launched | None) -> list[Row]:
    """The outcome of one tool.

    Every report of memcheck counts, since kernels of others get their addresses and sizes from here. Of the other tools
    those count that name a kernel of this package, or that were not printed; the rest is reported.

    Args:
        name: Of the tool.
        mode: What it ran.
        output: Of both.
        launched: What was launched; None if not even a first case began.
    """
    reports = read(output)
    last = " | ".join(output.strip().splitlines()[-3:] or ["it printed nothing"])[-300:]
    if launched is None or reports.count is None:
        # After an access that the GPU itself refuses nothing else runs: what was reported before that says why.
        faults = [last, *(text[:300] for text in reports.texts)]
        return [Row("B4", f"{name} over {mode}: runs that ended", "of 1", 0, 1, "at least", faults)]
    ours = re.compile(rf"\b(?:{'|'.join(sorted(entry_points()))})\b")
    others = [] if name == "memcheck" else [text[:300] for text in reports.texts if not ours.search(text)]
    faults = [text[:300] for text in reports.texts if name == "memcheck" or ours.search(text)]
    if reports.unprinted:
        faults.insert(0, f"{reports.unprinted} of them were not printed: their kernels are not known")
    count = max(reports.count, len(reports.texts))  # a program that was ended sums nothing up
    rows = [Row("B4", f"{name} over {mode}: reports", launched.size, count - len(others), faults=faults)]
    if others:
        what = f"{name} over {mode}: reports in kernels of others"
        rows.append(Row("B4", what, launched.size, len(others), None, "reported", others))
    if launched.products is not None:
        what = f"{name} over {mode}: entries of results that products left as they were"
        rows.append(Row("B4", what, launched.size, launched.unwritten))
    if launched.done < launched.of:
        ends = [*(f"{case} ended the program" for case in launched.stopped), last]
        what = f"{name} over {mode}: cases that came to their end"
        rows.append(Row("B4", what, f"of {launched.of}", launched.done, launched.of, "at least", ends))
    return rows


def program(
    command: Sequence[str], mode: str, folder: Path, name: str, seconds: float, first: int = 0
) -> tuple[str, dict[str, Any] | None]:
    """Run launches.py; what it printed, and what it wrote, or None if it did not come to a first case.

    Args:
        command: What runs it.
        mode: What it does.
        folder: For its files.
        name: Of the files.
        seconds: After which it is ended.
        first: Case to begin with.
    """
    stem = f"{name}-{mode}".replace(" ", "-") + (f"-{first}" if first else "")
    result = folder / f"{stem}.json"
    result.unlink(missing_ok=True)
    own = {VARIABLE: "1"}
    if command:
        own["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # each tensor is an allocation of its own, which the tools see
    python = [sys.executable, "-m", "tests.trust.launches", str(result), mode, str(first)]
    with (folder / f"{stem}.txt").open("w+", encoding="utf-8", errors="replace") as file:
        child = subprocess.Popen(
            [*command, *python], cwd=ROOT, env=os.environ | own, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            file.write(f"\nended after {seconds:.0f} s\n")
        finally:  # where this program is told to end, too
            apart.end(child)
        file.seek(0)
        output = file.read()
    return output, _written(result)


def _written(file: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it was not written, or not to its end
        return None
    return found


def guard(
    machine: Machine,
    part: Part,
    sixteen: tuple[tuple[int, int], ...] = SIXTEEN,
    eight: tuple[tuple[int, int], ...] = EIGHT,
    shapes: tuple[tuple[int, int, int], ...] = LAYERS,
) -> None:
    """Kernels and layers with NaN around each buffer: no zone may change, and no result may be another one.

    Args:
        machine: Where.
        part: Gets the rows.
        sixteen: As Kernels.run has it.
        eight: The same.
        shapes: Tokens, in_features and out_features of the layers.
    """
    with part.attempt("kernels between guard zones"):
        with guarded() as guards, counted() as counts:
            Kernels(machine).run(sixteen, eight)
            torn, kernels = guards.torn(), len(guards)
        size = f"{kernels} buffers, {len(counts)} kernels, {sum(counts.values())} launches"
        part.add(Row("B4", "buffers of kernels with a torn guard zone", size, torn))
    torn, buffers, done, wrong = 0, 0, 0, []
    of = len(cases(machine)) * len(shapes)
    native.watch(1)  # Python allocates, not C++
    try:
        with mock.patch.dict(os.environ, {VARIABLE: "0"}):
            for case in cases(machine, tuple(CASES)):
                for shape in shapes:
                    with part.attempt(f"{case.name} at {shape}"):
                        guards, differ = _layer(machine, case.name, shape)
                        torn, buffers, done = torn + guards.torn(), buffers + len(guards), done + 1
                        wrong += [f"{case.name} at {shape}: {differ} results"] if differ else []
    finally:
        native.watch(-1)
    size = f"{buffers} buffers, {done} of {of} kinds and shapes of layers"
    part.add(Row("B4", "kinds and shapes of layers between guard zones", f"of {of}", done, of, "at least"))
    part.add(Row("B4", "buffers of layers with a torn guard zone", size, torn))
    part.add(Row("B4", "layers whose bits depend on what lies around their buffers", size, len(wrong), faults=wrong))


def _layer(machine: Machine, name: str, shape: tuple[int, int, int]) -> tuple[Guards, int]:
    """The guards of one step, and how many of its results differ from those without guards."""
    (m, k, n), case = shape, cases(machine, (name,))[0]
    layer = make_layer(machine, case, k, n)
    fill(machine, layer, integers=False)
    x, dy = (normal(machine, m, size, seed=at, dtype=case.dtype) for at, size in ((5, k), (6, n)))
    expected = step(layer, x, dy)
    with guarded() as guards:
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.data = guards.copy(parameter.data)
        found = step(layer, guards.copy(x), guards.copy(dy))
    return guards, int(differing(found, expected))
