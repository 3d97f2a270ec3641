"""DINO's student: settings, a ViT that takes views of several sizes, and the head of prototypes."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semisparse.errors import ConfigError, ShapeError
from semisparse_lab.checks import check_counts, check_ranges, is_number
from semisparse_lab.models.transformer import seeded
from semisparse_lab.models.vit import VisionTransformer, ViTConfig, patches


@dataclass(frozen=True, kw_only=True, slots=True)
class DinoConfig:
    """Settings of a run, of the student's head and of the views. Immutable, checked when it is built.

    Args:
        epochs: As in TrainConfig.
        batch_size: As in TrainConfig.
        lr: As in TrainConfig.
        weight_decay: As in TrainConfig.
        clip: As in TrainConfig.
        out_dim: Prototypes.
        hidden: Features of the head's hidden layers.
        bottleneck: Features that are compared with the prototypes.
        student_temperature: Of the student's softmax.
        teacher_temperature: Of the teacher's.
        teacher_momentum: Share of the teacher that a step keeps.
        center_momentum: The same of the mean teacher output, which is subtracted from its outputs.
        global_scale: Least and most share of the image's area in a large crop.
        local_scale: The same of a small crop.
        local_views: Small crops per image.
        local_size: Their side in pixels.
        brightness: Largest relative change.
        contrast: Largest relative change.
        blur: Probability that a view is blurred.

    Raises:
        ConfigError: A setting is outside its range; the message names it.
    """

    epochs: int = 12
    batch_size: int = 128
    lr: float = 5e-4
    weight_decay: float = 0.04
    clip: float = 3.0
    out_dim: int = 512
    hidden: int = 512
    bottleneck: int = 256
    student_temperature: float = 0.1
    teacher_temperature: float = 0.07
    teacher_momentum: float = 0.98
    center_momentum: float = 0.9
    global_scale: tuple[float, float] = (0.8, 1.0)
    local_scale: tuple[float, float] = (0.5, 0.9)
    local_views: int = 4
    local_size: int = 16
    brightness: float = 0.2
    contrast: float = 0.2
    blur: float = 0.1

    def __post_init__(self) -> None:
        check_counts(self, ("out_dim", "hidden", "bottleneck", "local_views", "local_size"))
        check_ranges(self, ("teacher_momentum", "center_momentum", "brightness", "contrast", "blur"))
        for name in ("student_temperature", "teacher_temperature"):
            if not is_number(getattr(self, name)) or not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be more than 0 and at most 1")
        for name in ("global_scale", "local_scale"):
            pair = getattr(self, name)
            if len(pair) != 2 or not all(map(is_number, pair)) or not 0 < pair[0] <= pair[1] <= 1:
                raise ConfigError(f"{name}={pair!r} must be two shares, 0 < first <= second <= 1")


class DinoHead(nn.Module):
    """Features (B, width) to cosines (B, out_dim) with the prototypes, in fp32 whatever autocast says.

    A temperature of 0.04 would blow the rounding of bf16 up to a tenth of a logit.
    """

    def __init__(self, width: int, config: DinoConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, config.hidden)
        self.fc2 = nn.Linear(config.hidden, config.hidden)
        self.fc3 = nn.Linear(config.hidden, config.bottleneck)
        self.prototypes = nn.Parameter(torch.randn(config.out_dim, config.bottleneck))

    def forward(self, features: Tensor) -> Tensor:
        """Cosines (B, out_dim), fp32."""
        x = self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(features)))))
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(F.normalize(x.float(), dim=-1), F.normalize(self.prototypes.float(), dim=-1))


class DinoStudent(VisionTransformer):
    """The lab's ViT with a DinoHead, for images (B, channels, side, side) of any side that patch_size divides.

    On another grid of patches the learned positions are interpolated.

    Args:
        config: Sizes of the backbone.
        dino: Sizes of the head.

    Raises:
        ShapeError: In forward, if the images have another shape.
    """

    def __init__(self, config: ViTConfig, dino: DinoConfig) -> None:
        super().__init__(config)
        self.add_module("head", DinoHead(config.width, dino))  # in place of the class head

    def embed(self, images: Tensor) -> Tensor:
        """Patches of images as tokens (B, T, width), positions added."""
        channels, patch = self.config.channels, self.config.patch_size
        if images.dim() != 4 or images.shape[1] != channels or images.shape[2] != images.shape[3]:
            raise ShapeError(f"images has shape {tuple(images.shape)}; expected (batch, {channels}, side, side)")
        side, rest = divmod(images.shape[3], patch)
        if rest or not side:
            raise ShapeError(f"images has side {images.shape[3]}, which must be a multiple of patch_size={patch}")
        return self.patch_embed(patches(images, self.config)) + self._positions_on(side)

    def features(self, images: Tensor) -> Tensor:
        """The output of the backbone, without the head: one normalised token per patch, (B, T, width) fp32."""
        return self.norm(self.tokens(images)).float()

    def _positions_on(self, side: int) -> Tensor:
        trained = self.config.image_size // self.config.patch_size
        if side == trained:
            return self.positions
        grid = self.positions.T.reshape(1, -1, trained, trained)
        resized = F.interpolate(grid, size=(side, side), mode="bilinear", align_corners=False)
        return resized.flatten(2)[0].T


def build_student(config: ViTConfig, dino: DinoConfig, seed: int, device: torch.device | str = "cpu") -> DinoStudent:
    """A new student on device; its weights depend on the settings and seed alone, not on device or earlier draws."""
    return seeded(lambda: DinoStudent(config, dino), seed).to(device)
