"""The machine that is checked."""

import shutil
import subprocess

import torch

from semisparse.selfcheck.contents import Gpu

_PATIENCE = 10
"""Seconds for nvidia-smi."""


def gpu(device: torch.device) -> Gpu | None:
    """Facts of a GPU; None for the CPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return Gpu(
        properties.name,
        (properties.major, properties.minor),
        properties.total_memory,
        properties.multi_processor_count,
        _power_limit(str(getattr(properties, "uuid", ""))),
    )


def _power_limit(uuid: str) -> float | None:
    """Watts, from nvidia-smi; torch itself does not know it."""
    command = shutil.which("nvidia-smi")
    if command is None or not uuid:
        return None
    identifier = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
    query = [command, f"--id={identifier}", "--query-gpu=power.limit", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_PATIENCE, check=True).stdout
        watts = float(answer)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return watts if 0 < watts < 1e5 else None
