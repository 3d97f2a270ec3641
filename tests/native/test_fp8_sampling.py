"""The sampled weight gradient in fp8 in C++: sample, product, and which of the two ways is started."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from semisparse import ops
from semisparse.formats.layout import FP8
from semisparse.gemm.autotune.algorithm import Choice
from semisparse.gemm.autotune.ways import SAMPLED
from semisparse.gemm.weight_gradient import WeightGradient
from semisparse.native.structures import LaunchKind
from semisparse.ops import prepare
from semisparse.ops.fp8_packed import sums_dtype
from semisparse.testing import small_integers
from tests.native.conftest import Bench
from tests.native.fp8 import BF16, K, N, arguments, codes, prepare_kernels, prepare_sample
from tests.native.test_fp8 import EACH_DTYPE, assert_as_on_the_cpu, assert_python_then_cpp, by_cpp, by_python

SEED, SCALE = torch.tensor(-7), torch.tensor(0.25)
SAMPLING = [LaunchKind.LARGEST, LaunchKind.SAMPLE_FP8]


def gradient_of(tokens: int, dtype: torch.dtype = BF16) -> Tensor:
    return small_integers((tokens, N), limit=4, dtype=dtype)


@EACH_DTYPE
@pytest.mark.parametrize(
    ("seed", "rows", "bias"), [(SEED, True, torch.float32), (None, False, BF16), (SEED, True, None)]
)
def test_sample(bench: Bench, seed: Tensor | None, rows: bool, bias: torch.dtype | None, dtype: torch.dtype) -> None:
    for tokens in (1, 20, 32):
        assert_python_then_cpp(bench, "sample_fp8", (gradient_of(tokens, dtype), seed, rows, bias))
    part = torch.cat([gradient_of(20, dtype)] * 2, 1)[:, :N], seed, rows, bias
    prepare_kernels(bench, "sample_fp8", part)
    assert_as_on_the_cpu(by_cpp(bench, "sample_fp8", part), "sample_fp8", part)
    summing = [] if bias is None else [LaunchKind.SUM_ROWS]
    assert bench.hot.foreign.launched == [*SAMPLING, *summing] * 4


@pytest.mark.parametrize("algorithm", [0, None], ids=["sparse", "dense"])
@pytest.mark.parametrize("backend", ["auto", "cusparselt", "dense"])
@pytest.mark.parametrize("out_dtype", [BF16, torch.float32], ids=str)
def test_product(
    bench: Bench, out_dtype: torch.dtype, backend: str, algorithm: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = Choice(algorithm, 0, None, None, "tuned")
    monkeypatch.setattr(prepare.autotuner(), "known", lambda *_: choice)
    for tokens in (32, 64):
        packed = ops.sample_fp8(gradient_of(tokens), SEED, False, None)[1]
        bench.hot.launch(LaunchKind.UNPACK, (None, FP8), (N, tokens, 0))
        assert_python_then_cpp(bench, "fp8_sampled_product", (packed, codes(K, tokens), N, backend, out_dtype))
    by_torch = backend == "dense" or (backend == "auto" and algorithm is None)
    assert bench.hot.foreign.multiplied == ["_scaled_mm"] * (2 * by_torch)


def test_tokens_that_python_pads_stay_with_python(bench: Bench) -> None:
    packed = ops.sample_fp8(gradient_of(40), SEED, False, None)[1]
    given = packed, codes(K, 48), N, "auto", BF16
    for _ in range(2):
        assert_as_on_the_cpu(by_python(bench, "fp8_sampled_product", given), "fp8_sampled_product", given)
    call = gradient_of(40), codes(K, 48), SCALE, SEED, True, BF16, "cusparselt", BF16
    prepare_kernels(bench, "fp8_sampled_grad_weight", call)
    for _ in range(2):
        assert_as_on_the_cpu(by_python(bench, "fp8_sampled_grad_weight", call), "fp8_sampled_grad_weight", call)


NAME = "fp8_sampled_grad_weight"


def prepare_both(bench: Bench, given: tuple[Any, ...]) -> None:
    """All kernels of both ways."""
    dy, x8t, _, seed, rows, bias, _, dtype = given
    prepare_sample(bench, dy, seed is not None, rows, bias)
    bench.hot.launch(LaunchKind.QUANTISE, (dy.dtype, None), (*dy.shape, dy.stride(0)), given=(rows, True))
    bench.hot.launch(LaunchKind.RESCALE, (sums_dtype(dtype), dtype), (N, x8t.shape[0], 0))


def choose(bench: Bench, monkeypatch: pytest.MonkeyPatch, sampled: bool) -> None:
    """The autotuner's choice of the way; of products it is as the bench has it."""
    way, product = replace(SAMPLED, algorithm=0 if sampled else None), Choice(0, 0, None, None, "tuned")
    known = lambda asked, _: way if isinstance(asked, WeightGradient) else product  # noqa: E731
    monkeypatch.setattr(prepare.autotuner(), "known", known)


