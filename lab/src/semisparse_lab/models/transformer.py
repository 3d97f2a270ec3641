"""What the lab's models share: transformer blocks made of plain nn.Linear layers."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Built = TypeVar("Built", bound=nn.Module)

LARGEST_SIZE = 1 << 24
"""Bound of the sizes in a config: far beyond the lab's models, but below what overflows in torch."""


class Attention(nn.Module):
    """Multi-head self-attention. x: (B, T, width), any float dtype; returns the same shape.

    causal: a token sees only itself and those before it.
    """

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attention over the T tokens of each sequence."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class MLP(nn.Module):
    """Two linear layers with GELU between them. x: (..., width); returns the same shape."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, ratio * width)
        self.fc2 = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """fc2(gelu(fc1(x)))."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then MLP, each added to its input."""

    def __init__(self, width: int, heads: int, mlp_ratio: int, causal: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, mlp_ratio)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, width); returns the same shape."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """What the lab's models share: embed, then blocks, then read_out. Subclasses say what the first and last do."""

    blocks: nn.ModuleList

    def embed(self, inputs: Tensor) -> Tensor:
        """Inputs of a batch to tokens (B, T, width)."""
        raise NotImplementedError

    def read_out(self, x: Tensor) -> Tensor:
        """Tokens after the last block (B, T, width) to outputs."""
        raise NotImplementedError

    def tokens(self, inputs: Tensor) -> Tensor:
        """Tokens after the last block (B, T, width)."""
        x = self.embed(inputs)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs of a batch."""
        return self.read_out(self.tokens(inputs))


def seeded(build: Callable[[], Built], seed: int) -> Built:
    """What build makes on the CPU with random numbers of seed alone; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
