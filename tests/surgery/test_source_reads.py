"""Layers whose weight a module above reads itself: found in the source, refused or marked; others left alone."""

import functools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semisparse import sparsify
from semisparse.errors import NoLayerMatchedError


class Holder(nn.Module):
    """Two layers: `other` is always called, `proj` is what the subclasses treat in their own ways."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.proj = nn.Linear(16, 16), nn.Linear(16, 16)
        self.flag = False

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.other(x))

    def use(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Plain(Holder):
    def use(self, x: Tensor) -> Tensor:
        return F.linear(x, self.proj.weight, self.proj.bias)


class Transposed(Holder):
    def use(self, x: Tensor) -> Tensor:
        return x @ self.proj.weight.t()


class Data(Holder):
    def use(self, x: Tensor) -> Tensor:
        return torch.einsum("mk,nk->mn", x, self.proj.weight.data)


class Alias(Holder):
    def use(self, x: Tensor) -> Tensor:
        layer = self.proj
        return F.linear(x, layer.weight)


class PairOfAliases(Holder):
    def use(self, x: Tensor) -> Tensor:
        first, second = self.other, self.proj
        return F.linear(first(x), second.weight)


class Getattr(Holder):
    def use(self, x: Tensor) -> Tensor:
        return F.linear(x, getattr(self.proj, "weight"))  # noqa: B009


class Property(Holder):
    @property
    def matrix(self) -> Tensor:
        return self.proj.weight

    def use(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix)


def undisguised(method):  # a decorator without functools.wraps
    def wrapper(self, x):
        return method(self, x)

    return wrapper


class Decorated(Holder):
    @undisguised
    def use(self, x: Tensor) -> Tensor:
        return F.linear(x, self.proj.weight)


def wrapped(method):
    @functools.wraps(method)
    def wrapper(self, x):
        return method(self, x)

    return wrapper


class Wrapped(Holder):
    @wrapped
    def use(self, x: Tensor) -> Tensor:
        return F.linear(x, self.proj.weight)


class Lambda(Holder):
    use = lambda self, x: F.linear(x, self.proj.weight)  # noqa: E731


class Inherited(Plain):
    """Only a base reads."""


class Asked(Holder):
    def use(self, x: Tensor) -> Tensor:
        if self.proj is not None and isinstance(self.proj, nn.Linear):
            return F.linear(x, self.proj.weight)
        return x


BYPASSING = [
    Plain,
    Transposed,
    Data,
    Alias,
    PairOfAliases,
    Getattr,
    Property,
    Decorated,
    Wrapped,
    Lambda,
    Inherited,
    Asked,
]


@pytest.mark.parametrize("cls", BYPASSING, ids=lambda cls: cls.__name__)
def test_a_layer_that_is_read_and_never_called_is_refused_with_the_place(cls: type[Holder]) -> None:
    report = sparsify(cls())
    assert report.swapped == ("other",)
    assert "reads its weight itself and never calls the layer" in report.skipped["proj"]
    assert ", line " in report.skipped["proj"]


def test_the_place_is_the_line_of_the_read() -> None:
    reason = sparsify(Plain()).skipped["proj"]
    number = int(reason.partition(", line ")[2].partition(" ")[0])
    assert "self.proj.weight, self.proj.bias" in Path(__file__).read_text().splitlines()[number - 1]
    assert f"{__name__}.Plain.use" in reason


class ByFlag(Holder):
    def use(self, x: Tensor) -> Tensor:
        return F.linear(x, self.proj.weight) if self.flag else self.proj(x)


class HandedOn(Holder):
    def use(self, x: Tensor) -> Tensor:
        return run(self.proj, x) + self.proj.weight.sum()


def run(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


class Penalised(Holder):
    def use(self, x: Tensor) -> Tensor:
        return self.proj(x)

    def penalty(self) -> Tensor:
        return self.proj.weight.square().sum()


class BySuper(Plain):
    def use(self, x: Tensor) -> Tensor:
        return super().use(x) if self.flag else self.proj.forward(x)


VERIFY = [ByFlag, HandedOn, Penalised, BySuper]


@pytest.mark.parametrize("cls", VERIFY, ids=lambda cls: cls.__name__)
def test_a_layer_that_is_read_and_also_called_is_swapped_and_marked(cls: type[Holder]) -> None:
    report = sparsify(cls())
    assert report.swapped == ("other", "proj")
    assert {row.name: row.reason.partition(":")[0] for row in report} == {"other": "", "proj": "verify"}
    assert "semisparse.check" in str(report)


class Facts(Holder):
    def use(self, x: Tensor) -> Tensor:
        weight = self.proj.weight.data.dtype
        x = x.to(self.proj.weight.dtype).to(self.proj.weight.device).to(weight)
        if isinstance(self.proj.weight, Tensor) and self.proj.weight is not None and self.proj.weight.requires_grad:
            assert x.shape[-1] == self.proj.weight.shape[1] == self.proj.weight.size(1)
        return self.proj(x)


class SetUp(Holder):
    def __init__(self) -> None:
        super().__init__()
        self.scale = self.proj.weight.std().item()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.proj.weight)
        self.proj.weight.data.copy_(self.other.weight + 1)

    def _init_weights(self) -> None:
        self.proj.weight.data = self.other.weight.data * 2

    def tie_weights(self) -> None:
        self.other.weight = self.proj.weight

    def rescale(self) -> None:
        nn.init.normal_(self.proj.weight)
        self.proj.weight.mul_(2)

    def use(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Overridden(Plain):
    """The base reads, but Python never runs that method."""

    def use(self, x: Tensor) -> Tensor:
        return self.proj(x)


@pytest.mark.parametrize("cls", [Facts, SetUp, Overridden], ids=lambda cls: cls.__name__)
def test_harmless_reads_say_nothing(cls: type[Holder]) -> None:
    report = sparsify(cls())
    assert [row.reason for row in report] == ["", ""]


class Outer(nn.Module):
    """Reads and calls through the modules below it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        self.blocks = nn.ModuleList([Overridden(), Overridden()])
        self.left = nn.ModuleDict({"a": nn.Linear(16, 16)})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return (
            F.linear(self.net(x), self.left["a"].weight) + self.net[0].weight.sum() + self.blocks[0].proj.weight.sum()
        )