@EACH_DTYPE
@pytest.mark.parametrize("backend", ["auto", "cusparselt"])
@pytest.mark.parametrize(("seed", "rows", "bias"), [(SEED, True, torch.float32), (None, False, None)])
def test_sampled_gradients(
    bench: Bench, seed: Tensor | None, rows: bool, bias: torch.dtype | None, backend: str, dtype: torch.dtype
) -> None:
    for tokens in (20, 32):
        for out_dtype in (dtype, BF16):
            given = gradient_of(tokens, dtype), codes(K, 32), SCALE, seed, rows, bias, backend, out_dtype
            prepare_both(bench, given)
            bench.hot.ops.fp8_sampled_grad_weight(*given)  # prepared by Python, or as the call before
            assert_as_on_the_cpu(by_cpp(bench, NAME, given), NAME, given)
    assert set(bench.hot.foreign.launched) >= {*SAMPLING, LaunchKind.RESCALE}
    assert bench.hot.foreign.multiplied == []


@EACH_DTYPE
@pytest.mark.parametrize(("rows", "bias"), [(True, torch.float32), (False, None)])
def test_gradients_without_a_sample(
    bench: Bench, rows: bool, bias: torch.dtype | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(bench, monkeypatch, sampled=False)
    for tokens, padded in ((20, 32), (32, 32), (40, 48)):
        for out_dtype in (dtype, torch.float16):
            given = (
                gradient_of(tokens, dtype).requires_grad_(),
                codes(K, padded),
                SCALE,
                SEED,
                rows,
                bias,
                "auto",
                out_dtype,
            )
            prepare_both(bench, given)
            bench.hot.ops.fp8_sampled_grad_weight(*given)
            expected = bench.hot.python[NAME](*given)
            bench.hot.foreign.launched.clear()
            bench.hot.foreign.multiplied.clear()
            found = by_cpp(bench, NAME, given)
            assert bench.hot.foreign.launched == [LaunchKind.LARGEST, LaunchKind.QUANTISE]
            assert bench.hot.foreign.multiplied == ["_scaled_mm"]
            for ours, wanted in zip(found, expected, strict=True):
                assert (ours.shape, ours.dtype, ours.requires_grad) == (wanted.shape, wanted.dtype, False)
                assert torch.equal(ours.float(), wanted.float())


def test_the_way_of_another_call_is_not_taken(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(bench, monkeypatch, sampled=False)
    given = arguments(NAME)
    changes: list[tuple[int, Any]] = [
        (0, gradient_of(20, torch.float16)), (0, gradient_of(24)), (5, None), (6, "cusparselt"), (7, torch.float16)
    ]  # fmt: skip
    others = [(*given[:place], other, *given[place + 1 :]) for place, other in changes]
    for one in (given, *others):
        prepare_both(bench, one)
    by_python(bench, NAME, given)
    for other in others:
        by_python(bench, NAME, other)
    for one in (given, *others):
        by_cpp(bench, NAME, one)


def test_a_choice_that_changes_is_followed_and_one_that_may_change_is_not_handed_over(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(NAME)
    prepare_both(bench, given)
    for sampled in (False, True, False):
        choose(bench, monkeypatch, sampled)
        bench.hot.interface.forget_products()
        by_python(bench, NAME, given)
        bench.hot.foreign.launched.clear()
        by_cpp(bench, NAME, given)
        assert (LaunchKind.SAMPLE_FP8 in bench.hot.foreign.launched) is sampled
    bench.hot.interface.forget_products()
    monkeypatch.setattr(prepare, "autotuner", lambda: prepare)  # whose `known` is not the one that was followed
    monkeypatch.setattr(prepare, "known", lambda *_: None, raising=False)
    for _ in range(2):
        by_python(bench, NAME, given)


@pytest.mark.parametrize(
    "missing", [LaunchKind.LARGEST, LaunchKind.SAMPLE_FP8, LaunchKind.SUM_ROWS, LaunchKind.RESCALE]
)
def test_without_one_of_its_kernels_a_call_is_pythons(
    bench: Bench, missing: LaunchKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(NAME)
    real = bench.hot.launch
    monkeypatch.setattr(bench.hot, "launch", lambda kind, *rest, **what: kind is missing or real(kind, *rest, **what))
    prepare_both(bench, given)
    for _ in range(2):
        assert_as_on_the_cpu(by_python(bench, NAME, given), NAME, given)
