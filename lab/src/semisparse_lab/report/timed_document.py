"""A timed run as a JSON document, from which the card of time to loss is made; and reading such documents."""

from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from semisparse.environment import environment
from semisparse_lab.checks import is_number, shown
from semisparse_lab.errors import DataError
from semisparse_lab.provenance import commit
from semisparse_lab.report.run_document import finite
from semisparse_lab.strict_json import read

KIND = "time-to-loss"
Document = dict[str, Any]


def provenance() -> Document:
    """When it is, and machine, versions and commit of this process."""
    return {"created": datetime.now(UTC).isoformat(timespec="seconds"), **_process()}


@cache
def _process() -> Document:
    """Machine, versions and commit; read once, because a run that is timed asks often."""
    try:
        torchao = version("torchao")
    except PackageNotFoundError:
        torchao = None
    return {
        "commit": commit(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "environment": environment().facts,
        "torchao": torchao,
    }


def timed_document(facts: Document, ended: Document) -> Document:
    """Everything about a run as plain JSON values; curves as lists of numbers, to be short.

    Args:
        facts: What the run was asked to be, and its tokens_per_step.
        ended: As asdict of studies.llama_linux.Ended.
    """
    run = ended["run"]
    points = [[point["step"], round(point["seconds"], 4), round(point["loss"], 5)] for point in run["curve"]]
    scores = [
        [point["step"], round(point["seconds"], 4), point["score"]["nats_per_token"], point["score"]["bits_per_byte"]]
        for point in run["scores"]
    ]
    steps = run["scores"][-1]["step"] if run["scores"] else 0
    speed = facts["tokens_per_step"] * steps / run["seconds"] if run["seconds"] else None
    content = {
        "kind": KIND,
        **facts,
        "curve": points,
        "scores": scores,
        **{name: run[name] for name in ("phases", "seconds", "start_seconds", "score_seconds", "finished")},
        **{name: value for name, value in ended.items() if name != "run"},
        "tokens_per_second": speed,
        **provenance(),
    }
    checked: Document = finite(content)
    return checked


def load_timed(folder: Path) -> list[Document]:
    """The finished runs in a folder; files of other kinds are ignored.

    Args:
        folder: With the result files.

    Raises:
        DataError: A file is damaged, or has other settings than its neighbours.
    """
    found: list[Document] = []
    for path in sorted(folder.glob("*.seed*.json")):
        if (content := read_timed(path)) is None:
            continue
        if found and found[0]["settings"] != content["settings"]:
            raise DataError(f"{path} has other settings than its neighbours; keep them in different folders")
        found.append(content)
    return found


def read_timed(path: Path) -> Document | None:
    """The finished run in a file; None if it is a document of another kind.

    Args:
        path: Of the file.

    Raises:
        DataError: It is damaged.
    """
    try:
        content = read(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a result: {error}") from error
    if not isinstance(content, dict) or content.get("kind") != KIND:
        return None
    _check(path, content)
    return content


def _check(path: Path, content: Document) -> None:
    """Raise DataError unless content has what the cards read."""
    wanted: dict[str, Any] = {
        "experiment": str, "title": str, "arm": str, "arm_title": str, "order": int, "seed": int, "budget": str,
        "steps": int, "settings": dict, "tokens_per_step": int, "multiplications": dict, "curve": list, "scores": list,
        "phases": list, "seconds": float, "finished": bool, "peak_memory": dict, "environment": dict, "gpu": str,
        "start_seconds": list, "wall_seconds": float, "score_seconds": float, "final_seconds": float,
    }  # fmt: skip
    for name, kind in wanted.items():
        if not isinstance(content.get(name), kind):
            raise DataError(f"{path} is not a result: {name!r} cannot be {shown(content.get(name))}; train it again")
    for name, length in (("curve", 3), ("scores", 4)):
        for point in content[name]:
            if not isinstance(point, list) or len(point) != length or not all(v is None or is_number(v) for v in point):
                raise DataError(f"{path} is not a result: {name!r} has the point {shown(point)}; train it again")
    for phase in content["phases"]:
        timed = isinstance(phase, dict) and {"kind", "seconds_per_step"} <= phase.keys()
        if not timed or not (phase["seconds_per_step"] is None or is_number(phase["seconds_per_step"])):
            raise DataError(f"{path} is not a result: 'phases' has {shown(phase)}; train it again")
    for part in ("validation", "test"):
        score = content.get(part)
        if score is not None and not (isinstance(score, dict) and is_number(score.get("bits_per_byte"))):
            raise DataError(f"{path} is not a result: {part!r} cannot be {shown(score)}; train it again")
