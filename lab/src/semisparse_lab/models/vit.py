"""A small ViT made of plain nn.Linear layers."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from semisparse.errors import ConfigError, ShapeError
from semisparse_lab.checks import check_counts, shown
from semisparse_lab.models.transformer import LARGEST_SIZE, Block, Transformer, seeded

LARGEST_MODEL = 1 << 50
"""Bound of a config, as LARGEST_SIZE."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ViTConfig:
    """Sizes of a VisionTransformer. Immutable, checked when it is built.

    Args:
        image_size: Side of an image in pixels.
        patch_size: Side of a patch in pixels; divides image_size.
        channels: Of an image.
        classes: Outputs of the head.
        width: Features per token.
        depth: Blocks.
        heads: Attention heads; divides width.
        mlp_ratio: Hidden features of the MLP over width.

    Raises:
        ConfigError: A size is not a positive whole number of at most LARGEST_SIZE or does not divide, or the model
            would have more than LARGEST_MODEL parameters.
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


class VisionTransformer(Transformer):
    """ViT classifier (arXiv 2010.11929) with learned positions and mean pooling instead of a class token.

    Input: (B, channels, image_size, image_size), float. Output: logits (B, classes). The linear layers are patch_embed,
    blocks.<i>.attn.qkv, .attn.proj, .mlp.fc1, .mlp.fc2 and head.

    Args:
        config: Sizes of the model.

    Raises:
        ShapeError: In forward, if the images have another size.
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
