"""What a process's first sparse product changes: how fast dense products are then at the power limit, and idle power.

Each row is a process of its own. It runs dense products until the GPU is warm, waits, and multiplies dense for some
seconds; then it runs one kernel of another kind, waits, and multiplies dense again. In two rows another process runs
that kernel: it is still there, idle, while dense is multiplied again, or has ended by then. Idle, the GPU runs at its
full clock here, because a context is open: what it draws then is what its parts draw that are switched on. Rows without
a kernel stand between the others, so that what only time changes is seen, too.

    python -m benchmarks.power KERNEL    one process; prints its two measurements as JSON
    python -m benchmarks.power           the other process: a 2:4 product, then nothing until standard input ends
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from benchmarks.store import ROOT
from benchmarks.table import Table
from benchmarks.tables import size
from benchmarks.timing import device, started, synchronize

Result = dict[str, Any]

MKN, TOY_MKN = (16384, 4096, 11008), (32, 64, 64)
"""Of the dense products: forward, and both of the backward, bf16."""

WARM_SECONDS, IDLE_SECONDS, DENSE_SECONDS = 8.0, 3.0, 8.0
CALLS = 60
"""Of the dense products in a block, which lasts longer than a reading of the GPU."""

SAMPLES = 8
"""Readings of the idle GPU, behind each other."""

NOTHING = "nothing"
FP8, INSTRUCTION, SPARSE = "a dense fp8 product", "one sparse MMA instruction", "a 2:4 product"
BESIDE, ENDED = "a 2:4 product in a process that is still there", "a 2:4 product in a process that has ended"
ORDER = (NOTHING, INSTRUCTION, BESIDE, NOTHING, SPARSE, ENDED, NOTHING, FP8)

_COMMAND = (sys.executable, "-m", "benchmarks.power")

# mma.sp with zeros: valid metadata keeps values 0 and 1 of each four.
_MMA_SP = """{
.reg .f32 sum<4>;
.reg .b32 kept;
mov.b32 kept, 0x44444444;
mov.f32 sum0, 0f00000000; mov.f32 sum1, sum0; mov.f32 sum2, sum0; mov.f32 sum3, sum0;
mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32
{sum0, sum1, sum2, sum3}, {$1, $1, $1, $1}, {$1, $1, $1, $1}, {sum0, sum1, sum2, sum3}, kept, 0x0;
mov.b32 $0, sum0;
}"""

NOTE = (
    "Each row is a process. *idle*: watts of the GPU at rest at its full clock, in brackets its temperature; *dense*: "
    "milliseconds of three products of a layer ({size}), sustained, in brackets the clock that the power limit leaves. "
    "Both before the kernel of the row and after it, in the same process."
)


def benchmark(toy: bool = False) -> Result:
    """Run the processes one after the other; this one uses no GPU. At toy size all is in this one."""
    made = (lambda kernel: measured(kernel, toy)) if toy else _process
    return {
        "mkn": list(TOY_MKN if toy else MKN),
        "processes": [{"kernel": kernel, **made(kernel)} for kernel in ORDER],
    }


def _process(kernel: str) -> Result:
    command = [*_COMMAND, kernel]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    print(f"{kernel}: {done.stdout.strip()}", file=sys.stderr, flush=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measured(kernel: str, toy: bool) -> Result:
    """Before and after one kernel, in this process.

    Args:
        kernel: A key of KERNELS.
        toy: At toy size, on any device; the figures mean nothing.
    """
    dense = _dense(*(TOY_MKN if toy else MKN))
    _sustained(dense, 0.0 if toy else WARM_SECONDS)
    before = _stage(dense, toy)
    KERNELS[kernel]()
    synchronize()
    return {"before": before, "after": _stage(dense, toy)}


def _stage(dense: Callable[[], object], toy: bool) -> Result:
    idle = _idle(0.0 if toy else IDLE_SECONDS)
    ms, drawn = _sustained(dense, 0.0 if toy else DENSE_SECONDS)
    return {"idle": idle, "dense_ms": ms, "dense": drawn}


def _dense(tokens: int, in_features: int, out_features: int) -> Callable[[], object]:
    factory: dict[str, Any] = {"device": device(), "dtype": torch.bfloat16}
    torch.manual_seed(0)
    x, dy = torch.randn(tokens, in_features, **factory), torch.randn(tokens, out_features, **factory)
    weight = torch.randn(out_features, in_features, **factory)

    def call() -> None:
        torch.mm(x, weight.t())
        torch.mm(dy, weight)
        torch.mm(dy.t(), x)

    return call


def _sustained(dense: Callable[[], object], seconds: float) -> tuple[float, Result]:
    """Milliseconds of a call and readings of the GPU, medians over the second half of the time."""
    times: list[float] = []
    readings: list[Result] = []
    count, end = CALLS if device() == "cuda" else 1, time.monotonic() + seconds
    while len(times) < 2 or time.monotonic() < end:
        took = started(dense, count)
        readings.append(_reading())  # while the GPU is at work
        times.append(took() / count)
    half = len(times) // 2
    return statistics.median(times[half:]), _middle(readings[half:])


def _idle(seconds: float) -> Result:
    synchronize()
    time.sleep(seconds)
    return _middle([_reading() for _ in range(SAMPLES)])


def _middle(readings: list[Result]) -> Result:
    return {name: statistics.median(one[name] for one in readings) for name in readings[0]}


def _reading() -> Result:
    """Watts, degrees Celsius and MHz of the GPU, by nvidia-smi; zeros without one."""
    names = ("watts", "celsius", "mhz")
    if device() != "cuda":
        return dict.fromkeys(names, 0.0)
    which = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    fields = "power.draw.instant,temperature.gpu,clocks.sm"
    command = ["nvidia-smi", "-i", which, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(zip(names, map(float, said.split(",")), strict=True))


@triton.jit
def _instruction_kernel(out, asm: tl.constexpr):  # type: ignore[no-untyped-def]
    lane = tl.arange(0, 32)
    zeros = tl.zeros((32,), tl.int32)
    tl.store(out + lane, tl.inline_asm_elementwise(asm, "=r,r", [zeros], dtype=tl.int32, is_pure=False, pack=1))


def _instruction() -> None:
    """One warp runs mma.sp once."""
    _instruction_kernel[(1,)](torch.empty(32, device="cuda", dtype=torch.int32), _MMA_SP, num_warps=1)


def _sparse_product() -> None:
    from semisparse import SemiSparseLinear, check

    layer = SemiSparseLinear(256, 256, device=device(), dtype=torch.bfloat16)
    found = check(layer, torch.randn(256, 256, device=device(), dtype=torch.bfloat16))
    if device() == "cuda" and "cuSPARSELt" not in str(found):
        raise RuntimeError(f"no sparse product ran: {found}")


def _in_another_process(stays: bool) -> None:
    """Run a 2:4 product in a process of its own, which stays until this one ends, or has ended when this returns."""
    other = subprocess.Popen(_COMMAND, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    ran = other.stdout.readline()
    if ran and stays:
        _BESIDE.append(other)  # its standard input ends with this process
        return
    other.communicate()
    if not ran or other.returncode:
        raise RuntimeError(
            f"the other process ended with {other.returncode} {'after' if ran else 'before'} its product"
        )


def _other_process() -> None:
    _sparse_product()
    synchronize()
    print("ran", flush=True)
    sys.stdin.read()


def _fp8_product() -> None:
    codes, one = torch.randn(256, 256, device="cuda").to(torch.float8_e4m3fn), torch.ones((), device="cuda")
    torch._scaled_mm(codes, codes.t(), one, one, out_dtype=torch.bfloat16)


def _on_gpu(run: Callable[[], None]) -> Callable[[], None]:
    return lambda: run() if device() == "cuda" else None


KERNELS: dict[str, Callable[[], None]] = {
    NOTHING: lambda: None,
    FP8: _on_gpu(_fp8_product),
    INSTRUCTION: _on_gpu(_instruction),
    SPARSE: _sparse_product,
    BESIDE: _on_gpu(lambda: _in_another_process(stays=True)),
    ENDED: _on_gpu(lambda: _in_another_process(stays=False)),
}
"""What a process runs between its two measurements."""

_BESIDE: list["subprocess.Popen[str]"] = []


def changes(result: Result, kernel: str) -> tuple[float, float]:
    """Watts that the idle GPU draws more, and the share by which dense products are slower, after that kernel.

    Means over its processes.
    """
    found = [one for one in result["processes"] if one["kernel"] == kernel]
    watts = [one["after"]["idle"]["watts"] - one["before"]["idle"]["watts"] for one in found]
    return statistics.fmean(watts), statistics.fmean(map(_slower, found))


def _slower(process: Result) -> float:
    """The share by which dense products took longer after the process's kernel."""
    return float(process["after"]["dense_ms"] / process["before"]["dense_ms"] - 1)


