"""A small vision transformer made of plain nn.Linear layers, as the demo and the examples train it."""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semisparse.errors import ConfigError, ShapeError


@dataclass(frozen=True, kw_only=True, slots=True)
class ViTConfig:
    """Sizes of a VisionTransformer. Immutable, checked when it is built.

    image_size, patch_size: side in pixels; channels: of the image; classes: outputs of the head; width: features a
    token; depth: blocks; heads: attention heads; mlp_ratio: hidden features of the MLP over width.
    Raises ConfigError for a size that is no positive whole number or does not divide.
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
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{field.name}={value!r} must be a whole number, 1 or more")
        for whole, part in (("image_size", "patch_size"), ("width", "heads")):
            if getattr(self, whole) % getattr(self, part):
                raise ConfigError(f"{whole}={getattr(self, whole)} must be a multiple of {part}={getattr(self, part)}")

    @property
    def tokens(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_features(self) -> int:
        """Values in one patch."""
        return self.channels * self.patch_size**2


class Attention(nn.Module):
    """Multi-head self-attention. x: (B, T, width), any float dtype; returns the same shape."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Attention over the T tokens of each image."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class MLP(nn.Module):
    """Two linear layers with GELU between them. x: (..., width); returns the same shape."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_ratio * config.width)
        self.fc2 = nn.Linear(config.mlp_ratio * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """fc2(gelu(fc1(x)))."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then MLP, each added to its input."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, width); returns the same shape."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """ViT classifier (arXiv 2010.11929) with learned positions and mean pooling instead of a class token.

    images: (B, channels, image_size, image_size) float; returns logits (B, classes). The linear layers are
    patch_embed, blocks.<i>.attn.qkv, .attn.proj, .mlp.fc1, .mlp.fc2 and head. Raises ShapeError for another image size.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = nn.Linear(config.patch_features, config.width)
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(config.tokens, config.width), std=0.5))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes)."""
        x = self.patch_embed(self._patches(images)) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))

    def _patches(self, images: Tensor) -> Tensor:
        """(B, C, S, S) -> (B, tokens, C * patch * patch), patches in row-major order."""
        size, patch = self.config.image_size, self.config.patch_size
        expected = (self.config.channels, size, size)
        if images.dim() != 4 or images.shape[1:] != expected:
            raise ShapeError(f"images has shape {tuple(images.shape)}; this model takes (batch, *{expected})")
        grid = images.reshape(-1, self.config.channels, size // patch, patch, size // patch, patch)
        return grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, self.config.tokens, self.config.patch_features)


def build_model(config: ViTConfig, seed: int, device: torch.device | str = "cpu") -> VisionTransformer:
    """A new model on device; its weights depend on config and seed alone, not on device or earlier draws."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VisionTransformer(config).to(device)
