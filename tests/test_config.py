"""SparseConfig: frozen, keyword-only, checked when built."""

import pickle
from dataclasses import FrozenInstanceError, replace

import pytest

from semisparse import SparseConfig
from semisparse.errors import ConfigError


def test_defaults_are_the_transposable_weight_recipe() -> None:
    config = SparseConfig()
    assert (config.operand, config.mask) == ("weight", "transposable")


@pytest.mark.parametrize(("field", "value", "choices"), [
    ("operand", "weights", "'weight', 'activation'"),
    ("operand", None, "'weight', 'activation'"),
    ("mask", "sideways", "'transposable', 'row', 'soft', 'greedy', 'signed_greedy'"),
    ("mask", "codes", "'transposable', 'row', 'soft', 'greedy', 'signed_greedy'"),
    ("mask", True, "'transposable', 'row'"),
    ("mask", ["row"], "'transposable', 'row'"),
])  # fmt: skip
def test_a_value_outside_its_choices_is_named_with_the_choices(field: str, value: object, choices: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SparseConfig(**{field: value})  # type: ignore[arg-type]
    assert f"{field}={value!r}" in str(caught.value)
    assert choices in str(caught.value)


def test_settings_that_exclude_each_other_are_refused() -> None:
    for mask in ("row", "soft", "greedy", "signed_greedy"):
        expected = rf"mask='{mask}' cannot serve operand='activation'.*use mask='transposable'"
        with pytest.raises(ConfigError, match=expected):
            SparseConfig(operand="activation", mask=mask)  # type: ignore[arg-type]


def test_it_is_frozen_keyword_only_and_has_no_other_fields() -> None:
    config = SparseConfig()
    with pytest.raises(FrozenInstanceError):
        config.mask = "row"  # type: ignore[misc]
    with pytest.raises(TypeError):
        SparseConfig("weight")  # type: ignore[misc]
    with pytest.raises(TypeError, match="precision"):
        SparseConfig(precision="fp8")  # type: ignore[call-arg]


def test_replace_checks_again() -> None:
    assert replace(SparseConfig(), mask="row") == SparseConfig(mask="row")
    with pytest.raises(ConfigError):
        replace(SparseConfig(mask="row"), operand="activation")


def test_it_compares_hashes_and_pickles_by_value() -> None:
    config = SparseConfig(operand="activation")
    assert config == pickle.loads(pickle.dumps(config))
    assert len({config, SparseConfig(operand="activation"), SparseConfig()}) == 2
