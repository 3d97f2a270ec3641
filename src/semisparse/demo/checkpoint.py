"""Checkpoints of the demo's models: safetensors, and a JSON file beside it with checksum, sizes and origin.

NAME.safetensors holds the tensors of a plain nn.Linear model; NAME.json says which model they belong to.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from semisparse.demo.files import write_atomically
from semisparse.demo.model import VisionTransformer, ViTConfig
from semisparse.errors import CheckpointError, ConfigError
from semisparse.swap import semi_sparse_layers

FORMAT = "semisparse-vit"
VERSION = 1
SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded checkpoint. model: plain nn.Linear model in eval mode; info: what was saved with it."""

    model: VisionTransformer
    info: dict[str, Any]


def save(path: Path, model: VisionTransformer, info: dict[str, Any] | None = None) -> None:
    """Write model to path (ending in .safetensors) and its description beside it, each file in one atomic move.

    info: anything JSON can hold, kept as it is. Raises CheckpointError when the model still has semi-sparse layers,
    when path has another ending or cannot be written.
    """
    sidecar = _sidecar(path)
    if semi_sparse_layers(model):
        raise CheckpointError(
            f"model still has semi-sparse layers, so {path} would not say which weight it is: densify"
        )
    safetensors = _safetensors()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    content = safetensors.torch.save(tensors)
    description = {
        "format": FORMAT,
        "version": VERSION,
        "sha256": hashlib.sha256(content).hexdigest(),
        "model": asdict(model.config),
        "info": info or {},
    }
    try:
        write_atomically(path, content)
        write_atomically(sidecar, json.dumps(description, indent=2).encode() + b"\n")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error


def load(path: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint into a plain nn.Linear model on device, in eval mode.

    Checks, in this order: both files are there, the description is one of ours and of this version, the checksum, and
    that names, shapes and dtypes of the tensors are exactly the model's. Raises CheckpointError naming what differs.
    """
    sidecar = _sidecar(path)
    content = _read(path)
    description = _described(sidecar, _read(sidecar))
    found = hashlib.sha256(content).hexdigest()
    if found != description["sha256"]:
        raise CheckpointError(
            f"{path} is damaged or was replaced: its sha256 is {found}, {sidecar.name} says {description['sha256']}; "
            "copy or train it again"
        )
    safetensors = _safetensors()
    try:
        with torch.device("meta"):  # a wrong size is then found before memory is taken for it
            model = VisionTransformer(ViTConfig(**description["model"]))
        tensors = safetensors.torch.load(content)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{sidecar} describes no model that can be built: {error}") from error
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from error
    _check_tensors(path, model, tensors)
    model.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, strict=True, assign=True)
    return Checkpoint(model.to(device).eval(), description["info"])


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise CheckpointError("checkpoints need the safetensors package: pip install 'semisparse[demo]'") from error
    return safetensors


def _sidecar(path: Path) -> Path:
    if path.suffix != SUFFIX:
        raise CheckpointError(f"checkpoint {str(path)!r} must end in {SUFFIX}")
    return path.with_suffix(".json")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; a checkpoint is NAME{SUFFIX} and NAME.json side by side") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def _described(sidecar: Path, content: bytes) -> dict[str, Any]:
    try:
        description = json.loads(content)
    except ValueError as error:
        raise CheckpointError(f"{sidecar} is damaged: it is no JSON ({error})") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise CheckpointError(f"{sidecar} describes no checkpoint of this kind: 'format' is not {FORMAT!r}")
    if description.get("version") != VERSION:
        raise CheckpointError(f"{sidecar} has version {description.get('version')!r}; this release reads {VERSION}")
    for key, kind in (("sha256", str), ("model", dict), ("info", dict)):
        if not isinstance(description.get(key), kind):
            raise CheckpointError(f"{sidecar} is damaged: {key!r} is missing or no {kind.__name__}")
    return description


def _check_tensors(path: Path, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    expected = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()}
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if found != expected:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        name = wrong[0]
        raise CheckpointError(
            f"{path} does not fit its description in {len(wrong)} tensors; first {name!r}: "
            f"expected {expected.get(name, 'none')}, found {found.get(name, 'none')}"
        )
