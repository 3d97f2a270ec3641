"""Every kind of file that semisparse and its lab write or read: how it is made, and what reading it gives."""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch

import semisparse
from lab.tests.made_runs import DENSE, MIXED, documents
from lab.tests.toys import MODEL, idx
from semisparse.gemm.autotune.algorithm import Choice
from semisparse.gemm.autotune.store import Store
from semisparse.planning.problems import LinearProblem
from semisparse.planning.store import PlanStore
from semisparse.schedule.reference_curve import reference_curve
from semisparse.selfcheck import files as selfchecks
from semisparse_lab.checkpoint import file as checkpoints
from semisparse_lab.data import tokens
from semisparse_lab.data.idx import read_idx
from semisparse_lab.models.vit import build_model
from semisparse_lab.report.result_files import load_results
from semisparse_lab.report.run_document import write_document
from tests.planning.simulated import SHARES, measurement
from tests.selfcheck.reports import report

Which = Literal[0, 1]
Guard = Literal["checksum", "none"]


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        name: Of it.
        file: Its name in the folder.
        write: Writes one of two contents to a folder, as the library does; None for files of others.
        make: Writes the first content in any way.
        read: What a folder holds, as values that can be compared; None where the library ignores it and goes on.
        guard: Whether a change of a value must be seen.
    """

    name: str
    file: str
    write: Callable[[Path, Which], object] | None
    make: Callable[[Path], object]
    read: Callable[[Path], object]
    guard: Guard


KEY: dict[str, object] = {
    "gpu": "NVIDIA H200", "sm_count": 132, "capability": "9.0", "driver": "580.65.06", "cuda": "13.0",
    "torch": "2.11.0", "triton": "3.6.0", "cusparselt": 800, "dtype": "bfloat16", "b_order": "column",
    "d_order": "column", "bias": True, "token_axis": "columns", "rows": 4096, "reduction": 1024, "columns": 14336,
}  # fmt: skip
CHOICES = (
    Choice(17, 17, 101.5, 150.25, "disk", ((3, "wrong: differs in run 1"),)),
    Choice(None, 12, 99.0, 80.5, "disk", (), "", 16384, 120.5),
)
PROBLEM = LinearProblem(256, 64, 128)
PLAN_KEY = {"problem": PROBLEM.to_record(), "machine": {"GPU": "NVIDIA H200", "torch": "2.11.0"}}
MEASURED = (measurement(PROBLEM), measurement(PROBLEM, {**SHARES, "2:4": 0.625}))


def _save_choice(folder: Path, which: Which) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # that it cannot be stored
        Store(folder).save(KEY, CHOICES[which])


@cache
def _plans() -> tuple[semisparse.Plan, semisparse.Plan]:
    from tests.test_plan import made

    plan = made()
    return plan, replace(plan, remarks=("another one",))


def _write_plan(folder: Path, which: Which) -> None:
    try:
        _plans()[which].save(folder / "plan.json")
    except OSError as error:  # which Plan.save promises
        raise semisparse.errors.PlanError(str(error)) from error


@cache
def _models() -> tuple[Any, Any]:
    return build_model(MODEL, seed=1), build_model(MODEL, seed=2)


def _save_checkpoint(folder: Path, which: Which) -> None:
    checkpoints.save(folder / "model.safetensors", _models()[which], {"which": which})


def _load_checkpoint(folder: Path) -> object:
    found = checkpoints.load(folder / "model.safetensors")
    return found.info, {name: tensor.numpy().tobytes() for name, tensor in found.model.state_dict().items()}


@cache
def _documents() -> list[dict[str, Any]]:
    return documents(DENSE, MIXED)


def _write_result(folder: Path, which: Which) -> None:
    try:
        write_document(folder / "toy.row.seed0.json", _documents()[which])
    except OSError as error:  # which write_document promises; its callers raise ConfigError
        raise semisparse.errors.ConfigError(str(error)) from error


def _results(folder: Path) -> object:
    return [_known(found, _documents()[0]) for found in load_results(folder)]


def _read_manifest(folder: Path) -> object:
    return _known(tokens.read_manifest(folder), _manifest(0))


def _known(found: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Without fields that nothing reads: a checksum under a damaged name is one."""
    return {name: value for name, value in found.items() if name in fields}


def _manifest(which: Which) -> dict[str, Any]:
    count = 40 + which
    files = {f"{part}.npy": {"size": 10 + count, "sha256": "ab" * 32} for part in ("train", "validation", "test")}
    return {"asked": {"share": 0.5, "vocabulary": 8192}, "files": files, "bytes": {"train": 100 + count},
            "token_bytes": [1] * count, "tokens": {"train": count}}  # fmt: skip


