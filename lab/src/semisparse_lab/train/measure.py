"""Measuring a run: seconds of each step, peak memory and masks."""

import statistics
import time
from pathlib import Path

import torch
from torch import nn

from semisparse import MaskMetrics, SparseSchedule
from semisparse.errors import NoLayerMatchedError
from semisparse.stopwatch import Stopwatch
from semisparse_lab.train.results import PeakMemory

WARM_UP_STEPS = 10
"""Steps left out at the start of each phase: first allocations, and recompilation where a model is compiled."""

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class StepClock:
    """Seconds of each step between start and stop, by CUDA events on a GPU, so that the host never waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds: list[float] = []
        self._elapsed, self._started = Stopwatch(time.perf_counter), 0.0

    def start(self) -> None:
        """Begin a step."""
        if self._cuda:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record(torch.cuda.current_stream(self._device))
            self._events.append(pair)
        else:
            self._started = self._elapsed()

    def stop(self) -> None:
        """End the step that start began."""
        if self._cuda:
            self._events[-1][1].record(torch.cuda.current_stream(self._device))
        else:
            self._seconds.append(self._elapsed() - self._started)

    def seconds(self) -> list[float]:
        """Seconds of every step so far; waits for a CUDA device."""
        if self._events:
            torch.cuda.synchronize(self._device)
            self._seconds += [begin.elapsed_time(end) / 1000 for begin, end in self._events]
            self._events.clear()
        return self._seconds


def median_after_warm_up(seconds: list[float]) -> float | None:
    """Median without the first WARM_UP_STEPS entries (without the first half, if that is less); None for no entry."""
    return statistics.median(seconds[min(WARM_UP_STEPS, len(seconds) // 2) :]) if seconds else None


class MemoryMeter:
    """Peak memory from its creation on: of the CUDA allocator, or of this process (Linux) on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._resettable = True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            try:
                _CLEAR_REFS.write_text("5")  # resets the resident high-water mark; see proc(5)
            except OSError:
                self._resettable = False

    def peak(self) -> PeakMemory:
        """Highest use since creation. kind says what was counted, or why bytes is None."""
        if self._device.type == "cuda":
            return PeakMemory(torch.cuda.max_memory_allocated(self._device), "allocated on the GPU")
        if not self._resettable:
            return PeakMemory(None, "not available on this system")
        return PeakMemory(_high_water_mark(), "resident memory of the whole process")


def _high_water_mark() -> int | None:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


class MaskCurves:
    """Flip rate and kept magnitude at one step per epoch; at no step where the model has no layer to follow."""

    def __init__(self, model: nn.Module, steps_per_epoch: int) -> None:
        self._metrics: MaskMetrics | None
        try:
            self._metrics = MaskMetrics(model, max(2, steps_per_epoch))
        except NoLayerMatchedError:
            self._metrics = None
        self._applied = 0
        self._taken: int | None = None

    def count(self, schedule: SparseSchedule | None) -> None:
        """After every optimizer step; one that the schedule says was skipped is left out."""
        applied = self._applied + 1 if schedule is None else schedule.applied_steps
        if self._metrics is not None and applied > self._applied:
            self._metrics.update()
        self._applied = applied

    def take(self) -> tuple[float | None, float | None]:
        """Flip rate and kept magnitude (mean over layers) at the step measured since the last call, None for none."""
        if self._metrics is None or self._metrics.step == self._taken:
            return None, None
        self._taken = self._metrics.step
        values = self._metrics.read()
        kept = [value for name, value in values.items() if name.startswith("kept_magnitude/")]
        return values["flip_rate"], statistics.fmean(kept)
