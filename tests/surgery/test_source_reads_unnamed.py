"""Layers that are called without being named: by index, slice or child, under several names, or by a function."""

import pytest
import torch
from torch import Tensor, nn

from semisparse import sparsify


class Dynamic(nn.Module):
    """Calls its layers without naming them, and reads one by name in a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.d = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)]), nn.ModuleDict({"k": nn.Linear(16, 16)})
        self.p, self.q = nn.Linear(16, 16), nn.Linear(16, 16)
        self.calls = [self.q]
        self.other = self.q

    def penalty(self) -> Tensor:
        return self.e[0].weight.norm() + self.d["k"].weight.norm() + self.p.weight.norm() + self.q.weight.norm()


def by_index(self, x, names=("p",)):
    for i in range(2):
        x = self.e[i](x)
    for key in self.d:
        x = self.d[key](x)
    for name in names:
        x = getattr(self, name)(x)
    return self.calls[0](x)


def by_slice_and_values(self, x):
    for layer in [*self.e[:2], *self.d.values()]:
        x = layer(x)
    return self._modules["p"](self.other(x))


def by_children(self, x):
    for layer in self.children():
        x = layer(x) if isinstance(layer, nn.Linear) else x
    for layer in self.e:
        x = layer(x)
    for _, layer in self.d.items():
        x = layer(x)
    return x


@pytest.mark.parametrize("forward", [by_index, by_slice_and_values, by_children])
def test_layers_that_are_called_without_their_names_are_marked_not_refused(forward) -> None:
    cls = type("Called", (Dynamic,), {"forward": forward})
    model = cls()
    report = sparsify(model)
    assert not report.skipped.keys() - {"other"}  # the second name of a layer
    assert {row.name for row in report if row.reason.startswith("verify")} == {"e.0", "d.k", "p", "q"}
    assert model(torch.randn(2, 16)).shape == (2, 16)


def outside(module: "Meanings", x: Tensor) -> Tensor:
    return module.a(x)


class Meanings(nn.Module):
    """`a` is read by a penalty and called in ways that have several meanings, or by a function that is given self."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.flag = True

    def penalty(self) -> Tensor:
        return self.a.weight.norm()


def by_branches(self, x):
    layer = None
    if self.flag:
        layer = self.a
    return layer(self.b(x))


def by_match(self, x):
    match self.flag:
        case True:
            layer = self.a
        case _:
            layer = self.b
    return layer(x) + self.b(x)


def by_function(self, x):
    return outside(self, self.b(x))


@pytest.mark.parametrize("forward", [by_branches, by_match, by_function])
def test_names_with_several_meanings_and_self_handed_on(forward) -> None:
    report = sparsify(type("Meant", (Meanings,), {"forward": forward})())
    assert {row.name: row.reason.partition(":")[0] for row in report} == {"a": "verify", "b": ""}