def told(result: Result) -> str:
    """The changes as a sentence."""
    parts, ran = [], {one["kernel"] for one in result["processes"]}
    for kernel in (one for one in (SPARSE, INSTRUCTION, BESIDE, ENDED, FP8, NOTHING) if one in ran):
        watts, slower = changes(result, kernel)
        parts.append(f"after {kernel} {100 * slower:+.1f} % ({round(watts) + 0:+d} W)")
    return f"Time of dense products, and power of the idle GPU: {', '.join(parts)}."


def text(results: list[Result]) -> str:
    """For docs/speed.md."""
    return "\n\n".join([*map(told, results), table(results).markdown()])


def table(results: list[Result]) -> Table:
    """A line per process."""
    rows = []
    for result in results:
        for one in result["processes"]:
            stages = one["before"], one["after"]
            idle = [f"{stage['idle']['watts']:.0f} ({stage['idle']['celsius']:.0f})" for stage in stages]
            dense = [f"{stage['dense_ms']:.3f} ({stage['dense']['mhz']:.0f})" for stage in stages]
            rows.append((one["kernel"], *idle, *dense, f"{_slower(one):+.1%}"))
    columns = ("kernel", "idle W (C), before", "after", "dense ms (MHz), before", "after", "slower")
    sizes = {size(result["mkn"]) for result in results}
    return Table(columns, tuple(rows), (NOTE.format(size=" and ".join(sorted(sizes))),))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measured(sys.argv[1], toy=False)))
    else:
        _other_process()
