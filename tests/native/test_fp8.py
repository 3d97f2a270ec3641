"""The ops of fp8 in C++: the results of the CPU's ops, and when they ask Python."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from semisparse import errors, ops
from semisparse.formats.layout import FP8, SM90_8BIT
from semisparse.formats.packed import PackedFormat
from semisparse.gemm.autotune.algorithm import Choice
from semisparse.kernels import prune_pack8, sample_pack8
from semisparse.native.structures import LaunchKind
from semisparse.ops import fp8 as fp8_ops
from semisparse.ops import fp8_packed, fp8_sampling, packing, prepare
from semisparse.testing import assert_bit_equal
from tests.native.conftest import Bench
from tests.native.fp8 import BF16, OPS, PLANNED, K, M, N, arguments, codes, prepare_kernels
from tests.native.hot import POINTERS_OF_FP8, SUM_ROWS, shifted

DTYPES = [torch.float32, torch.float16, BF16]
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
Given = tuple[Any, ...]


def copied(given: Given) -> Given:
    return tuple(one.clone() if isinstance(one, Tensor) else one for one in given)


def results(name: str, call: Callable[..., Any], given: Given) -> list[Tensor]:
    """What an op returned, or wrote to its first operand."""
    found = call(*given)
    if name == "rescale_":
        assert found is None
        return [given[0]]
    return list(found) if isinstance(found, tuple) else [found]


def by_cpp(bench: Bench, name: str, given: Given) -> list[Tensor]:
    return bench.hot.natively(lambda: results(name, getattr(bench.hot.ops, name), given))


def by_python(bench: Bench, name: str, given: Given) -> list[Tensor]:
    return bench.hot.by_python(lambda: results(name, getattr(bench.hot.ops, name), given))


def assert_as_on_the_cpu(found: list[Tensor], name: str, given: Given) -> None:
    expected = results(name, getattr(ops, name), copied(given))
    for ours, wanted in zip(found, expected, strict=True):
        assert (ours.shape, ours.dtype, ours.is_contiguous()) == (wanted.shape, wanted.dtype, True)
        bytes_only = ours.dtype in (FP8, torch.uint8)
        assert_bit_equal(*((one.view(torch.uint8) if bytes_only else one + 0.0) for one in (ours, wanted)))


def assert_python_then_cpp(bench: Bench, name: str, given: Given) -> None:
    before = copied(given)
    if name != "fp8_dense_product":  # which needs nothing
        assert_as_on_the_cpu(by_python(bench, name, copied(given)), name, before)
    prepare_kernels(bench, name, given)
    guards = bench.hot.foreign.guards
    assert_as_on_the_cpu(by_cpp(bench, name, copied(given)), name, before)
    assert bench.hot.foreign.guards - guards == 1


@EACH_DTYPE
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=str)
def test_quantise(bench: Bench, wanted: tuple[bool, bool], dtype: torch.dtype) -> None:
    for rows in (1, 13, 16):
        assert_python_then_cpp(bench, "quantise", (torch.randn(rows, K).to(dtype), *wanted))
    part = torch.randn(13, 2 * K).to(dtype)[:, :K]
    prepare_kernels(bench, "quantise", (part, *wanted))
    assert_as_on_the_cpu(by_cpp(bench, "quantise", (part, *wanted)), "quantise", (part, *wanted))
    assert bench.hot.foreign.launched == [LaunchKind.LARGEST, LaunchKind.QUANTISE] * 4


@EACH_DTYPE
@pytest.mark.parametrize("mask", ["transposable", "row", "codes"])
def test_pack_and_unpack(bench: Bench, mask: str, dtype: torch.dtype) -> None:
    weight = torch.randn(N, K).to(dtype)
    held = ops.tile_codes(weight.roll(1, 0), "transposable") if mask == "codes" else None
    given = weight, "transposable" if mask == "codes" else mask, held
    assert_python_then_cpp(bench, "pack_fp8", given)
    assert_python_then_cpp(bench, "unpack_fp8", (ops.pack_fp8(*given)[0], N, K))


@pytest.mark.parametrize("algorithm", [0, None], ids=["sparse", "dense"])
@pytest.mark.parametrize("backend", ["auto", "cusparselt", "dense"])
@pytest.mark.parametrize("out_dtype", [BF16, torch.float32], ids=str)
def test_product(
    bench: Bench, out_dtype: torch.dtype, backend: str, algorithm: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = Choice(algorithm, 0, None, None, "tuned")
    monkeypatch.setattr(prepare.autotuner(), "known", lambda *_: choice)
    x8, packed, *_ = arguments("fp8_product")
    bench.hot.launch(LaunchKind.UNPACK, (None, FP8), (N, K, 0))
    sparse, dense = bench.hot.interface.started(), bench.hot.interface.started_dense()
    for tokens in (16, 48):
        x8 = codes(tokens, K)
        assert_python_then_cpp(bench, "fp8_product", (x8, packed, N, backend, out_dtype))
    by_torch = backend == "dense" or (backend == "auto" and algorithm is None)
    assert bench.hot.interface.started() - sparse == 2 * (not by_torch)
    assert bench.hot.interface.started_dense() - dense == 2 * by_torch
    assert bench.hot.foreign.multiplied == ["_scaled_mm"] * (2 * by_torch)


@EACH_DTYPE
def test_dense_product(bench: Bench, dtype: torch.dtype) -> None:
    a8, b8, a, b = codes(32, K), codes(N, K), torch.tensor(0.5), torch.tensor(4.0)
    for scales in ((), (a, b), (None, b), (a, None)):
        assert_python_then_cpp(bench, "fp8_dense_product", (a8, b8, dtype, *scales))
    assert bench.hot.foreign.multiplied == ["_scaled_mm"] * 4


@EACH_DTYPE
@pytest.mark.parametrize("bias", [*DTYPES, None], ids=str)
def test_rescale(bench: Bench, bias: torch.dtype | None, dtype: torch.dtype) -> None:
    _, *scales, _, _, _ = arguments("rescale")
    added = None if bias is None else torch.randn(N).to(bias)
    for given in (BF16, torch.float32):
        for rows in (M, 13):
            assert_python_then_cpp(bench, "rescale", (torch.randn(M, N).to(given), *scales, added, rows, dtype))
    bench.hot.forget_launches()
    assert_python_then_cpp(bench, "rescale_", (torch.randn(M, N).to(dtype), *scales, added))


OTHERS: list[tuple[str, int, Callable[[Any], Any]]] = [
    ("quantise", 0, lambda x: x.mT.contiguous().mT),
    ("quantise", 0, lambda x: torch.cat([x, x], 1)[:, :K]),
    ("quantise", 0, lambda x: x.half()),
    ("quantise", 0, lambda x: x[:12]),
    ("quantise", 0, lambda x: x[:0]),
    ("quantise", 1, lambda _: False),
    ("quantise", 2, lambda _: False),
    ("pack_fp8", 0, lambda w: w.mT.contiguous().mT),
    ("pack_fp8", 0, lambda w: w.float()),
    ("pack_fp8", 1, lambda _: "row"),
    ("pack_fp8", 2, lambda _: torch.full((N // 4, K // 4), 1, dtype=torch.int16)),
    ("unpack_fp8", 1, lambda _: 32),
    ("fp8_product", 0, lambda x8: codes(32, K)),
    ("fp8_product", 3, lambda _: "dense"),
    ("fp8_product", 4, lambda _: torch.float32),
    ("fp8_dense_product", 0, lambda a8: a8[:0]),
    ("fp8_dense_product", 1, lambda b8: b8[:13]),
    ("fp8_dense_product", 4, lambda scale: scale.double()),
    ("rescale", 0, lambda y: y.float()),
    ("rescale", 0, lambda y: y.mT.contiguous().mT),
    ("rescale", 1, lambda scale: scale.double()),
    ("rescale", 3, lambda _: None),
    ("rescale", 3, lambda bias: bias.half()),
    ("rescale", 3, lambda bias: torch.stack([bias, bias], 1)[:, 0]),
    ("rescale", 4, lambda _: 12),
    ("rescale", 5, lambda _: torch.float32),
    ("rescale_", 0, lambda y: y.float()),
    ("rescale_", 0, lambda y: y[:13]),
    ("rescale_", 3, lambda _: None),
]
"""Operands of calls that differ from a prepared one in what a kernel depends on."""


@pytest.mark.parametrize(("name", "place", "change"), OTHERS)
def test_a_call_that_differs_is_pythons(bench: Bench, name: str, place: int, change: Callable[[Any], Any]) -> None:
    given = arguments(name)
    prepare_kernels(bench, name, given)
    if name in PLANNED:
        by_python(bench, name, given)
    other = (*given[:place], change(given[place]), *given[place + 1 :])
    before = copied(other)
    assert_as_on_the_cpu([one.contiguous() for one in by_python(bench, name, other)], name, before)
    assert bench.hot.foreign.launched == []
    by_cpp(bench, name, given)


@pytest.mark.parametrize(
    ("name", "place"),
    [(name, place) for name in OPS for place, one in enumerate(arguments(name)) if isinstance(one, Tensor)],
)
def test_misaligned_operands_are_pythons(bench: Bench, name: str, place: int) -> None:
    given = arguments(name)
    prepare_kernels(bench, name, given)
    if name in PLANNED:
        by_python(bench, name, given)
    before, other = copied(given), (*given[:place], shifted(given[place]), *given[place + 1 :])
    bench.hot.asked.clear()
    if (name, place) in (("fp8_product", 1), ("fp8_sampled_product", 0)):
        with pytest.raises(errors.TensorError, match="16-byte aligned"):
            getattr(bench.hot.ops, name)(*other)
    else:
        assert_as_on_the_cpu(results(name, getattr(bench.hot.ops, name), other), name, before)
    assert (bench.hot.asked, bench.hot.foreign.launched) == ([name], [])


WRONG: list[tuple[str, int, Callable[[Any], Any], type[Exception]]] = [
    ("quantise", 0, lambda x: x.double(), errors.TensorError),
    ("quantise", 0, lambda x: x[:, :-1], errors.ShapeError),
    ("quantise", 0, lambda x: x[None], errors.ShapeError),
    ("pack_fp8", 0, lambda w: w[:48], errors.ShapeError),
    ("pack_fp8", 1, lambda _: "soft", errors.ConfigError),
    ("pack_fp8", 2, lambda _: torch.zeros(2, 2, dtype=torch.int16), errors.ShapeError),
    ("fp8_product", 1, lambda packed: packed[:-2048], errors.ShapeError),
    ("fp8_product", 3, lambda _: "fast", errors.ConfigError),
    ("fp8_product", 4, lambda _: torch.float16, errors.TensorError),
    ("fp8_dense_product", 0, lambda a8: a8.float(), errors.TensorError),
    ("fp8_dense_product", 1, lambda b8: b8.mT, errors.TensorError),
    ("fp8_dense_product", 1, lambda b8: codes(N, 32), errors.ShapeError),
    ("rescale", 3, lambda bias: bias[:16], errors.ShapeError),
    ("rescale", 4, lambda _: 17, errors.ShapeError),
    ("rescale_", 3, lambda bias: bias[:16], errors.ShapeError),
]


@pytest.mark.parametrize(("name", "place", "change", "error"), WRONG)
def test_wrong_operands_raise_pythons_typed_errors(
    bench: Bench, name: str, place: int, change: Callable[[Any], Any], error: type[Exception]
) -> None:
    given = arguments(name)
    prepare_kernels(bench, name, given)
    if name in PLANNED:
        by_python(bench, name, given)
    bench.hot.asked.clear()
    with pytest.raises(error):
        getattr(bench.hot.ops, name)(*given[:place], change(given[place]), *given[place + 1 :])
    assert (bench.hot.asked, bench.hot.foreign.launched) == ([name], [])


@pytest.mark.parametrize("name", OPS)
def test_what_is_watched_or_refused_is_pythons(bench: Bench, name: str) -> None:
    given = arguments(name)
    prepare_kernels(bench, name, given)
    if name in PLANNED:
        by_python(bench, name, given)
    own = {"fp8_dense_product": "scaled_mm", **dict.fromkeys(PLANNED, "matmul")}.get(name, "launch_kernel")
    for failing in (own, "open_guard", "current_stream"):
        bench.hot.foreign.failing.add(failing)
        assert_as_on_the_cpu(by_python(bench, name, copied(given)), name, given)
        bench.hot.foreign.failing.clear()
        by_cpp(bench, name, copied(given))
    bench.hot.interface.watch(1)
    by_python(bench, name, copied(given))
    bench.hot.interface.watch(-1)
    by_cpp(bench, name, copied(given))


def test_a_kernel_is_not_started_without_the_one_before_it(bench: Bench) -> None:
    for name, kind in (("quantise", LaunchKind.QUANTISE), ("pack_fp8", LaunchKind.PACK_FP8)):
        given = arguments(name)
        prepare_kernels(bench, name, given)
        bench.hot.forget_launches()
        sizes = (*given[0].shape, given[0].stride(0))
        mask, held = ("", given[1:]) if name == "quantise" else (given[1], (False, False))
        bench.hot.launch(kind, (BF16, None), sizes, mask, held)
        assert_as_on_the_cpu(by_python(bench, name, given), name, given)
    assert bench.hot.foreign.launched == []


def test_a_result_in_place_is_the_operand_and_has_no_autograd_state(bench: Bench) -> None:
    y, *rest = arguments("rescale_")
    prepare_kernels(bench, "rescale_", (y, *rest))
    address = y.data_ptr()
    (found,) = by_cpp(bench, "rescale_", (y, *rest))
    assert (found.data_ptr(), found.requires_grad, found.grad_fn) == (address, False, None)


def write_packed(
    weight: Tensor, _: Tensor, *into: Tensor | None, mask: str, codes: Tensor | None, scale: Tensor, **__: Any
) -> None:
    """As the pack kernel, which takes seconds in the interpreter; tests/ops/test_cuda_fp8.py runs it."""
    for buffer, result in zip((*into, scale), ops.pack_fp8(weight, mask, codes), strict=True):
        if buffer is not None:
            buffer.copy_(result)


def write_sample(
    gradient: Tensor, seed: Tensor | None, _: Tensor, rows8: Tensor | None, packed: Tensor, sums: Tensor | None,
    scales: tuple[Tensor, Tensor], **__: Any,
) -> None:  # fmt: skip
    """As the kernel that samples; tests/kernels/test_sample_pack8.py runs it."""
    dy8, sample, summed, *both = ops.sample_fp8(gradient, seed, True, torch.float32)
    for buffer, result in zip((rows8, packed, *scales), (dy8, sample, *both), strict=True):
        if buffer is not None:
            buffer.view(-1).view(torch.uint8).copy_(result.view(-1).view(torch.uint8))
    if sums is not None:
        sums.zero_()[0].copy_(summed)


@pytest.fixture
def handed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> list[LaunchKind]:
    """Launches that Python hands over while its kernels run in the interpreter; C++ gets stand-ins."""
    found: list[LaunchKind] = []

    def launch(kind: LaunchKind, _: object, pointers: Given, **what: Any) -> None:
        mask, given = what.get("mask", ""), what.get("given", (False, False))
        found.append(kind)
        facts = bench.hot.launch(kind, what["dtypes"], what["sizes"], mask, given)
        assert kind is LaunchKind.LARGEST or tuple(facts.bytes) == what.get("sizes_in_bytes", (0, 0))
        assert tuple(facts.behind) == what.get("behind", (0, 0))
        if kind in POINTERS_OF_FP8:
            there = [place for place, pointer in enumerate(pointers) if pointer is not None]
            left_out = kind is LaunchKind.SAMPLE_FP8 and what["dtypes"][1] is None
            assert there == [place for place in POINTERS_OF_FP8[kind](mask, given) if not (left_out and place == 3)]

    monkeypatch.setattr(prepare, "launch", launch)
    by_kernel = PackedFormat("kernel", SM90_8BIT, "simulated")
    for module in (packing, fp8_packed, fp8_sampling):
        monkeypatch.setattr(module, "packed_format", lambda *_: by_kernel)
    monkeypatch.setattr(prune_pack8, "launch", write_packed)
    monkeypatch.setattr(sample_pack8, "launch", write_sample)
    monkeypatch.setattr(sample_pack8, "sum_rows", lambda _: SUM_ROWS)
    in_place = {"rescale_": fp8_ops._cuda_rescale_in_place}
    modules = {"pack_fp8": fp8_packed, "unpack_fp8": fp8_packed, "sample_fp8": fp8_sampling}
    for name in ("quantise", "pack_fp8", "unpack_fp8", "rescale", "rescale_", "sample_fp8"):
        module = modules.get(name, fp8_ops)
        bench.hot.python[name] = in_place.get(name) or getattr(module, f"_cuda_{name}")
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels of CPU tensors need the interpreter")
@pytest.mark.parametrize("name", ["quantise", "pack_fp8", "unpack_fp8", "rescale", "rescale_", "sample_fp8"])
def test_an_op_finds_what_python_handed_over(bench: Bench, handed: list[LaunchKind], name: str) -> None:
    given = arguments(name)
    variants = [given]
    if name == "quantise":
        x = torch.randn(40, K)
        variants += [(x, True, False), (x.to(BF16)[:, :32], False, True)]
    elif name == "pack_fp8":
        variants += [(given[0].float(), "row", None)]
        variants += [(given[0], "transposable", ops.tile_codes(given[0], "transposable"))]
    elif name.startswith("rescale"):
        variants += [(*given[:3], None, *given[4:])]
    elif name == "sample_fp8":
        variants = [(given[0].float(), None, False, BF16), (torch.cat([given[0]] * 2, 1)[:, :N], None, False, None)]
        variants.append((torch.cat([given[0]] * 2), *given[1:]))
    for one in variants:
        by_python(bench, name, copied(one) if one[0].is_contiguous() else one)
        assert_as_on_the_cpu(by_cpp(bench, name, copied(one) if one[0].is_contiguous() else one), name, copied(one))
    kernels = {"quantise": 2, "pack_fp8": 2, "sample_fp8": 3}.get(name, 1)
    assert len(handed) == len(variants) * kernels - (name == "sample_fp8")  # one of these without a bias


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels of CPU tensors need the interpreter")
def test_what_a_kernel_reads_from_a_copy_or_does_not_do_is_not_handed_over(
    bench: Bench, handed: list[LaunchKind]
) -> None:
    x, weight = torch.randn(13, K), torch.randn(N, K)
    for matrix in (x.mT.contiguous().mT, shifted(x), torch.randn(13, K + 1)[:, :K], x[:0]):
        by_python(bench, "quantise", (matrix, True, True))
    for matrix in (weight.mT.contiguous().mT, shifted(weight)):
        by_python(bench, "pack_fp8", (matrix, "transposable", None))
    for matrix in (x.mT.contiguous().mT, shifted(x), x[:0]):
        by_python(bench, "sample_fp8", (matrix, None, True, None))
    y, scale, _, bias, _, _ = arguments("rescale")
    for rows in (y.mT.contiguous().mT, y[:0], y[:, :40]):
        by_python(bench, "rescale", (rows, scale, scale, bias[: rows.shape[1]], rows.shape[0], BF16))
    assert handed == []
