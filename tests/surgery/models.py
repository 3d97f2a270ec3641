"""Small models and the check that nothing about a model changed."""

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A transformer-like block that calls its linears."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 2 * width), "fc2": nn.Linear(2 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn["qkv"](x).chunk(3, -1)
        x = x + self.attn["proj"]((q @ k.mT).softmax(-1) @ v)
        return x + self.mlp["fc2"](self.mlp["fc1"](x).relu())


class Network(nn.Module):
    """Two blocks and a head; 10 classes, so the head cannot be 2:4."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


LINEAR_NAMES = [f"blocks.{i}.{part}" for i in (0, 1) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


class Snapshot:
    """Remembers a model's types, attributes, parameter objects and bits."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = [
            (name, id(module), type(module), dict(vars(module)))
            for name, module in model.named_modules(remove_duplicate=False)
        ]
        self.bits = {
            name: (id(p), None if nn.parameter.is_lazy(p) else p.detach().clone())
            for name, p in model.named_parameters(remove_duplicate=False)
        }

    def assert_unchanged(self) -> None:
        now = dict(self.model.named_modules(remove_duplicate=False))
        assert list(now) == [name for name, *_ in self.modules]
        for name, identity, cls, attributes in self.modules:
            assert id(now[name]) == identity
            assert type(now[name]) is cls, name
            assert vars(now[name]).keys() == attributes.keys(), name
            assert all(
                vars(now[name])[key] is value or vars(now[name])[key] == value for key, value in attributes.items()
            ), name
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        assert list(parameters) == list(self.bits)
        for name, (identity, value) in self.bits.items():
            assert id(parameters[name]) == identity
            assert value is None or value.is_meta or torch.equal(parameters[name], value), name
