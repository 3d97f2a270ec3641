"""What ops/prepare.py hands to the native library, and that the next call looks for just that."""

from ctypes import addressof
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from semisparse import ops
from semisparse.formats.layout import PADDING, SM90_16BIT, compressed_bytes, packed_bytes
from semisparse.formats.packed import PackedFormat
from semisparse.gemm.autotune.algorithm import Choice
from semisparse.kernels.compiled import CompiledLaunch
from semisparse.native.structures import DTYPE_CODES, MOST_PARAMETERS, LaunchKind
from semisparse.ops import packing, prepare, products, sampling
from semisparse.testing import assert_bit_equal
from tests.native.conftest import Bench
from tests.native.test_packing import BF16, MASKS, SINGLE, arguments
from tests.native.test_products import N, call, operands

needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels of CPU tensors need the interpreter")


@pytest.fixture
def handed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> list[tuple[LaunchKind, dict[str, Any]]]:
    """Launches that Python hands over while it packs on the CPU; C++ gets stand-ins that compute the same."""
    found: list[tuple[LaunchKind, dict[str, Any]]] = []

    def launch(kind: LaunchKind, _: object, pointers: tuple[Tensor | None, ...], **what: Any) -> None:
        found.append((kind, what | {"pointers": [pointer is not None for pointer in pointers]}))
        given = what.get("given", (False, False))
        facts = bench.hot.launch(kind, what["dtypes"], what["sizes"], what.get("mask", ""), given)
        if kind is not LaunchKind.ADD_BIAS:
            assert tuple(facts.bytes) == what["sizes_in_bytes"]
            assert tuple(facts.behind) == what.get("behind", (0, 0))

    monkeypatch.setattr(prepare, "launch", launch)
    by_kernel = PackedFormat("kernel", SM90_16BIT, "simulated")
    for module in (packing, products, sampling):
        monkeypatch.setattr(module, "packed_format", lambda *_: by_kernel)
    for name in ("pack", "pack_transpose", "pack_tokens", "unpack"):
        bench.hot.python[name] = getattr(packing, f"_cuda_{name}")
    monkeypatch.setattr(products, "_cuda_pack", packing._cuda_pack)
    return found


@needs_interpreter
@pytest.mark.parametrize("mask", MASKS)
def test_pack_finds_what_pythons_pack_handed_over(bench: Bench, handed: list[Any], mask: str) -> None:
    for matrix in (torch.randn(32, 48), torch.randn(32, 64)[:, :48]):
        run = partial(bench.hot.ops.pack, matrix, BF16, *arguments(mask))
        before = bench.hot.by_python(run)
        for ours, python in zip(bench.hot.natively(run), before, strict=True):
            assert ours.numel() == python.numel()
        assert handed.pop()[0] is LaunchKind.PACK
    assert handed == []


@needs_interpreter
@pytest.mark.parametrize("mask", ["transposable", "codes"])
def test_pack_transpose_finds_what_pythons_handed_over(bench: Bench, handed: list[Any], mask: str) -> None:
    run = partial(bench.hot.ops.pack_transpose, torch.randn(32, 48), BF16, *arguments(mask))
    before = bench.hot.by_python(run)
    assert bench.hot.natively(run).numel() == before.numel()
    ((kind, what),) = handed
    assert kind is LaunchKind.PACK_TRANSPOSE and what["pointers"] == [True, mask == "codes", False, False, True]
    assert what["given"] == (mask == "codes", False)


@needs_interpreter
def test_a_sample_is_handed_over_with_what_cpp_pads_of_its_buffer(handed: list[Any]) -> None:
    packed, _ = sampling._cuda_pack_sample(torch.randn(13, 48).bfloat16(), None, False)
    ((kind, what),) = handed
    assert kind is LaunchKind.SAMPLE
    behind = packed_bytes(48, 16) - SM90_16BIT.buffer_bytes(48, 16)
    assert behind > 0 and what["behind"] == (behind, 0)
    assert packed[-behind:].tolist() == [PADDING] * behind


@needs_interpreter
def test_rows_that_a_kernel_reads_from_a_copy_are_not_handed_over(bench: Bench, handed: list[Any]) -> None:
    for matrix in (torch.randn(48, 32).mT, torch.randn(32, 49)[:, :48], torch.randn(32 * 48 + 1)[1:].view(32, 48)):
        bench.hot.by_python(partial(bench.hot.ops.pack, matrix, BF16, "transposable"))
    bench.hot.by_python(partial(bench.hot.ops.pack, torch.randn(32, 48), BF16, "greedy"))
    assert handed == []


