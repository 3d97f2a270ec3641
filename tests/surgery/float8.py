"""torchao's conversion to float8, or where torchao is missing a stand-in with the same names and the same rules."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

Filter = Callable[[nn.Module, str], bool]

try:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.float8.float8_linear import Float8Linear

    def convert(model: nn.Module, module_filter_fn: Filter | None = None) -> None:
        convert_to_float8_training(model, module_filter_fn=module_filter_fn, config=Float8LinearConfig(emulate=True))

except ImportError:

    class Float8Linear(nn.Linear):  # type: ignore[no-redef]
        """Holds the Parameters of the layer that it is made of, and rounds weight and input to e4m3."""

        def __init__(self, *args: Any, config: SimpleNamespace, **keywords: Any) -> None:
            super().__init__(*args, **keywords)
            self.scaling_type_input = self.scaling_type_weight = self.scaling_type_grad_output = "dynamic"
            self.config, self.linear_mm_config = config, config

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(_rounded(input), _rounded(self.weight), self.bias)

        @classmethod
        def from_float(cls, mod: nn.Linear) -> "Float8Linear":
            with torch.device("meta"):
                made = cls(mod.in_features, mod.out_features, bias=False, config=SimpleNamespace(emulate=True))
            made.weight, made.bias = mod.weight, mod.bias
            return made

    Float8Linear.__module__ = "torchao.float8.float8_linear"

    def convert(model: nn.Module, module_filter_fn: Filter | None = None) -> None:
        """swap_linear_layers of torchao.float8.float8_linear_utils: every instance of nn.Linear, below the root."""
        for name, module in list(model.named_modules()):
            if name and isinstance(module, nn.Linear) and (module_filter_fn is None or module_filter_fn(module, name)):
                model.set_submodule(name, Float8Linear.from_float(module))


def _rounded(values: torch.Tensor) -> torch.Tensor:
    """values in e4m3, with the gradient passing through."""
    return values + (values.to(torch.float8_e4m3fn).to(values.dtype) - values).detach()
