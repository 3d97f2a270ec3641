"""The end-to-end models: what a training step of each looks like, dense or semi-sparse.

Weights are random with a standard deviation of 0.02: a GPU multiplies zeros faster than data, and SAM's own
initialiser leaves weights that fp16 rounds to zero. Nothing is downloaded. At toy size every model is so small that a
CPU steps it; such a run tries the program and measures nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import semisparse
from benchmarks.timing import device

Step = Callable[[], object]


@dataclass(frozen=True)
class Card:
    """One end-to-end benchmark.

    Attributes:
        label: The model and its batch, for the first column of a table.
        details: Precision, optimizer, compiled or eager, and what is made sparse.
        build: Makes the dense model; takes whether at toy size.
        step: Makes a training step from the model as it runs, the model with the parameters, and whether at toy size.
        select: Which linears are made sparse, as semisparse.sparsify takes it.
        exclude: Which are not.
        note: What else to tell the reader.
        blocks: Lists of submodules whose members are compiled one by one (they share their code) instead of the whole
            model.
        compiled: Whether the model is compiled at all.
        gains: Whether the model is here to show a gain, or where there is none.
        optimizes: Whether the step ends with an optimizer step.
    """

    label: str
    details: str
    build: Callable[[bool], torch.nn.Module]
    step: Callable[[torch.nn.Module, torch.nn.Module, bool], Step]
    select: str | None
    exclude: tuple[str, ...] = ()
    note: str = ""
    blocks: tuple[str, ...] = ()
    compiled: bool = True
    gains: bool = True
    optimizes: bool = True

    @property
    def title(self) -> str:
        """Label and details."""
        return f"{self.label}, {self.details}"

    def compile(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model as the benchmark runs it."""
        if not self.compiled:
            return model
        if not self.blocks:
            return torch.compile(model)
        for name in self.blocks:
            for block in model.get_submodule(name).children():
                block.compile()
        return model


def initialised(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    model = model.to(device(), dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def _sam(toy: bool) -> torch.nn.Module:
    from transformers import SamVisionConfig, SamVisionModel

    sizes: dict[str, Any] = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    sizes["global_attn_indexes"] = [5, 11, 17, 23]
    if toy:
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "global_attn_indexes": [1]}
        sizes |= {"image_size": 64, "window_size": 2}
    return initialised(SamVisionModel(SamVisionConfig(**sizes)), torch.float16)


def _sam_step(compiled: torch.nn.Module, model: torch.nn.Module, toy: bool) -> Step:
    batch, size = (1, 64) if toy else (8, 1024)
    images = torch.randn(batch, 3, size, size, device=device(), dtype=torch.float16)

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        compiled(images).last_hidden_state.float().square().mean().backward()

    return step


def _timm(toy: bool) -> torch.nn.Module:
    import timm

    sizes = {"embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": 32} if toy else {}
    return initialised(timm.create_model("vit_large_patch16_224", **sizes), torch.bfloat16)


def timm_step(batch: int) -> Callable[[torch.nn.Module, torch.nn.Module, bool], Step]:
    def make(compiled: torch.nn.Module, model: torch.nn.Module, toy: bool) -> Step:
        count, size = (2, 32) if toy else (batch, 224)
        images = torch.randn(count, 3, size, size, device=device(), dtype=torch.bfloat16)
        labels = torch.randint(0, 1000, (count,), device=device())
        return _optimizer_step(model, lambda: torch.nn.functional.cross_entropy(compiled(images).float(), labels))

    return make


def _llama(hidden: int, inter: int, layers: int) -> Callable[[bool], torch.nn.Module]:
    """Heads have 128 features."""

    def build(toy: bool) -> torch.nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        features, heads, vocabulary = (64, 2, 512) if toy else (hidden, hidden // 128, 32000)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=features,
            intermediate_size=128 if toy else inter,
            num_hidden_layers=2 if toy else layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            use_cache=False,
            attn_implementation="sdpa",
        )
        return initialised(LlamaForCausalLM(config), torch.bfloat16)

    return build


def _bert(toy: bool) -> torch.nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    sizes: dict[str, int] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 128, "vocab_size": 512}
    return initialised(BertForMaskedLM(BertConfig(**(sizes if toy else {}))), torch.bfloat16)


