"""Layers that stay dense unless they are selected: output heads, patch embeddings and adapters, by role and name.

Position plays no part: the last layer of a model need not be its head.
"""

from torch import Tensor, nn

from semisparse.surgery.selection import FoundLayer, clean_name
from semisparse.surgery.sharing import share_memory

ROLES = {
    "lm_head": "an output head",
    "head": "an output head",
    "classifier": "an output head",
    "patch_embed": "a patch embedding",
    "lora_A": "an adapter of LoRA",
    "lora_B": "an adapter of LoRA",
}
"""Segment of a layer's name -> the role that it implies."""


def roles_of(model: nn.Module, layers: list[FoundLayer]) -> dict[int, str]:
    """Why layers of model stay dense by default, by the identity of the layer; a tied layer by any of its names."""
    tables = [module.weight for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))]
    return {id(found.layer): text for found in layers if (text := _role_of(found, tables)) is not None}


def _role_of(found: FoundLayer, tables: list[Tensor]) -> str | None:
    weight = found.layer._parameters.get("weight")
    if weight is not None and any(share_memory(weight, table) for table in tables):
        return "left dense by its role: its weight is tied to an embedding; name it in select to swap it"
    return role_of_name(clean_name(found.name))


def role_of_name(name: str) -> str | None:
    """Why a layer with this name stays dense by default; None if the name says nothing."""
    for segment in name.split("."):
        if segment in ROLES:
            return f"left dense by its name: {segment!r} says {ROLES[segment]}; name it in select to swap it"
    return None
