"""The end-to-end models: what a training step of each looks like, dense or semi-sparse.

Weights are random with a standard deviation of 0.02: a GPU multiplies zeros faster than data, and SAM's own
initialiser leaves weights that fp16 rounds to zero.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import semisparse

Step = Callable[[], object]


@dataclass(frozen=True)
class Card:
    """One end-to-end benchmark: how to build it, what is made sparse, how a step runs, and what to tell the reader."""

    title: str
    build: Callable[[], torch.nn.Module]
    select: str | None
    exclude: tuple[str, ...]
    step: Callable[[torch.nn.Module, torch.nn.Module], Step]
    tokens: int
    note: str
    blocks: str | None = None
    """Submodule list whose members are compiled one by one (they share their code) instead of the whole model."""

    def compile(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model as the benchmark runs it."""
        if self.blocks is None:
            return torch.compile(model)
        for block in model.get_submodule(self.blocks).children():
            block.compile()
        return model


def _initialised(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    model = model.to("cuda", dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def _sam() -> torch.nn.Module:
    from transformers import SamVisionConfig, SamVisionModel

    config = SamVisionConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, global_attn_indexes=[5, 11, 17, 23]
    )
    return _initialised(SamVisionModel(config), torch.float16)


def _sam_step(compiled: torch.nn.Module, model: torch.nn.Module) -> Step:
    images = torch.randn(8, 3, 1024, 1024, device="cuda", dtype=torch.float16)

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        compiled(images).last_hidden_state.float().square().mean().backward()

    return step


def _timm() -> torch.nn.Module:
    import timm

    return _initialised(timm.create_model("vit_large_patch16_224"), torch.bfloat16)


def _timm_step(compiled: torch.nn.Module, model: torch.nn.Module) -> Step:
    images = torch.randn(128, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(0, 1000, (128,), device="cuda")
    return _optimizer_step(model, lambda: torch.nn.functional.cross_entropy(compiled(images).float(), labels))


def _llama() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=16,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return _initialised(LlamaForCausalLM(config), torch.bfloat16)


def _llama_step(compiled: torch.nn.Module, model: torch.nn.Module) -> Step:
    tokens = torch.randint(0, 32000, (8, 2048), device="cuda")
    return _optimizer_step(model, lambda: compiled(input_ids=tokens, labels=tokens).loss)


def _optimizer_step(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Step:
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    return step


CARDS = {
    "sam-vit-l": Card(
        "SAM ViT-L image encoder, 1024 px, batch 8, fp16, compiled, forward + backward, MLP linears sparse",
        _sam,
        "mlp",
        (),
        _sam_step,
        8 * 64 * 64,
        "The seed document reports 1.063 for this model on an A100. On an H200 only a quarter of the step is matrix "
        "products (84 of 311 ms when it was first profiled); attention with relative positions takes most of the rest. "
        "Dense and sparse are compiled block by block, which takes less time than the whole encoder at once.",
        "vision_encoder.layers",
    ),
    "timm-vit-l": Card(
        "timm vit_large_patch16_224, batch 128, bf16, compiled, fused AdamW, all block linears sparse",
        _timm,
        "blocks",
        (),
        _timm_step,
        128 * 197,
        "",
    ),
    "llama": Card(
        "Llama-style 2048/8192, 8 layers, 8x2048 tokens, bf16, compiled, fused AdamW, all linears but the head sparse",
        _llama,
        None,
        ("lm_head",),
        _llama_step,
        8 * 2048,
        "",
    ),
}


def sparsified(card: Card) -> tuple[torch.nn.Module, semisparse.SwapReport]:
    """A freshly built model of card with its linears made semi-sparse."""
    model = card.build()
    report = semisparse.sparsify(model, select=card.select, exclude=card.exclude)
    return model, report
