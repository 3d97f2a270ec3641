"""Where results come from and go to: one JSON file per run, with all that is needed to judge it."""

import json
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from semisparse.environment import environment
from semisparse_lab.provenance import commit

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CARDS = ROOT / "benchmarks" / "cards"

# NVIDIA's data sheet figures for the H200 and the H100 SXM (bf16 and fp16); always printed together, because comparing
# a dense run with the sparse peak is the most common way to get this wrong.
_HOPPER = {"dense": 989.0, "with 2:4 sparsity": 1979.0}
PEAKS_TFLOPS = {"NVIDIA H200": _HOPPER, "NVIDIA H100 80GB HBM3": _HOPPER}


def provenance() -> dict[str, Any]:
    """Commit, GPU, versions, clocks and both peaks of this run."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "commit": commit() or "unknown",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "gpu": name,
        "environment": asdict(environment()),
        "clocks": _clocks(),
        "peaks_tflops": PEAKS_TFLOPS.get(name, {}),
    }


def save(name: str, payload: dict[str, Any], folder: Path | None = None) -> Path:
    """Write payload with its provenance to folder/name.json and return the path."""
    target = (folder or RESULTS) / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"provenance": provenance(), **payload}, indent=1) + "\n")
    return target


def load(kind: str) -> list[dict[str, Any]]:
    """The stored results of one kind with the name of their file under "file", in a fixed order; none of toy size."""
    found = ({**json.loads(path.read_text()), "file": path.name} for path in sorted(RESULTS.glob("*.json")))
    return [result for result in found if result.get("kind") == kind and not result.get("toy")]


def _clocks() -> str:
    fields = "clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu,clocks_event_reasons.active"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
