"""The models on which plans are judged: compiled ones, and the same and others eager.

All compiled models but `llama` are compiled block by block, which takes seconds where a whole model takes a minute.
"""

from dataclasses import replace
from typing import Any

import torch

import semisparse
from benchmarks.models import CARDS, Card, initialised, timm_step, token_step


def _gpt2(toy: bool) -> torch.nn.Module:
    """GPT-2 with 124 million parameters; its Conv1D layers are nn.Linear."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, int] = (
        {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 512} if toy else {}
    )
    model = GPT2LMHeadModel(GPT2Config(use_cache=False, attn_implementation="sdpa", **sizes))
    semisparse.conv1d_to_linear(model)
    return initialised(model, torch.bfloat16)


def _convnext(toy: bool) -> torch.nn.Module:
    """Its MLPs are linear layers of four sizes, with M from 49 to 3136 per image."""
    import timm

    sizes: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (32, 64, 64, 128)} if toy else {}
    return initialised(timm.create_model("convnext_base", **sizes), torch.bfloat16)


def _by_blocks(card: Card, *blocks: str) -> Card:
    return replace(card, details=card.details.replace("compiled", "blocks compiled"), blocks=blocks)


_GPT2 = Card(
    "GPT-2, 124 M parameters, 16x1024 tokens", "bf16, compiled, fused AdamW", _gpt2, token_step(16, 1024), None
)
_CONVNEXT = Card("timm convnext_base, batch 64", "bf16, compiled, fused AdamW", _convnext, timm_step(64), None)
_WHOLE = {
    "timm-vit-l": CARDS["timm-vit-l"],
    "llama": CARDS["llama"],
    "llama-4096": CARDS["llama-4096"],
    "bert-base": CARDS["bert-base"],
    "gpt2": _GPT2,
    "convnext": _CONVNEXT,
}
_COMPILED = {
    "timm-vit-l": _by_blocks(_WHOLE["timm-vit-l"], "blocks"),
    "llama": _WHOLE["llama"],
    "llama-4096": _by_blocks(_WHOLE["llama-4096"], "model.layers"),
    "bert-base": _by_blocks(replace(_WHOLE["bert-base"], details="bf16, compiled, fused AdamW"), "bert.encoder.layer"),
    "gpt2": _by_blocks(_GPT2, "transformer.h"),
    "convnext": _by_blocks(_CONVNEXT, *(f"stages.{stage}.blocks" for stage in range(4))),
}


def _eager(card: Card, **changes: Any) -> Card:
    label = card.label.replace(", compiled", "")
    details = card.details.replace("compiled, ", "")
    changes = {"label": f"{label}, eager", "details": details, "compiled": False, "blocks": ()} | changes
    return replace(card, **changes)


_EAGER = {
    **{f"{name}-eager": _eager(card) for name, card in _WHOLE.items()},
    "timm-vit-l-32-eager": CARDS["timm-vit-l-32-eager"],
    "llama-1-eager": CARDS["llama-1-eager"],
    "gpt2-2-eager": _eager(_GPT2, label="GPT-2, 124 M parameters, 2x1024 tokens, eager", step=token_step(2, 1024)),
    "convnext-16-eager": _eager(_CONVNEXT, label="timm convnext_base, batch 16, eager", step=timm_step(16)),
}

PLANNED = {**_COMPILED, **_EAGER}
"""Six models compiled, ten eager; `python benchmarks/benchmark_semi_structured_training.py --plan --card NAME`."""
