"""Settings of a run and what follows from them alone: device, autocast, learning rate, optimizer."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from semisparse.errors import ConfigError
from semisparse_lab.checks import check_counts, check_ranges, is_number, shown

Precision = Literal["fp32", "bf16", "fp16"]
MOST_EPOCHS = 1_000_000
LARGEST_SEED = 2**64 - 1
"""What torch's generators take."""
LARGEST_LR, LARGEST_DECAY = 1e30, 1e6
"""Beyond these an optimizer's factors, lr * weight_decay say, overflow fp32 and torch raises instead of diverging."""
_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Settings of a run. Immutable, checked when it is built.

    Args:
        epochs: At most MOST_EPOCHS.
        batch_size: Samples per step.
        lr: Peak learning rate.
        warmup_fraction: Share of the steps over which the learning rate rises from 0.
        hold_fraction: Share of the steps over which it then stays, before a cosine to 0.
        weight_decay: Of tensors with 2 or more dimensions.
        betas: Adam's.
        clip: Largest norm of all gradients together, 0 for any.
        layers: Which linear layers a recipe makes sparse, as sparsify's select.
        seed: Of initial weights, data order, augmentation and sampled gradients, at most LARGEST_SEED.
        device: "auto", "cpu", "cuda" or "cuda:<i>".
        precision: "fp32", or autocast to "bf16" or "fp16" (the latter with gradient scaling) over fp32 weights.

    Raises:
        ConfigError: A setting is outside its range; the message names it.
    """

    epochs: int = 40
    batch_size: int = 64
    lr: float = 6e-3
    warmup_fraction: float = 0.1
    hold_fraction: float = 0.0
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 0.0
    layers: str = "mlp"
    seed: int = 0
    device: str = "cpu"
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        check_counts(self, ("epochs",), most=MOST_EPOCHS)
        check_counts(self, ("batch_size",))
        check_counts(self, ("seed",), least=0, most=LARGEST_SEED)
        check_ranges(self, ("warmup_fraction",))
        check_ranges(self, ("hold_fraction",), high=1 - self.warmup_fraction)
        check_ranges(self, ("clip",), high=math.inf)
        check_ranges(self, ("weight_decay",), high=LARGEST_DECAY)
        pair = self.betas if isinstance(self.betas, (tuple, list)) else ()
        if len(pair) != 2 or not all(is_number(beta) and 0 <= beta < 1 for beta in pair):
            raise ConfigError(f"betas={shown(self.betas)} must be two numbers, 0 or more and less than 1")
        if not is_number(self.lr) or not 0 < self.lr <= LARGEST_LR:
            raise ConfigError(f"lr={shown(self.lr)} must be a positive number, at most {LARGEST_LR:g}")
        if not isinstance(self.layers, str) or not self.layers:  # the empty text is part of every name
            raise ConfigError(f"layers={shown(self.layers)} must be part of a layer's name, or a glob; '*' is all")
        if self.precision not in get_args(Precision):
            choices = ", ".join(map(repr, get_args(Precision)))
            raise ConfigError(f"precision={self.precision!r} is not one of {choices}")
        resolve_device(self.device)


def resolve_device(name: str) -> torch.device:
    """The device called name.

    Args:
        name: "auto" is CUDA if there is one, else the CPU.

    Raises:
        ConfigError: name is not "auto", a CPU or a CUDA device of this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device={shown(name)} is not a device; use 'auto', 'cpu' or 'cuda'") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={name!r} is not supported; use 'auto', 'cpu' or 'cuda'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={name!r}: torch sees {torch.cuda.device_count()} CUDA devices; use 'cpu'")
    return device


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Autocast to precision; off for fp32."""
    return torch.autocast(device.type, dtype=_AUTOCAST_DTYPES.get(precision), enabled=precision != "fp32")


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """Linear warm-up to config.lr, which is held, then half a cosine that would reach 0 at step total."""
    warmup = round(config.warmup_fraction * total)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    held = warmup + round(config.hold_fraction * total)
    return config.lr * 0.5 * (1 + math.cos(math.pi * max(0, step - held) / max(1, total - held)))


def adamw(
    model: nn.Module, config: TrainConfig, kind: type[torch.optim.AdamW] = torch.optim.AdamW
) -> torch.optim.AdamW:
    """The optimizer of a run.

    Args:
        model: Whose parameters it moves. Only those with 2 or more dimensions decay.
        config: Learning rate, betas, weight decay and device.
        kind: AdamW or a subclass such as StepAdamW.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    # A subclass may have no fused form; torch then chooses the best of the others.
    fused = True if kind is torch.optim.AdamW and resolve_device(config.device).type == "cuda" else None
    return kind(groups, lr=config.lr, betas=config.betas, fused=fused)
