"""Layers that stay dense unless somebody asks for them: output heads, patch embeddings and adapters, by role and name.

Never by position: the last layer of a model is not taken for its head.
"""

from torch import nn

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
"""Segment of a layer's name -> the role that it says."""


def embeddings_of(model: nn.Module) -> list[nn.Embedding | nn.EmbeddingBag]:
    """The embedding tables of model."""
    return [module for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))]


def role_of(found: FoundLayer, embeddings: list[nn.Embedding | nn.EmbeddingBag]) -> str | None:
    """Why this layer is left dense by default, or None."""
    weight = found.layer._parameters.get("weight")
    if weight is not None and any(share_memory(weight, table.weight) for table in embeddings):
        return "left dense by its role: its weight is tied to an embedding; name it in select to swap it"
    for segment in clean_name(found.name).split("."):
        if segment in ROLES:
            return f"left dense by its name: {segment!r} says {ROLES[segment]}; name it in select to swap it"
    return None
