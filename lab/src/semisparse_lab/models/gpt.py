"""A small GPT over bytes, made of plain nn.Linear layers."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from semisparse.errors import ConfigError, ShapeError
from semisparse_lab.checks import check_counts
from semisparse_lab.models.transformer import LARGEST_SIZE, Block, Transformer, seeded

BYTES = 256
_INIT_STD = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class GPTConfig:
    """Sizes of a GPT. Immutable, checked when it is built.

    Args:
        context: Tokens that it sees at most.
        width: Features per token.
        depth: Blocks.
        heads: Attention heads; divides width.
        mlp_ratio: Hidden features of the MLP over width.

    Raises:
        ConfigError: A size is not a positive whole number of at most LARGEST_SIZE or does not divide.
    """

    context: int = 256
    width: int = 384
    depth: int = 6
    heads: int = 6
    mlp_ratio: int = 4

    def __post_init__(self) -> None:
        check_counts(self, (field.name for field in fields(self)), most=LARGEST_SIZE)
        if self.width % self.heads:
            raise ConfigError(f"width={self.width} must be a multiple of heads={self.heads}")


class GPT(Transformer):
    """Decoder-only transformer over bytes: learned positions, pre-norm blocks, initial weights as in GPT-2.

    Input: bytes, (B, T) int64, T at most config.context. Output: the logits of each next byte, (B, T, 256). The linear
    layers are blocks.<i>.attn.qkv, .attn.proj, .mlp.fc1, .mlp.fc2 and head.

    Args:
        config: Sizes of the model.

    Raises:
        ShapeError: In forward, if the input has another shape.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embed = nn.Embedding(BYTES, config.width)
        self.positions = nn.Parameter(_INIT_STD * torch.randn(config.context, config.width))
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.mlp_ratio, causal=True) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, BYTES)
        self.apply(_initialise)
        for name, parameter in self.named_parameters():
            if name.endswith(("proj.weight", "fc2.weight")):  # what is added to the residual stream, 2 x depth times
                nn.init.normal_(parameter, std=_INIT_STD / (2 * config.depth) ** 0.5)

    def embed(self, inputs: Tensor) -> Tensor:
        """Bytes (B, T) as tokens (B, T, width), positions added."""
        if inputs.dim() != 2 or inputs.shape[1] > self.config.context:
            raise ShapeError(
                f"inputs has shape {tuple(inputs.shape)}; this model takes (batch, {self.config.context} bytes at most)"
            )
        return self.token_embed(inputs) + self.positions[: inputs.shape[1]]

    def read_out(self, x: Tensor) -> Tensor:
        """Logits (B, T, 256)."""
        return self.head(self.norm(x))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=_INIT_STD)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def build_gpt(config: GPTConfig, seed: int, device: torch.device | str = "cpu") -> GPT:
    """A new model on device; its weights depend on config and seed alone, not on device or earlier draws."""
    return seeded(lambda: GPT(config), seed).to(device)