@needs_interpreter
@pytest.mark.parametrize("tokens", [1, 13, 16])
def test_tokens_find_what_pythons_ops_handed_over(bench: Bench, handed: list[Any], tokens: int) -> None:
    x = torch.randn(tokens, 48)
    packed, _ = bench.hot.by_python(partial(bench.hot.ops.pack_tokens, x, BF16))
    bench.hot.natively(partial(bench.hot.ops.pack_tokens, x, BF16))
    rows = -(-tokens // 16) * 16
    expected = bench.hot.by_python(partial(bench.hot.ops.unpack, packed, rows, 48, BF16))
    assert_bit_equal(bench.hot.natively(partial(bench.hot.ops.unpack, packed, rows, 48, BF16)), expected)
    given = operands("packed_tokens_matmul", tokens)
    expected = bench.hot.by_python(call(bench, "packed_tokens_matmul", given))
    assert_bit_equal(bench.hot.natively(call(bench, "packed_tokens_matmul", given)), expected)
    assert [kind for kind, _ in handed] == [LaunchKind.PACK_TOKENS, LaunchKind.UNPACK, LaunchKind.ADD_BIAS]


@needs_interpreter
def test_a_layer_finds_what_its_first_call_handed_over(bench: Bench, handed: list[Any]) -> None:
    given = operands("pack_linear")
    expected = bench.hot.by_python(call(bench, "pack_linear", given))
    for ours, python in zip(bench.hot.natively(call(bench, "pack_linear", given)), expected, strict=True):
        assert ours.shape == python.shape
    assert [kind for kind, _ in handed] == [LaunchKind.PACK]


class Recorder:
    """An interface that keeps what it is given."""

    multiplies = True

    def __init__(self) -> None:
        self.products: list[tuple[Any, ...]] = []
        self.launches: list[tuple[Any, ...]] = []

    def connect(self, functions: object) -> None:
        pass

    def add_product(self, *given: Any) -> None:
        self.products.append(given)

    def add_launch(self, *given: Any) -> None:
        self.launches.append(given)

    def drop_plan(self, plan: int) -> int:
        return 0


@pytest.fixture
def recorder(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr(prepare, "_connected", lambda: made)
    monkeypatch.setattr(prepare, "_KEPT", {})
    return made


def launched(found: CompiledLaunch | str, **change: Any) -> None:
    pointers = tuple(None if n in (1, 4) else SimpleNamespace(get_device=lambda: 1) for n in range(5))
    what = {"dtypes": (SINGLE, BF16), "sizes": (32, 48, 64), "mask": "row", "given": (False, True)}
    what |= {"sizes_in_bytes": (5, 6), "behind": (3, 4)} | change
    prepare.launch(LaunchKind.PACK, SimpleNamespace(compiled=lambda *_: found), pointers, **what)  # type: ignore[arg-type]


PARAMETERS = ((0, 0), (2, 0), (3, 0), (-1, 1 << 40), (-1, 0), (-1, 0))


def test_a_launch_is_handed_over_with_all_that_cpp_needs_and_its_kernel_is_kept(recorder: Recorder) -> None:
    kernel = object()
    launched(CompiledLaunch(kernel, 1 << 45, (7, 8, 9), 128, 4096, PARAMETERS))
    ((kind, device, dtypes, mask, sizes, given, facts),) = recorder.launches
    assert (kind, device, mask, sizes, given) == (LaunchKind.PACK, 1, "row", (32, 48, 64), (False, True))
    assert dtypes == (DTYPE_CODES[SINGLE], DTYPE_CODES[BF16])
    assert (facts.function, tuple(facts.grid), facts.threads, facts.shared_bytes) == (1 << 45, (7, 8, 9), 128, 4096)
    assert (tuple(facts.bytes), tuple(facts.behind), facts.parameter_count) == ((5, 6), (3, 4), len(PARAMETERS))
    found = tuple(zip(facts.source[: facts.parameter_count], facts.value, strict=False))
    assert found == PARAMETERS
    assert list(prepare._KEPT.values()) == [kernel]


def test_what_only_triton_can_start_is_not_handed_over(recorder: Recorder) -> None:
    launched("it has num_ctas=2")
    too_many = ((-1, 0),) * (MOST_PARAMETERS + 1)
    launched(CompiledLaunch(object(), 1, (1, 1, 1), 128, 0, too_many))
    assert (recorder.launches, prepare._KEPT) == ([], {})
    launched(CompiledLaunch(object(), 1, (1, 1, 1), 128, 0, too_many[1:]))
    assert len(recorder.launches) == 1


@pytest.mark.parametrize("settings", [{"workspace": 64, "follows_bias": False}], ids=[""])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_handed_over_with_its_plan(bench: Bench, recorder: Recorder, bias: bool) -> None:
    call(bench, "packed_matmul", operands("packed_matmul", 13, bias=bias))()
    ((kind, device, dtype, sizes, has_bias, backend, facts),) = recorder.products
    (plan,) = bench.engine._local.handles[-1].plans.values()
    assert (kind, device, dtype, sizes, has_bias, backend) == (0, -1, DTYPE_CODES[BF16], (13, N, 48), bias, "auto")
    assert (facts.handle, facts.plan) == (bench.engine._local.handles[-1].handle, plan.address)
    assert (facts.descriptor, facts.bias) == (plan.descriptor, addressof(plan.bias) if bias else None)
    assert (facts.uses, facts.last_use) == (addressof(plan.uses), addressof(plan.last_use))
    assert (facts.packed_bytes, facts.workspace) == (compressed_bytes(N, 48), 64)
    assert (facts.b_rows, facts.b_columns, facts.d_rows, facts.d_columns) == (16, 48, 16, N)
    assert facts.bias_follows == 0


def test_choices_that_may_change_are_not_handed_over(
    bench: Bench, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "autotuner", lambda: SimpleNamespace(known=lambda *_: None))
    call(bench, "packed_matmul", operands("packed_matmul"))()  # tuning is off, or waits for the end of a capture
    assert recorder.products == []


@pytest.mark.parametrize(
    ("name", "a", "b", "d", "transposed"),
    [("packed_matmul", (N, 48), (16, 48), (16, N), (1, 1)),
     ("packed_tokens_matmul", (16, 48), (N, 48), (16, N), (1, 0)),
     ("packed_tokens_grad_weight", (48, 16), (16, N), (N, 48), (0, 1)),
     ("sampled_grad_weight", (N, 16), (16, 48), (N, 48), (0, 0))],
)  # fmt: skip
def test_a_masked_dense_product_is_handed_over_without_a_plan(
    bench: Bench,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    a: Any,
    b: Any,
    d: Any,
    transposed: Any,
) -> None:
    dense = Choice(None, 3, None, None, "tuned")
    for module in (prepare, products.dispatch):
        monkeypatch.setattr(module, "autotuner", lambda: SimpleNamespace(known=lambda *_: dense))
    given = operands(name, 13)
    for backend in ("auto", "dense", "cusparselt"):
        call(bench, name, given | {"backend": backend})()
    *without, with_plan = (facts for *_, facts in recorder.products)
    assert [backend for *_, backend, _ in recorder.products] == ["auto", "dense", "cusparselt"]
    for facts in (*without, with_plan):
        assert (facts.a_rows, facts.a_columns) == a
        assert (facts.b_rows, facts.b_columns) == b
        assert (facts.d_rows, facts.d_columns) == d
        assert (facts.b_transposed, facts.d_transposed) == transposed
    assert [facts.plan for facts in without] == [None, None]
    assert with_plan.plan is not None


def test_without_the_functions_of_the_library_no_product_is_handed_over(bench: Bench, recorder: Recorder) -> None:
    recorder.multiplies = False  # type: ignore[misc]
    expected = ops.packed_matmul(*operands("packed_matmul").values())
    assert_bit_equal(call(bench, "packed_matmul", operands("packed_matmul"))() + 0.0, expected + 0.0)
    assert recorder.products == []


@pytest.mark.parametrize("error", [OSError("no driver"), AttributeError("aoti_torch_create_cuda_guard")])
def test_without_cudas_functions_nothing_is_connected_and_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def refused(*_: int) -> None:
        raise error

    monkeypatch.setattr(prepare.native, "registered", lambda: True)
    monkeypatch.setattr(prepare.native, "library", Recorder)
    monkeypatch.setattr(prepare, "functions", refused)
    assert prepare._connected.__wrapped__() is None
    assert f"launches go through Python: {error}" in caplog.text
