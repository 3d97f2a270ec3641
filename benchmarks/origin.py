"""What results were measured on, as sentences."""

from collections.abc import Sequence
from typing import Any

Result = dict[str, Any]


def origin(results: Sequence[Result], machines: str = "One") -> str:
    """Machine, versions and peaks, then each commit with the time of its first result.

    Args:
        results: Of which.
        machines: What stands before the GPU's name.
    """
    runs: dict[str, dict[str, str]] = {}
    for source in (result["provenance"] for result in results):
        facts = source["environment"]["facts"]
        named = ", ".join(f"{name} {facts[name]}" for name in ("torch", "triton", "cuSPARSELt", "nvmath-python"))
        peaks = " / ".join(f"{value:g} TFLOP/s {name}" for name, value in source["peaks_tflops"].items())
        machine = f"{machines} {source['gpu']}, {named}" + (f"; peaks by data sheet: {peaks}" if peaks else "")
        runs.setdefault(machine, {}).setdefault(f"commit {source['commit'][:10]}", source["time"])
    return " ".join(
        f"{machine}; {'; '.join(f'{commit}, {time}' for commit, time in times.items())}."
        for machine, times in runs.items()
    )


def short_origin(results: Sequence[Result]) -> str:
    """The GPUs and the versions of torch and cuSPARSELt, for pages that link to the details."""
    machines = {}
    for source in (result["provenance"] for result in results):
        facts = source["environment"]["facts"]
        name = f"one {source['gpu']} (torch {facts['torch']}, cuSPARSELt {facts['cuSPARSELt'].split(',')[0]})"
        machines[name] = None
    return f"Measured on {' and '.join(machines)}."


def gpu(result: Result) -> str:
    """The GPU in one word, such as H100."""
    return result["provenance"]["gpu"].removeprefix("NVIDIA ").split()[0]
