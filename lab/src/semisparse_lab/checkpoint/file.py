"""Checkpoints of the lab's ViT: one safetensors file that holds the tensors and their description.

There is no second file beside it. Two files cannot be replaced in one step, so that a process that is killed between
them leaves neither the old version nor the new one; one file is switched by one rename. The description (version, sizes
of the model, what else was saved with it) is JSON in the header's metadata, where any safetensors reader finds it, with
a checksum over itself and all tensors, which safetensors does not have.
"""

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch

from semisparse import SemiSparseActivationLinear, SemiSparseLinear
from semisparse.files import write_atomically
from semisparse_lab.checkpoint.description import (
    FORMAT,
    NO_CHECKSUM,
    checksum,
    described,
    difference,
    model_config,
    written,
)
from semisparse_lab.checkpoint.tensor_file import LARGEST_HEADER, Header, kinds, read_header
from semisparse_lab.checks import shown
from semisparse_lab.errors import CheckpointError
from semisparse_lab.models.vit import VisionTransformer

SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        model: A model with plain nn.Linear layers, in eval mode.
        info: What was saved with it.
    """

    model: VisionTransformer
    info: dict[str, Any]


def save(path: Path, model: VisionTransformer, info: dict[str, Any] | None = None) -> str:
    """Write model to path (ending in .safetensors) in one atomic move; returns its checksum.

    Args:
        path: Ends in .safetensors.
        model: Plain nn.Linear layers, fp32.
        info: Anything JSON can hold, kept as it is.

    Raises:
        CheckpointError: load would not take the file (the model still has semi-sparse layers, is not a plain fp32
            VisionTransformer, info is not JSON or too long), or path has another ending or cannot be written. What was
            at path then stays.
    """
    _check_suffix(path)
    if any(isinstance(module, (SemiSparseLinear, SemiSparseActivationLinear)) for module in model.modules()):
        raise CheckpointError(
            f"model still has semi-sparse layers, so {path} would not say which weight it is: densify"
        )
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
    if wrong := difference(model.config, kinds(tensors)):
        raise CheckpointError(f"model={type(model).__name__} is not what its config describes, {wrong}")
    text = written(model.config, {} if info is None else info)
    found = checksum(text, tensors)
    content = safetensors.torch.save(tensors, {FORMAT: text.replace(NO_CHECKSUM, found, 1)})
    if int.from_bytes(content[:8], "little") > LARGEST_HEADER:
        raise CheckpointError(f"info has {len(text)} bytes as JSON, which makes a header of more than {LARGEST_HEADER}")
    try:
        write_atomically(path, content)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error
    return found


def load(path: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint into a plain nn.Linear model on device, in eval mode.

    Checks, in this order: the header is whole and of bounded size, the description is one of ours and of this version,
    its sizes make a model of exactly the names, shapes and dtypes that the header lists, and the checksum. Only then is
    memory taken for a model, so a wrong description costs none.

    Args:
        path: As save wrote it.
        device: Where the model goes.

    Raises:
        CheckpointError: The file is missing, damaged or of another kind; the message names what differs.
    """
    _check_suffix(path)
    try:
        if not (path.is_dir() or stat.S_ISREG(path.stat().st_mode)):
            raise CheckpointError(f"{path} is not a regular file; a checkpoint is NAME{SUFFIX}")
        with path.open("rb") as file:
            header = _header(path, file)
            description = described(path, header)
            config = model_config(path, description["model"])
            if wrong := difference(config, header.tensors):
                raise CheckpointError(f"{path} does not fit its description, {wrong}")
            file.seek(0)
            tensors = safetensors.torch.load(file.read(header.size))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; a checkpoint is NAME{SUFFIX}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except MemoryError:
        raise CheckpointError(f"{path} is larger than the memory of this machine allows") from None
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    expected = description["sha256"]
    found = checksum(header.metadata[FORMAT].replace(expected, NO_CHECKSUM, 1), tensors)
    if found != expected:
        raise CheckpointError(
            f"{path} is damaged or was edited: the sha256 of its contents is {found}, it says {shown(expected)}; "
            "copy or train it again"
        )
    with torch.device("meta"):
        model = VisionTransformer(config)
    model.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, strict=True, assign=True)
    return Checkpoint(model.to(device).eval(), description["info"])


def _check_suffix(path: Path) -> None:
    if path.suffix != SUFFIX:
        raise CheckpointError(f"checkpoint {str(path)!r} must end in {SUFFIX}")


def _header(path: Path, file: BinaryIO) -> Header:
    try:
        return read_header(file, os.fstat(file.fileno()).st_size)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged or not a checkpoint: {error}; copy or train it again") from error