def _write_manifest(folder: Path, which: Which) -> None:
    try:
        tokens.write_manifest(folder, _manifest(which))
    except OSError as error:
        raise semisparse.errors.ConfigError(str(error)) from error


def _make_tokens(folder: Path) -> None:
    files = {}
    for number, part in enumerate(("train", "validation", "test")):
        tokens.write_tokens(folder / f"{part}.npy", np.arange(20 + number, dtype=np.uint16))
        files[f"{part}.npy"] = tokens.described(folder / f"{part}.npy")
    tokens.write_manifest(folder, {**_manifest(0), "files": files})


def _load_tokens(folder: Path) -> object:
    found = tokens.load_tokens(folder)
    return [getattr(found, part).tolist() for part in ("train", "validation", "test", "lengths")], found.sha256


def _make_safetensors(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    names = {"first.weight": (8, 16), "second.weight": (16, 8)}
    matrices = {name: torch.randn(shape, generator=generator) for name, shape in names.items()}
    safetensors.torch.save_file({**matrices, "bias": torch.ones(8)}, folder / "m.safetensors")


def _make_index(folder: Path) -> None:
    _make_safetensors(folder)
    names = dict.fromkeys(("first.weight", "second.weight", "bias"), "m.safetensors")
    content = {"metadata": {"total_size": 1056}, "weight_map": names}
    (folder / "m.safetensors.index.json").write_text(json.dumps(content))


def _make_idx(folder: Path) -> None:
    (folder / "images").write_bytes(idx((torch.arange(4 * 8 * 8) % 251).to(torch.uint8).view(4, 8, 8)))


def _make_curve(folder: Path) -> None:
    (folder / "curve.json").write_text(json.dumps({str(step): 2.5 / (1 + step) for step in range(0, 100, 5)}))


def _make_csv(folder: Path) -> None:
    lines = ["step,loss", *(f"{step},{2.5 / (1 + step)}" for step in range(0, 100, 5))]
    (folder / "curve.csv").write_text("\n".join(lines))


def _curve(name: str, folder: Path) -> object:
    return reference_curve(folder / name).digest()


def _written(
    name: str, file: str, write: Callable[[Path, Which], object], read: Callable[[Path], object], guard: Guard
) -> Kind:
    return Kind(name, file, write, lambda folder: write(folder, 0), read, guard)


CACHE = Store(Path("."))._path(KEY).name
PLANS = PlanStore(Path("."))._path(PLAN_KEY).name
KINDS = [
    _written("checkpoint", "model.safetensors", _save_checkpoint, _load_checkpoint, "checksum"),
    _written("result of a run", "toy.row.seed0.json", _write_result, _results, "checksum"),
    _written("plan", "plan.json", _write_plan, lambda folder: semisparse.Plan.load(folder / "plan.json"), "checksum"),
    _written("self-check", "bench.json",
             lambda folder, which: selfchecks.write(folder / "bench.json", _reports()[which]),
             lambda folder: selfchecks.read(folder / "bench.json"), "checksum"),
    _written("tuning cache", CACHE, _save_choice, lambda folder: Store(folder).load(KEY), "checksum"),
    _written("times of a plan", PLANS, lambda folder, which: PlanStore(folder).save(PLAN_KEY, MEASURED[which]),
             lambda folder: PlanStore(folder).load(PLAN_KEY), "checksum"),
    _written("manifest of tokens", "manifest.json", _write_manifest, _read_manifest, "checksum"),
    Kind("tokens", "train.npy", None, _make_tokens, _load_tokens, "checksum"),
    Kind("safetensors", "m.safetensors", None, _make_safetensors,
         lambda folder: semisparse.check_checkpoint(folder / "m.safetensors"), "none"),
    Kind("index of shards", "m.safetensors.index.json", None, _make_index,
         lambda folder: semisparse.check_checkpoint(folder / "m.safetensors.index.json"), "none"),
    Kind("idx file", "images", None, _make_idx, lambda folder: read_idx(folder / "images", 3).tolist(), "none"),
    Kind("reference curve, JSON", "curve.json", None, _make_curve, partial(_curve, "curve.json"), "none"),
    Kind("reference curve, CSV", "curve.csv", None, _make_csv, partial(_curve, "curve.csv"), "none"),
]  # fmt: skip


@cache
def _reports() -> tuple[Any, Any]:
    return report(), report(name="NVIDIA H200")


def by_name(name: str) -> Kind:
    """The kind of that name."""
    return next(kind for kind in KINDS if kind.name == name)