def token_step(batch: int, length: int) -> Callable[[torch.nn.Module, torch.nn.Module, bool], Step]:
    def make(compiled: torch.nn.Module, model: torch.nn.Module, toy: bool) -> Step:
        size = (2, 16) if toy else (batch, length)
        tokens = torch.randint(0, 512 if toy else 30000, size, device=device())
        return _optimizer_step(model, lambda: compiled(input_ids=tokens, labels=tokens).loss)

    return make


def _optimizer_step(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Step:
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    return step


CARDS = {
    "sam-vit-l": Card(
        "SAM ViT-L image encoder, 1024 px, batch 8",
        "fp16, compiled, forward + backward, MLP linears sparse",
        _sam,
        _sam_step,
        "mlp",
        note="On an H200 only a quarter of the step is matrix products (84 of 311 ms when it was first profiled); "
        "attention with relative positions takes most of the rest. On an H100 the step does not gain. Dense and sparse "
        "are compiled block by block, which takes less time than the whole encoder at once.",
        blocks=("vision_encoder.layers",),
        optimizes=False,
        gains=False,
    ),
    "timm-vit-l": Card(
        "timm vit_large_patch16_224, batch 128",
        "bf16, compiled, fused AdamW, all block linears sparse",
        _timm,
        timm_step(128),
        "blocks",
    ),
    "llama": Card(
        "Llama-style 2048/8192, 8x2048 tokens",
        "8 layers, bf16, compiled, fused AdamW, all linears but the head sparse",
        _llama(2048, 8192, 8),
        token_step(8, 2048),
        None,
        exclude=("lm_head",),
    ),
    "llama-4096": Card(
        "Llama-style 4096/11008, 8x2048 tokens",
        "4 layers, bf16, compiled, fused AdamW, all linears but the head sparse",
        _llama(4096, 11008, 4),
        token_step(8, 2048),
        None,
        exclude=("lm_head",),
    ),
    "bert-base": Card(
        "BERT-base, 32x128 tokens, compiled",
        "bf16, fused AdamW, all linears of the encoder's layers sparse",
        _bert,
        token_step(32, 128),
        "encoder.layer",
        gains=False,
    ),
    "timm-vit-l-32-eager": Card(
        "timm vit_large_patch16_224, batch 32, eager",
        "bf16, fused AdamW, all block linears sparse",
        _timm,
        timm_step(32),
        "blocks",
        compiled=False,
        gains=False,
    ),
    "timm-vit-l-32-mlp-eager": Card(
        "timm vit_large_patch16_224, batch 32, eager, MLPs",
        "bf16, fused AdamW, MLP linears sparse",
        _timm,
        timm_step(32),
        "mlp",
        compiled=False,
        gains=False,
    ),
    "llama-eager": Card(
        "Llama-style 2048/8192, 8x2048 tokens, eager",
        "8 layers, bf16, fused AdamW, all linears but the head sparse",
        _llama(2048, 8192, 8),
        token_step(8, 2048),
        None,
        exclude=("lm_head",),
        compiled=False,
    ),
    "llama-1-eager": Card(
        "Llama-style 2048/8192, 1x2048 tokens, eager",
        "8 layers, bf16, fused AdamW, all linears but the head sparse",
        _llama(2048, 8192, 8),
        token_step(1, 2048),
        None,
        exclude=("lm_head",),
        compiled=False,
        gains=False,
    ),
}
"""Every end-to-end benchmark; `python benchmarks/benchmark_semi_structured_training.py --card NAME` runs one."""

GAINS = tuple(name for name, card in CARDS.items() if card.gains)
NO_GAIN = tuple(name for name, card in CARDS.items() if not card.gains)


def sparsified(
    card: Card, toy: bool = False, config: semisparse.SparseConfig | None = None
) -> tuple[torch.nn.Module, semisparse.SwapReport]:
    """A freshly built model of card with its linears made semi-sparse, by default as SparseConfig() has it."""
    model = card.build(toy)
    report = semisparse.sparsify(model, config, select=card.select, exclude=card.exclude)
    return model, report
