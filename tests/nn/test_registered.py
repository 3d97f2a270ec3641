"""Registered subclasses stay what they are while they are sparse: methods, attributes, protocol checks, copies."""

import copy
import pickle
from typing import Protocol, runtime_checkable

import pytest
import torch
from torch import nn

from semisparse import SemiSparseActivationLinear, SemiSparseLinear, SparseConfig, densify, register_linear, sparsify
from semisparse.errors import ConfigError, LayerRefusedError, NoLayerMatchedError
from semisparse.nn import registry
from semisparse.testing import assert_bit_equal
from tests.support import through_a_file

CONFIGS = pytest.mark.parametrize(
    "config", [SparseConfig(), SparseConfig(weight=None, activation="transposable")], ids=lambda c: c.operand
)


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_PLAIN_LINEARS", {nn.Linear})
    for cls in (WithSettings, Initialises):
        register_linear(cls)


@runtime_checkable
class Initialised(Protocol):
    def init_states(self) -> None: ...


class WithSettings(nn.Linear):
    """Has a config of its own, as attribute of the instance, and takes other arguments."""

    def __init__(self, settings: dict[str, int]) -> None:
        super().__init__(settings["size"], settings["size"])
        self.config = settings


class Mixin:
    def init_states(self) -> None:
        nn.init.ones_(self.weight)


class Initialises(nn.Linear, Mixin):
    """Has a protocol to fulfil, and a config of its class."""

    config = "of the class"

    def extra_repr(self) -> str:
        return f"mine, {super().extra_repr()}"


def model() -> nn.Sequential:
    return nn.Sequential(WithSettings({"size": 16}), Initialises(16, 16), nn.Linear(16, 16))


@CONFIGS
def test_a_swapped_layer_is_still_an_instance(config: SparseConfig) -> None:
    net = model()
    assert len(sparsify(net, config).swapped) == 3
    for layer, name in zip(net, ("WithSettings", "Initialises", "Linear"), strict=True):
        assert type(layer).__name__ in (f"SemiSparse{name}", f"SemiSparseActivation{name}")
    assert isinstance(net[0], WithSettings)
    assert net[0].config == {"size": 16}
    assert net[1].config == "of the class"
    assert isinstance(net[1], (SemiSparseLinear, SemiSparseActivationLinear))
    assert isinstance(net[1], Initialised)
    assert "mine, in_features=16" in repr(net[1])
    assert "=transposable, backend=auto: forward sparse" in repr(net[1])
    net[1].init_states()
    assert net[1].weight.eq(1).all()
    assert net[0].sparse_config == net[1].sparse_config == config
    assert type(net[2]) in (SemiSparseLinear, SemiSparseActivationLinear)


@CONFIGS
def test_back_to_exactly_the_class_that_it_was(config: SparseConfig) -> None:
    net = model()
    attributes = [set(vars(layer)) for layer in net]
    sparsify(net, config)
    densify(net)
    assert [type(layer) for layer in net] == [WithSettings, Initialises, nn.Linear]
    assert [set(vars(layer)) for layer in net] == attributes
    assert net[0].config == {"size": 16}


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "torch.save": through_a_file,
    "copy": lambda net: nn.Sequential(*(copy.copy(layer) for layer in net)),
}


@CONFIGS
@pytest.mark.parametrize("how", COPIES)
def test_copies_are_of_the_same_class_and_go_back(config: SparseConfig, how: str) -> None:
    net, x = model(), torch.randn(4, 16)
    sparsify(net, config)
    other = COPIES[how](net)
    assert [type(layer) for layer in other] == [type(layer) for layer in net]
    assert_bit_equal(other(x), net(x))
    densify(other)
    assert [type(layer) for layer in other] == [WithSettings, Initialises, nn.Linear]


def test_the_class_is_made_once() -> None:
    first, second = model(), model()
    sparsify(first)
    sparsify(second)
    assert type(first[0]) is type(second[0])


def test_two_subclasses_of_one_name_keep_apart() -> None:
    def make(value: int) -> type[nn.Linear]:
        class Same(nn.Linear):
            number = value

        return register_linear(Same)

    net = nn.Sequential(make(1)(8, 8), make(2)(8, 8))
    sparsify(net)
    assert [layer.number for layer in net] == [1, 2]


@pytest.mark.parametrize("attribute", ["operand", "sparse_config", "sparse_enabled", "_packed"])
def test_names_that_both_use_are_refused(attribute: str) -> None:
    clash = type("Clash", (nn.Linear,), {attribute: 1})
    with pytest.raises(ConfigError, match=rf"Clash has .*{attribute}"):
        register_linear(clash)
    layer = nn.Linear(8, 8)
    layer.__dict__[attribute] = 1
    with pytest.raises(
        NoLayerMatchedError, match=rf"attributes that semi-sparse layers use themselves: rename {attribute}"
    ):
        sparsify(nn.Sequential(layer))


def test_a_class_that_cannot_be_combined_says_so() -> None:
    class Meta(type):
        def __call__(cls, *args, **kwargs):
            return super().__call__(*args, **kwargs)

        def __new__(mcs, name, bases, namespace):
            if name.startswith("SemiSparse"):
                raise TypeError("final")
            return super().__new__(mcs, name, bases, namespace)

    class Final(nn.Linear, metaclass=Meta):
        pass

    register_linear(Final)
    layer = Final(8, 8)
    with pytest.raises(ConfigError, match="Final cannot be combined with SemiSparseLinear: final"):
        SemiSparseLinear.from_dense(layer)
    assert type(layer) is Final


def test_lazy_classes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"LazyLinear is lazy.*after a forward"):
        register_linear(nn.LazyLinear)
    net = nn.Sequential(nn.LazyLinear(8))
    with pytest.raises(NoLayerMatchedError, match="it is lazy, without sizes yet: run one forward first"):
        sparsify(net)
    net(torch.randn(2, 16))
    assert sparsify(net).swapped == ("0",)


WEIGHTS = {
    "int8": lambda: nn.Parameter(torch.zeros(16, 16, dtype=torch.int8), requires_grad=False),
    "bool": lambda: nn.Parameter(torch.zeros(16, 16, dtype=torch.bool), requires_grad=False),
    "float8": lambda: nn.Parameter(torch.zeros(16, 16).to(torch.float8_e4m3fn)),
    "complex": lambda: nn.Parameter(torch.zeros(16, 16, dtype=torch.complex64)),
    "sparse": lambda: nn.Parameter(torch.zeros(16, 16).to_sparse_csr()),
    "another shape": lambda: nn.Parameter(torch.zeros(16, 8)),
    "none": lambda: None,
    "subclass": lambda: nn.Parameter(Quantised(torch.zeros(16, 16))),
    "subclass of Parameter": lambda: FourBit(torch.zeros(16, 16)),
}


class Quantised(torch.Tensor):
    """A tensor subclass, as quantising libraries use them."""


class FourBit(nn.Parameter):
    """bitsandbytes does it so."""


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_no_forward_takes_are_refused_at_the_swap(kind: str) -> None:
    layer = nn.Linear(16, 16)
    layer.weight = WEIGHTS[kind]()
    net = nn.Sequential(layer, nn.Linear(16, 16))
    reason = sparsify(net).skipped["0"]
    said = {"sparse": "layout torch.sparse_csr", "another shape": "shape (16, 8)", "none": "no weight"}
    assert said.get(kind, "tensor subclass" if "subclass" in kind else f"dtype torch.{kind}") in reason
    with pytest.raises(LayerRefusedError):
        SemiSparseLinear.from_dense(layer)
