"""Checkpoints with other contents but a right checksum, as someone who knows the format could write them."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from semisparse_lab.checkpoint.description import FORMAT, NO_CHECKSUM, checksum


def described(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path, "pt") as file:
        return json.loads(file.metadata()[FORMAT])


def rewrite(
    path: Path, text: str | None = None, tensors: dict[str, torch.Tensor] | None = None, **changes: Any
) -> None:
    """Another description (text, or changes of it) or other tensors."""
    tensors = safetensors.torch.load_file(path) if tensors is None else tensors
    text = json.dumps({**described(path), "sha256": NO_CHECKSUM, **changes}) if text is None else text
    right = text.replace(NO_CHECKSUM, checksum(text, tensors), 1)
    path.write_bytes(safetensors.torch.save(tensors, {FORMAT: right}))


def with_info(path: Path, **changes: Any) -> None:
    rewrite(path, info={**described(path)["info"], **changes})
