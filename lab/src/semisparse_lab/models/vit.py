"""Small transformers made of plain nn.Linear layers, as the demo and the examples train them: here the ViT."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semisparse.errors import ConfigError, ShapeError
from semisparse_lab.checks import check_counts, shown

Built = TypeVar("Built", bound=nn.Module)

LARGEST_SIZE = 1 << 24
LARGEST_MODEL = 1 << 50
"""Bounds of a config: far beyond this demo, but below what overflows in torch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ViTConfig:
    """Sizes of a VisionTransformer. Immutable, checked when it is built.

    image_size, patch_size: side in pixels; channels: of the image; classes: outputs of the head; width: features a
    token; depth: blocks; heads: attention heads; mlp_ratio: hidden features of the MLP over width.
    Raises ConfigError for a size that is not a positive whole number of at most LARGEST_SIZE or does not divide, and
    for more than LARGEST_MODEL parameters.
    """

    image_size: int
    patch_size: int
    channels: int = 1
    classes: int = 10
    width: int = 64
    depth: int = 4
    heads: int = 4
    mlp_ratio: int = 4

    def __post_init__(self) -> None:
        check_counts(self, (field.name for field in fields(self)), most=LARGEST_SIZE)
        for whole, part in (("image_size", "patch_size"), ("width", "heads")):
            if getattr(self, whole) % getattr(self, part):
                raise ConfigError(f"{whole}={getattr(self, whole)} must be a multiple of {part}={getattr(self, part)}")
        if self.parameters > LARGEST_MODEL:
            raise ConfigError(
                f"width={self.width} and the other sizes make {shown(self.parameters)} parameters, more than "
                f"{LARGEST_MODEL}; choose smaller sizes"
            )

    @property
    def tokens(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_features(self) -> int:
        """Values in one patch."""
        return self.channels * self.patch_size**2

    @property
    def parameters(self) -> int:
        """How many numbers a VisionTransformer of these sizes holds; worked out without building one."""
        width, hidden = self.width, self.mlp_ratio * self.width
        attention = (width + 1) * 3 * width + (width + 1) * width
        mlp = (width + 1) * hidden + (hidden + 1) * width
        norm = 2 * width
        outer = (self.patch_features + 1) * width + self.tokens * width + norm + (width + 1) * self.classes
        return self.depth * (attention + mlp + 2 * norm) + outer

    @property
    def tensors(self) -> int:
        """How many tensors its state_dict holds."""
        return 12 * self.depth + 7


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
    """What the demo's models share: embed, then blocks, then read_out. Subclasses say what the first and last do."""

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


class VisionTransformer(Transformer):
    """ViT classifier (arXiv 2010.11929) with learned positions and mean pooling instead of a class token.

    images: (B, channels, image_size, image_size) float; returns logits (B, classes). The linear layers are
    patch_embed, blocks.<i>.attn.qkv, .attn.proj, .mlp.fc1, .mlp.fc2 and head. Raises ShapeError for another image size.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = nn.Linear(config.patch_features, config.width)
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(config.tokens, config.width), std=0.5))
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.mlp_ratio) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.classes)

    def embed(self, images: Tensor) -> Tensor:
        """Patches of images as tokens (B, T, width), positions added."""
        return self.patch_embed(self._patches(images)) + self.positions

    def pool(self, x: Tensor) -> Tensor:
        """One feature vector (B, width) for each image, from its tokens after the last block."""
        return self.norm(x).mean(dim=1)

    def read_out(self, x: Tensor) -> Tensor:
        """Logits (B, classes)."""
        return self.head(self.pool(x))

    def _patches(self, images: Tensor) -> Tensor:
        """(B, C, S, S) -> (B, tokens, patch_features)."""
        expected = (self.config.channels, self.config.image_size, self.config.image_size)
        if images.dim() != 4 or images.shape[1:] != expected:
            raise ShapeError(f"images has shape {tuple(images.shape)}; this model takes (batch, *{expected})")
        return patches(images, self.config)


def patches(images: Tensor, config: ViTConfig) -> Tensor:
    """Images (B, C, S, S), S a multiple of patch_size, as patches (B, patches, patch_features), row by row."""
    side, size = images.shape[-1] // config.patch_size, config.patch_size
    grid = images.reshape(-1, config.channels, side, size, side, size)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, side**2, config.patch_features)


def build_model(config: ViTConfig, seed: int, device: torch.device | str = "cpu") -> VisionTransformer:
    """A new model on device; its weights depend on config and seed alone, not on device or earlier draws."""
    return seeded(lambda: VisionTransformer(config), seed).to(device)


def seeded(build: Callable[[], Built], seed: int) -> Built:
    """What build makes on the CPU with random numbers of seed alone; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
