"""Made-up runs of time to loss, whose curves are straight lines."""

import json
from pathlib import Path

ARMS = {
    "bf16": "dense bf16",
    "float8": "torchao float8",
    "fp8-24": "fp8 + 2:4 for 70% of the steps, then fp8",
    "bf16-24": "2:4 for 70% of the steps, then dense",
    "fp8-24-mvue": "fp8 + 2:4 + mvue for 70% of the steps, then fp8",
}
"""Title by slug, in the order of the study."""
PACE = {"bf16": 2.0, "float8": 1.5, "fp8-24": 1.0, "bf16-24": 1.6, "fp8-24-mvue": 0.8}
"""Seconds per step."""
STEPS = 10
LOST = {"test": None, "validation": None, "scores": [[1, 1.0, None, None]], "tokens_per_second": None}
"""What changes in a run that diverged."""
SETTINGS = {
    "model": {"vocabulary": 64, "context": 16, "width": 32, "hidden": 48, "depth": 1, "heads": 2},
    "train": {"lr": 2e-4, "warmup_fraction": 0.03, "hold_fraction": 0.67},
    "steps": STEPS, "sparse_fraction": 0.7, "refresh_every": 1, "dense_start": 0.0, "text": "0123456789abcdef",
    "score_windows": 8, "final_windows": 32,
}  # fmt: skip


def made(
    arm: str, seed: int, budget: str = "tokens", steps: int = STEPS, extra: float = 0.0, **changes: object
) -> dict:
    """A run that falls by 0.1 bits per byte and step from 3, a hundredth less for each seed.

    Args:
        arm: Of ARMS.
        seed: Any.
        budget: As the study's.
        steps: Scored ones.
        extra: Bits per byte that are added everywhere.
        changes: Of the document.
    """
    order = list(ARMS).index(arm)
    bits = [3 + extra - 0.1 * step - 0.01 * seed * (1 + order) for step in range(1, steps + 1)]
    score = {"nats_per_token": 2 * bits[-1], "bits_per_byte": bits[-1], "bytes": 1}
    kinds = ("sparse", "dense") if "24" in arm else ("dense",)
    return {
        "kind": "time-to-loss", "experiment": "toy", "title": "Toy", "arm": arm, "arm_title": ARMS[arm],
        "order": order, "seed": seed, "budget": budget, "steps": steps, "settings": SETTINGS,
        "tokens_per_step": 100, "multiplications": {"block_linears": 3, "head": 1}, "curve": [[1, 1.0, 2.0]],
        "scores": [[step, step * PACE[arm], 2 * bits[step - 1], bits[step - 1]] for step in range(1, steps + 1)],
        "phases": [{"kind": kind, "seconds_per_step": PACE[arm]} for kind in kinds],
        "seconds": steps * PACE[arm], "finished": True, "peak_memory": {"bytes": 2**30, "kind": "made"},
        "environment": {"torch": "1", "triton": "2", "cuSPARSELt": "3"}, "gpu": "none", "commit": None,
        "start_seconds": [1.0], "score_seconds": 2.0, "final_seconds": 3.0, "wall_seconds": 4.0, "torchao": None,
        "validation": score, "test": score, "tokens_per_second": 100 / PACE[arm], **changes,
    }  # fmt: skip


def complete(seeds: tuple[int, ...] = (0, 1, 2)) -> list[dict]:
    """All arms, with equal tokens and with equal seconds."""
    runs = [made(arm, seed, extra=0.001 * place) for place, arm in enumerate(ARMS) for seed in seeds]
    longest = STEPS * PACE["bf16"]
    later = list(ARMS)[1:]
    return runs + [made(arm, seed, "seconds", int(longest / PACE[arm])) for arm in later for seed in seeds]


def write(folder: Path, *runs: dict) -> Path:
    """Runs as result files in folder."""
    folder.mkdir(exist_ok=True)
    for run in runs:
        name = f"toy.{run['arm']}.{run['budget']}.seed{run['seed']}.json"
        (folder / name).write_text(json.dumps(run))
    return folder
