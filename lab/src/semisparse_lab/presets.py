"""Model, augmentation and training settings for each of the demo's data sets.

Chosen on the validation split of the dense run; the sparse runs get the same settings.
"""

from dataclasses import dataclass

from semisparse.errors import ConfigError
from semisparse_lab.models.vit import ViTConfig
from semisparse_lab.tasks.classification import Augmentation
from semisparse_lab.train.config import TrainConfig


@dataclass(frozen=True, slots=True)
class Preset:
    """Everything a run needs besides the data. Sizes are multiples of 16, as the sparse GEMM of every block needs."""

    model: ViTConfig
    train: TrainConfig
    augmentation: Augmentation


def preset(data: str) -> Preset:
    """The settings for data set data ("digits" or "fashion-mnist"). Raises ConfigError for another name."""
    presets = {
        "digits": Preset(
            ViTConfig(image_size=8, patch_size=2, width=64, depth=2, heads=4),
            TrainConfig(epochs=40, batch_size=64, lr=6e-3),
            Augmentation(),
        ),
        "fashion-mnist": Preset(
            ViTConfig(image_size=28, patch_size=4, width=64, depth=4, heads=4),
            TrainConfig(epochs=20, batch_size=256, lr=2e-3),
            Augmentation(),
        ),
    }
    if data not in presets:
        raise ConfigError(f"data={data!r} is not one of {', '.join(map(repr, presets))}")
    return presets[data]
