"""Each path is right here, and a path that is wrong is found."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from semisparse import functional, ops
from semisparse.reference import mvue
from semisparse.selfcheck import drawing
from semisparse.selfcheck.numerics import check_paths, checked, setting_of
from semisparse.selfcheck.operands import Setting
from semisparse.selfcheck.paths import NotHere, paths

CPU = setting_of(torch.device("cpu"))
NEEDS_A_GPU = {
    "2:4, packing per step",
    "fp8 + 2:4, normal numbers",
    "fp8: packed weight",
    "native launches, 2:4 + mvue",
    "native launches, fp8 + 2:4",
}


@pytest.mark.parametrize("name", paths())
def test_on_the_cpu_each_path_is_right_or_says_what_it_needs(name: str) -> None:
    check = checked(name, paths()[name], CPU)
    assert check.outcome == ("skipped" if name in NEEDS_A_GPU else "pass"), check
    assert bool(check.reason) == (name in NEEDS_A_GPU)


def wrong_mask(original: Callable[..., Tensor], matrix: Tensor, *args: Any) -> Tensor:
    """2:4 along both axes, and not the best."""
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]], dtype=torch.bool)
    return torch.where(mask.repeat(matrix.shape[0] // 4, matrix.shape[1] // 4), matrix, 0).to(args[0])


def dense(original: Callable[..., Tensor], matrix: Tensor, *args: Any) -> Tensor:
    return matrix.to(args[0])


@pytest.mark.parametrize(("name", "defect"), [
    ("mask: transposable", wrong_mask), ("mask: transposable", dense), ("mask: row", wrong_mask), ("mask: row", dense),
])  # fmt: skip
def test_a_wrong_mask_is_found(monkeypatch: pytest.MonkeyPatch, name: str, defect: Any) -> None:
    original = ops.prune
    monkeypatch.setattr(ops, "prune", lambda *args: defect(original, *args))
    assert checked(name, paths()[name], CPU).outcome == "fail"


@pytest.mark.parametrize("name", ["2:4, bf16", "2:4, mask row, bf16", "2:4 + mvue, bf16", "fp8 dense", "fp8 + 2:4"])
def test_a_layer_that_is_off_by_a_percent_is_found(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    original = functional.semi_sparse_linear
    monkeypatch.setattr(functional, "semi_sparse_linear", lambda *args, **how: original(*args, **how) * 1.01)
    assert checked(name, paths()[name], CPU).outcome == "fail"


def test_a_result_that_is_not_finite_is_wrong_and_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    original = functional.semi_sparse_linear
    monkeypatch.setattr(functional, "semi_sparse_linear", lambda *args, **how: original(*args, **how) * torch.nan)
    check = checked("2:4, bf16", paths()["2:4, bf16"], CPU)
    assert (check.outcome, check.error) == ("fail", None) and "not finite" in check.reason


@pytest.mark.parametrize("name", ["mvue: mean of draws", "fp8 + mvue: mean of draws"])
def test_a_biased_sampler_is_found(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    original = mvue.as_uniforms
    monkeypatch.setattr(mvue, "as_uniforms", lambda words: original(words) * 0.75)
    assert checked(name, paths()[name], CPU).outcome == "fail"


def test_what_is_allowed_of_a_mean_shrinks_with_the_draws_and_is_zero_for_zeros() -> None:
    dy = torch.randn(64, 8).to(torch.bfloat16)
    dy[:4] = 0
    few, many = (drawing.allowed_errors(dy, draws, False) for draws in (16, 1600))
    assert bool((many[4:] < few[4:] / 8).all()) and not few[:4].any()


def test_what_raises_is_recorded_with_its_type_and_the_rest_is_checked() -> None:
    def raising(setting: Setting) -> Any:
        raise RuntimeError("first\nsecond")

    def missing(setting: Setting) -> Any:
        raise NotHere("there is none")

    found: list[Any] = []
    which = {"a": raising, "b": missing, "c": paths()["fp8 dense"], "d": raising}
    late = iter(["", "", "", "spent"])
    check_paths(CPU, lambda: next(late), lambda line: None, found.append, which)
    assert [(one.name, one.outcome, one.reason) for one in found] == [
        ("a", "raised", "RuntimeError: first"),
        ("b", "skipped", "there is none"),
        ("c", "pass", ""),
        ("d", "skipped", "spent"),
    ]
