"""SparseConfig: frozen, keyword-only, by operand, checked when built."""

import pickle
from dataclasses import FrozenInstanceError, replace
from typing import get_args

import pytest

from semisparse import SparseConfig
from semisparse.config import ActivationMask
from semisparse.errors import ConfigError
from semisparse.masks import MASKS, MaskName

ACTIVATION = {"weight": None, "activation": "transposable"}


def test_defaults_are_the_transposable_weight_recipe() -> None:
    config = SparseConfig()
    assert (config.weight, config.activation, config.backend) == ("transposable", None, "auto")
    assert (config.grad_output, config.precision) == (None, None)
    assert config.operand == "weight"
    assert SparseConfig(**ACTIVATION).operand == "activation"
    dense = SparseConfig(weight=None, precision="fp8")
    assert (dense.operand, dense.prunes, config.prunes) == ("weight", False, True)


def test_the_names_of_masks_are_the_tables() -> None:
    assert get_args(MaskName) == tuple(MASKS)
    assert all(MASKS[name].both_ways for name in get_args(ActivationMask))  # the weight gradient needs the transpose
    assert len({mask.constant for mask in MASKS.values()} | {0}) == len(MASKS) + 1


MASK_CHOICES = "None, 'transposable', 'row', 'soft', 'greedy', 'signed_greedy'"


@pytest.mark.parametrize(
    ("field", "value", "choices"),
    [
        ("weight", "sideways", MASK_CHOICES),
        ("weight", "codes", MASK_CHOICES),
        ("weight", True, MASK_CHOICES),
        ("weight", ["row"], MASK_CHOICES),
        ("activation", "row", "None, 'transposable'"),
        ("grad_output", "transposable", "None, 'mvue'"),
        ("precision", "fp16", "None, 'fp8'"),
        ("backend", "engine", "'auto', 'cusparselt', 'dense'"),
        ("backend", None, "'auto', 'cusparselt', 'dense'"),
    ],
)
def test_a_value_outside_its_choices_is_named_with_the_choices(field: str, value: object, choices: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SparseConfig(**{field: value})  # type: ignore[arg-type]
    assert str(caught.value) == f"{field}={value!r} is not one of {choices}"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (ACTIVATION, r"precision='fp8' and activation='transposable': tokens are not packed .*set precision=None"),
        ({"weight": None, "grad_output": "mvue"}, r"weight=None and grad_output='mvue': only layers with a pruned"),
        ({"weight": "soft"}, r"precision='fp8' and weight='soft': its values are scaled beyond .*or precision=None"),
        ({"weight": None, "backend": "cusparselt"}, r"backend='cusparselt' has no sparse product .*: use 'auto'"),
    ],
)
def test_what_fp8_cannot_compute_is_refused_with_the_reason(settings: dict, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        SparseConfig(**settings, precision="fp8")


def test_settings_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"weight='row' and activation='transposable': .*set one of them to None"):
        SparseConfig(weight="row", activation="transposable")
    with pytest.raises(ConfigError, match="weight=None and activation=None prune nothing in y"):
        SparseConfig(weight=None, grad_output="mvue")
    with pytest.raises(ConfigError, match=r"activation='transposable' and grad_output='mvue': .*set grad_output=None"):
        SparseConfig(**ACTIVATION, grad_output="mvue")


@pytest.mark.parametrize(
    ("settings", "products"),
    [
        ({}, ("sparse", "sparse", "dense")),
        ({"weight": "greedy"}, ("sparse", "sparse", "dense")),
        ({"weight": "row"}, ("sparse", "dense", "dense")),
        ({"weight": "soft"}, ("sparse", "dense", "dense")),
        (ACTIVATION, ("sparse", "dense", "sparse")),
        ({"grad_output": "mvue"}, ("sparse", "sparse", "sparse")),
        ({"weight": "soft", "grad_output": "mvue"}, ("sparse", "dense", "sparse")),
        ({"grad_output": "mvue", "backend": "dense"}, ("masked dense", "masked dense", "masked dense")),
        ({"backend": "cusparselt"}, ("sparse", "sparse", "dense")),
        ({"backend": "dense"}, ("masked dense", "masked dense", "dense")),
        ({"precision": "fp8"}, ("sparse fp8", "sparse fp8", "dense fp8")),
        ({"precision": "fp8", "weight": "row"}, ("sparse fp8", "dense fp8", "dense fp8")),
        ({"precision": "fp8", "grad_output": "mvue"}, ("sparse fp8", "sparse fp8", "sparse fp8")),
        ({"precision": "fp8", "weight": None}, ("dense fp8", "dense fp8", "dense fp8")),
        ({"precision": "fp8", "backend": "dense"}, ("masked dense fp8", "masked dense fp8", "dense fp8")),
    ],
)
def test_the_products_follow_from_the_settings(settings: dict, products: tuple[str, ...]) -> None:
    config = SparseConfig(**settings)
    assert config.products == dict(zip(("forward", "grad_input", "grad_weight"), products, strict=True))
    assert str(config).endswith(", ".join(f"{name} {how}" for name, how in config.products.items()))


def test_it_is_frozen_and_keyword_only() -> None:
    config = SparseConfig()
    with pytest.raises(FrozenInstanceError):
        config.weight = "row"  # type: ignore[misc]
    with pytest.raises(TypeError):
        SparseConfig("row")  # type: ignore[misc]


def test_replace_checks_again() -> None:
    assert replace(SparseConfig(), weight="row") == SparseConfig(weight="row")
    with pytest.raises(ConfigError):
        replace(SparseConfig(weight="row"), activation="transposable")


def test_it_compares_hashes_and_pickles_by_value() -> None:
    config = SparseConfig(**ACTIVATION)
    assert config == pickle.loads(pickle.dumps(config))
    assert len({config, SparseConfig(**ACTIVATION), SparseConfig()}) == 2
