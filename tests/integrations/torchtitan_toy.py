"""A config registry of torchtitan with its debug model at a size for CPUs; torchtitan_ranks imports it.

--module tests.integrations.torchtitan_toy --config toy
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import IterableDataset
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import DebugConfig, TrainingConfig
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.config_utils import decoder_vocab_size
from torchtitan.models.llama3 import model_registry
from torchtitan.trainer import Trainer

from semisparse import recipes, semi_sparse_layers
from semisparse.integrations.torchtitan import ScheduleHook, SemiSparseConverter

RECIPE = recipes.safest(sparse_fraction=2 / 3)
PHASES: list[str] = []
LOSSES: dict[int, float] = {}
PARTS: list[nn.Module] = []


class Rows(IterableDataset[Any]):
    """Endless rows of tokens that continue where they were saved."""

    def __init__(self, rank: int, length: int) -> None:
        self.rank, self.length, self.at = rank, length, 0

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        while True:
            numbers = torch.Generator().manual_seed(1000 * self.rank + self.at)
            row = torch.randint(0, 2000, (self.length + 1,), generator=numbers)
            self.at += 1
            yield {"input": row[:-1], "positions": torch.arange(self.length)}, row[1:]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Loader(ParallelAwareDataloader):
    """torchtitan's own loader over Rows."""

    @dataclass(kw_only=True, slots=True)
    class Config(ParallelAwareDataloader.Config):
        pass

    def __init__(
        self,
        config: Config,
        *,
        dp_rank: int,
        dp_world_size: int,
        seq_len: int,
        local_batch_size: int,
        snapshot_every_n_steps: int,
        **_: Any,
    ) -> None:
        options = {"batch_size": local_batch_size, "snapshot_every_n_steps": snapshot_every_n_steps}
        super().__init__(Rows(dp_rank, seq_len), dp_rank, dp_world_size, **options)


class NoTokenizer(BaseTokenizer):
    """Rows are tokens already."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, **_: Any) -> None:
        super().__init__()

    def encode(self, *_: Any, **__: Any) -> list[int]:
        raise NotImplementedError

    def decode(self, *_: Any, **__: Any) -> str:
        raise NotImplementedError

    def get_vocab_size(self) -> int:
        raise NotImplementedError


class Metrics(MetricsProcessor):
    """Keeps the losses with all their bits."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        pass

    def log(self, step: int, average: float, *others: Any, **more: Any) -> None:
        LOSSES[step] = average
        super().log(step, average, *others, **more)


def watch(optimizers: Any, parts: list[nn.Module], dims: Any) -> None:
    """Note the phase of each forward of the model."""
    PARTS.extend(parts)
    first = next(iter(semi_sparse_layers(parts[0]).values()))
    parts[0].register_forward_pre_hook(lambda *_: PHASES.append("sparse" if first.sparse_enabled else "dense"))


def toy() -> Trainer.Config:
    """All settings are torchtitan's own ones for the debug model, but for sizes and attention that CPUs have."""
    converter = SemiSparseConverter.Config(sparse=RECIPE.config, select=["feed_forward"])
    spec = model_registry("debugmodel", converters=[converter])
    for layer in spec.model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()  # others have no backward on CPUs
    hook = ScheduleHook(recipe=RECIPE)
    spec = hook.attach(replace(spec, parallelize_fn=summing(spec.parallelize_fn), post_optimizer_build_fn=watch))
    loss = CrossEntropyLoss.Config(global_vocab_size=decoder_vocab_size(spec))
    return Trainer.Config(
        model_spec=spec,
        loss=ChunkedLossWrapper.Config(loss_fn=loss),
        optimizer=default_adamw(lr=8e-4),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=2),
        training=TrainingConfig(local_batch_size=2, seq_len=16, steps=1000),  # the command line says how many
        tokenizer=NoTokenizer.Config(),
        dataloader=Loader.Config(),
        metrics=Metrics.Config(log_freq=1),
        checkpoint=CheckpointManager.Config(enable=True, interval=2, last_save_model_only=False),
        debug=DebugConfig(seed=0),
    )


def summing(parallelize: Any) -> Any:
    """Shards whose gradients are summed as gloo can: it has no factor for sums."""

    def parallelize_summing(model: nn.Module, **settings: Any) -> nn.Module:
        model = parallelize(model, **settings)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
        return model

    return parallelize_summing
