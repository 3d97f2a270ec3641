"""What the engine and the autotuner ask of CUDA, in one small object, so that both run on the CPU in tests.

The calls go to torch's C layer: the public wrappers check for lazy initialisation on every call, and callers always
hold a CUDA tensor, so CUDA is already initialised.
"""

import subprocess
from collections.abc import Callable
from contextlib import suppress

import torch

from semisparse.versions import driver_version, package_version

_SPIN_CYCLES_PER_LAUNCH = 100_000
"""GPU cycles to spin per launch queued behind the spin: about 60 us, more than any here costs the host."""


class CudaRuntime:
    """Devices, streams, capture state and timing of CUDA. Devices are indices, streams raw handles."""

    kind = "cuda"

    def current_device(self) -> int:
        """Index of the calling thread's current device."""
        return torch._C._cuda_getDevice()

    def exchange_device(self, index: int) -> int:
        """Make a device current; returns the index of the one that was."""
        return torch._C._cuda_exchangeDevice(index)

    def stream(self, index: int) -> int:
        """Handle of the calling thread's current stream on a device."""
        return torch._C._cuda_getCurrentRawStream(index)

    def device(self, index: int) -> torch.device:
        """The device of an index."""
        return torch.device(self.kind, index)

    def capturing(self) -> bool:
        """True while the current stream records a CUDA graph."""
        return torch.cuda.is_current_stream_capturing()

    def index_of(self, device: torch.device | str | int | None) -> int | None:
        """Device index, None where the device is not a CUDA device; a device without index is the current one."""
        if isinstance(device, int):
            return device
        device = torch.device(self.kind if device is None else device)
        if device.type != self.kind:
            return None
        return self.current_device() if device.index is None else device.index

    def obstacle(self, index: int, capability: tuple[int, int]) -> str | None:
        """Why a device cannot be used at all (no CUDA, no such device, too old), or None. Starts CUDA on it."""
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
        if index >= torch.cuda.device_count():
            return f"device {index} does not exist: torch sees {torch.cuda.device_count()} CUDA devices"
        found = torch.cuda.get_device_capability(index)
        if found < capability:
            return "the GPU has compute capability {}.{}, 2:4 products need {}.{}".format(*found, *capability)
        torch.empty(1, device=self.device(index))
        return None

    def identity(self, index: int) -> dict[str, str | int]:
        """What a measured choice depends on in addition to the engine: GPU, driver and library versions."""
        properties = torch.cuda.get_device_properties(index)
        return {
            "gpu": properties.name,
            "sm_count": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "driver": _driver(),
            "cuda": str(torch.version.cuda),
            "torch": str(torch.__version__),
            "triton": package_version("triton") or "none",
        }

    def wait(self, index: int) -> None:
        """Wait for the work queued so far on the current stream of a device."""
        torch.cuda.current_stream(index).synchronize()

    def time(self, index: int, call: Callable[[], object], repeats: int, launches: int = 1) -> float:
        """Device time per call of a back-to-back batch on the current stream. Waits for this stream only.

        A spin kernel in front keeps the device busy until the batch is queued, so the host's launch cost is not in the
        result.

        Args:
            index: Of the device.
            call: Launches the work.
            repeats: Calls in the batch.
            launches: Kernels of a call, at most.

        Returns:
            Microseconds.
        """
        stream = torch.cuda.current_stream(index)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(repeats * launches * _SPIN_CYCLES_PER_LAUNCH)
        begin.record(stream)
        for _ in range(repeats):
            call()
        end.record(stream)
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3 / repeats


def _driver() -> str:
    with suppress(OSError, subprocess.SubprocessError):
        return driver_version() or "unknown"
    return "unknown"