def test_paths_through_containers_and_blocks() -> None:
    report = sparsify(Outer())
    assert "never calls" in report.skipped["left.a"]  # read by its key, never called
    notes = {row.name: row.reason.partition(":")[0] for row in report if row.name in report.swapped}
    assert notes["net.0"] == "verify"  # called with the Sequential that holds it
    assert notes["net.2"] == notes["blocks.1.proj"] == ""
    assert notes["blocks.0.proj"] == "verify"  # called by its block


def test_a_forward_set_on_the_parent_counts_as_its_source() -> None:
    model = Overridden()
    model.forward = functools.partial(lambda self, x: F.linear(self.other(x), self.proj.weight), model)
    report = sparsify(model)
    assert report.skipped.keys() | set(report.swapped) == {"other", "proj"}
    assert next(row for row in report if row.name == "proj").reason  # refused or to be verified, never silent


def test_a_forward_set_on_the_layer_is_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    inner = model[0].forward
    model[0].forward = lambda *args: inner(*args)
    assert "its forward was replaced on the instance" in sparsify(model).skipped["0"]


def test_a_class_without_source_is_swapped_as_before() -> None:
    space = {"Holder": Holder, "F": F}
    exec("class Blind(Holder):\n    def use(self, x):\n        return F.linear(x, self.proj.weight)\n", space)
    assert sparsify(space["Blind"]()).swapped == ("other", "proj")  # the schedule's first step sees it


def test_a_method_that_was_replaced_is_read_as_it_is_now() -> None:
    class Changing(Holder):
        def use(self, x: Tensor) -> Tensor:
            return self.proj(x)

    assert sparsify(Changing()).swapped == ("other", "proj")
    Changing.use = Plain.use
    assert sparsify(Changing()).swapped == ("other",)


def test_naming_such_a_layer_is_an_error() -> None:
    with pytest.raises(NoLayerMatchedError, match=r"proj: .*Plain\.use, line \d+ reads its weight itself"):
        sparsify(Plain(), select="proj")


class Asking(Holder):
    def use(self, x: Tensor) -> Tensor:
        weight = self.proj.weight
        x = x.type_as(self.proj.weight).to(self.proj.weight).to(weight.dtype) + torch.zeros_like(self.proj.weight)[0]
        return self.proj(x.to(device=weight.device))


class AskingThenUsing(Holder):
    def use(self, x: Tensor) -> Tensor:
        weight = self.proj.weight
        return F.linear(x.to(weight.dtype), weight)


class InitialValue(Holder):
    def initial_value(self, x: Tensor) -> Tensor:
        return F.linear(x, self.proj.weight)

    def use(self, x: Tensor) -> Tensor:
        return self.initial_value(x)


class ByBaseName(Plain):
    def use(self, x: Tensor) -> Tensor:
        return Plain.use(self, x)


def test_names_for_a_weight_are_followed() -> None:
    assert [row.reason for row in sparsify(Asking())] == ["", ""]
    assert "never calls" in sparsify(AskingThenUsing()).skipped["proj"]


@pytest.mark.parametrize("cls", [InitialValue, ByBaseName])
def test_methods_that_only_sound_like_setting_up_count(cls: type[Holder]) -> None:
    assert "never calls" in sparsify(cls()).skipped["proj"]
