"""The warning of a layer with a pruned activation: once per process, silenced by its class, and before any change."""

import warnings

import pytest
import torch
from torch import nn

import semisparse
from semisparse import SemiSparseActivationLinear, SparseConfig, TokenMixingWarning, sparsify
from semisparse.nn import activation
from tests import fresh

CONFIG = SparseConfig(weight=None, activation="transposable")


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation, "_warned", False)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield


BUILD = {
    "built": lambda: SemiSparseActivationLinear(16, 16),
    "from_dense": lambda: SemiSparseActivationLinear.from_dense(nn.Linear(16, 16)),
    "sparsify": lambda: sparsify(nn.Sequential(nn.Linear(16, 16)), CONFIG),
    "torchao's call": lambda: semisparse.swap_linear_with_semi_sparse_linear(
        nn.Sequential(nn.Linear(16, 16)), {"0": SemiSparseActivationLinear}
    ),
}


@pytest.mark.parametrize("first", BUILD)
def test_it_is_said_once(first: str) -> None:
    with pytest.warns(TokenMixingWarning, match="in a causal model a token then depends on later ones"):
        BUILD[first]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for build in BUILD.values():
            build()


def test_the_weight_operand_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsify(nn.Sequential(nn.Linear(16, 16)))


def test_its_class_silences_it_in_a_new_process() -> None:
    code = (
        "import warnings, semisparse; {}; warnings.filterwarnings('ignore', category=semisparse.TokenMixingWarning)\n"
        "semisparse.SemiSparseActivationLinear(16, 16)"
    )
    silent = fresh.run("-c", "import warnings; warnings.simplefilter('error')\n" + code.format("pass"))
    assert silent.returncode == 0, silent.stderr
    loud = code.format("semisparse.SemiSparseActivationLinear(16, 16)")
    said = fresh.run("-c", loud)
    assert said.stderr.count("TokenMixingWarning: ") == 1


def test_as_an_error_it_comes_before_the_first_change() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TokenMixingWarning):
            sparsify(model, CONFIG)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]


def test_a_token_depends_on_later_ones_of_its_tile_only() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = SemiSparseActivationLinear(16, 16)
    x = torch.randn(8, 16)
    y = layer(x)
    x[3] = torch.randn(16)
    assert not torch.equal(layer(x)[:3], y[:3])  # documented, and warned of
    assert torch.equal(layer(x)[4:], y[4:])
