"""torchao's float8 training on the weights that a schedule prunes: a row to compare with.

torchao is not among the packages that the lab needs. It is imported only where its row is asked for.
"""

import importlib
import importlib.util
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from semisparse import SemiSparseLinear
from semisparse.errors import ConfigError

INSTALL = "pip install torchao==0.18.0"
RECIPE = "tensorwise"


def missing() -> str:
    """Why this process cannot train in torchao's float8: empty where it can. It does not import torchao.

    torchao changes how a process compiles, so that arms without it must not share a process with its import.
    """
    return "" if importlib.util.find_spec("torchao") else f"torchao is not installed: {INSTALL}"


class MaskedFloat8Linear(SemiSparseLinear):
    """SemiSparseLinear whose products are torchao's: of the pruned weight in a sparse phase, of all of it otherwise."""

    torchao: tuple[Any, ...]
    """Its autograd function, and the settings that the function takes."""

    def forward(self, input: Tensor) -> Tensor:
        """As torchao's layer: its products with this weight, then the bias."""
        weight = self.weight
        if self.sparse_enabled:
            weight = weight + (self.pruned_weight() - weight).detach()  # exact, and straight through
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        product, *settings = self.torchao
        with torch.autocast(kind, enabled=False):  # it would cast the rounded weight, which eager code refuses
            y: Tensor = product.apply(input, weight.t(), *settings)
        return y if self.bias is None else y + self.bias.to(y.dtype)


@contextmanager
def masked_float8(model: nn.Module) -> Iterator[None]:
    """A context in which the semi-sparse layers of model compute by torchao.

    Args:
        model: As sparsify leaves it.

    Raises:
        ConfigError: torchao is not there.
    """
    config = _module("config").Float8LinearConfig.from_recipe_name(RECIPE)
    peer = _module("float8_linear")
    layers = [module for module in model.modules() if type(module) is SemiSparseLinear]
    for layer in layers:
        emulated = replace(config, emulate=layer.weight.device.type == "cpu")
        settings = peer.Float8Linear(32, 32, bias=False, device="meta", config=emulated)
        layer.__class__ = MaskedFloat8Linear
        assert isinstance(layer, MaskedFloat8Linear)
        layer.torchao = peer.matmul_with_hp_or_float8_args, settings.linear_mm_config, settings.config
    try:
        yield
    finally:
        for layer in layers:
            del layer.torchao
            layer.__class__ = SemiSparseLinear


def converted(model: nn.Module, names: Collection[str], *, emulate: bool = False) -> nn.Module:
    """model with the linears of these names converted in place, as torchao wants it before it is compiled.

    Args:
        model: Of plain nn.Linear layers.
        names: Of the layers.
        emulate: Compute in higher precision with rounded operands, as a CPU must.

    Raises:
        ConfigError: torchao is not there.
        RuntimeError: Other layers than these were converted.
    """
    config = replace(_module("config").Float8LinearConfig.from_recipe_name(RECIPE), emulate=emulate)
    made: nn.Module = _module("float8_linear_utils").convert_to_float8_training(
        model, config=config, module_filter_fn=lambda module, name: name in names
    )
    done = {name for name, module in made.named_modules() if type(module).__name__ == "Float8Linear"}
    if done != set(names):
        raise RuntimeError(f"torchao converted {sorted(done)} instead of {sorted(names)}")
    return made


def _module(name: str) -> Any:
    try:
        return importlib.import_module(f"torchao.float8.{name}")
    except ImportError as error:
        raise ConfigError(f"row 'float8' needs torchao, which cannot be imported ({error}): {INSTALL}") from error
