"""The description in a checkpoint's header: JSON with version, checksum, sizes of the model and what else was saved."""

import hashlib
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from semisparse.errors import ConfigError
from semisparse_lab.checkpoint.tensor_file import Header, Kind, kinds
from semisparse_lab.checks import shown
from semisparse_lab.errors import CheckpointError
from semisparse_lab.models.vit import VisionTransformer, ViTConfig
from semisparse_lab.strict_json import parse

FORMAT = "semisparse-vit"
"""The description's name in the header's metadata."""
VERSION = 2
NO_CHECKSUM = "0" * 64
"""Placeholder while the checksum is computed."""


def written(config: ViTConfig, info: dict[str, Any]) -> str:
    """The description as JSON, with NO_CHECKSUM.

    Args:
        config: Sizes of the model.
        info: What else is saved, as plain JSON values.

    Raises:
        CheckpointError: info would not survive a round trip through JSON.
    """
    try:
        text = json.dumps(
            {"version": VERSION, "sha256": NO_CHECKSUM, "model": asdict(config), "info": info}, allow_nan=False
        )
        kept = parse(text)["info"] == info  # JSON would turn a tuple into a list, and the key 1 into "1"
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"info={shown(info)} cannot be written as JSON: {error}") from error
    if not kept or not isinstance(info, dict):
        raise CheckpointError(f"info={shown(info)} would not come back from JSON as it is; use a dict of plain values")
    return text


def checksum(text: str, tensors: dict[str, torch.Tensor]) -> str:
    """The sha256 of a description and of its tensors.

    Args:
        text: The description, with NO_CHECKSUM in the place of its checksum.
        tensors: Tensors by name, on the CPU. Names, dtypes, shapes and bytes count.

    Returns:
        The checksum, in hexadecimal.
    """
    digest = hashlib.sha256(text.encode(errors="surrogatepass"))
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def described(path: Path, header: Header) -> dict[str, Any]:
    """The description in a header, with its version and the types of its parts checked.

    Args:
        path: The file, for messages.
        header: Its header.

    Raises:
        CheckpointError: The description is missing, damaged or of another version.
    """
    if FORMAT not in header.metadata:
        raise CheckpointError(
            f"{path} has no description called {FORMAT!r} in its header: another program wrote it, or a release "
            "that kept the description in a file beside it; train it again"
        )
    try:
        description = parse(header.metadata[FORMAT])
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: its description is not JSON ({error})") from error
    if not isinstance(description, dict):
        raise CheckpointError(f"{path} is damaged: its description is not a dict")
    version = description.get("version")
    if type(version) is not int or version != VERSION:
        raise CheckpointError(f"{path} has version {shown(version)}; this release reads {VERSION}")
    for key, kind in (("sha256", str), ("model", dict), ("info", dict)):
        if not isinstance(description.get(key), kind):
            raise CheckpointError(f"{path} is damaged: {key!r} is missing or not a {kind.__name__}")
    return description


def model_config(path: Path, sizes: dict[str, Any]) -> ViTConfig:
    """The config that a description gives.

    Args:
        path: The file, for messages.
        sizes: The description's sizes of the model.

    Raises:
        CheckpointError: The sizes do not describe a model that can be built.
    """
    names = {field.name for field in fields(ViTConfig)}
    if other := sorted(names ^ sizes.keys()):
        raise CheckpointError(
            f"{path} does not describe a model that can be built: {shown(other[0])} is "
            + ("missing" if other[0] in names else "not a size of a ViT")
        )
    try:
        return ViTConfig(**sizes)
    except ConfigError as error:
        raise CheckpointError(f"{path} does not describe a model that can be built: {error}") from error


def difference(config: ViTConfig, found: dict[str, Kind]) -> str | None:
    """How the tensors found differ from those of a model with this config, as text; None if they do not."""
    # Building a model takes time for each block, even without memory, so a depth that cannot be right is refused first.
    if config.tensors >= len(found) + 12:
        return f"{len(found)} tensors do not make {config.depth} blocks (depth={config.depth})"
    with torch.device("meta"):
        expected = kinds(VisionTransformer(config).state_dict())
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if not wrong:
        return None
    return (
        f"in {len(wrong)} tensors; first {shown(wrong[0])}: "
        f"expected {expected.get(wrong[0], 'none')}, found {found.get(wrong[0], 'none')}"
    )
