"""The ops of fp8 on a GPU: its conversion instruction, inductor's code and cuBLASLt against the specification."""

import pytest
import torch
from torch import Tensor

from semisparse import ops
from semisparse.kernels import amax, amax_many
from semisparse.ops.fp8 import _cuda_quantise
from semisparse.reference import fp8
from semisparse.testing import assert_bit_equal
from tests.ops import test_fp8

pytestmark = pytest.mark.gpu
MODERN = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
LIMITS = [float("nan"), 1e38, 448.0, 449.0, 2e-3, 1e-30]


def large() -> Tensor:
    """More blocks than programs, in both kernels, and edges."""
    return torch.randn(5003, 4128, device="cuda").bfloat16()


@test_fp8.EACH_INPUT
@pytest.mark.parametrize(("rows", "columns"), [*test_fp8.WANTED, (False, False)], ids=str)
def test_quantise_is_the_specification(make, rows: bool, columns: bool) -> None:
    x = make().cuda()
    test_fp8.assert_quantised(ops.quantise(x, rows, columns), x, rows, columns)


@pytest.mark.parametrize("native", [False, True])
def test_so_it_is_for_every_number_and_large_matrices(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    from semisparse.kernels import quantise

    monkeypatch.setattr(quantise, "native_on", lambda index: native and MODERN)
    inputs = [test_fp8.numbers_up_to(limit, dtype) for limit in LIMITS for dtype in (torch.float16, torch.bfloat16)]
    for x in (*inputs, large(), large()[:, 32:4096]):
        x = x.cuda()
        test_fp8.assert_quantised(_cuda_quantise(x, True, True), x, True, True)


def test_the_padding_of_one_row_is_zero_whatever_ran_before() -> None:
    """Triton makes a constant of a size of 1, and a compiler's fault then left the padding to what registers held."""
    x = torch.randn(1, 96, device="cuda").bfloat16()
    for value in range(1, 20):
        torch.full((2**16,), value, dtype=torch.int32, device="cuda").mul_(0x01010101)
        test_fp8.assert_quantised(ops.quantise(x, True, True), x, True, True)


@pytest.mark.skipif(not MODERN, reason="inductor's e4m3 needs capability 8.9")
def test_compiled_the_formula_gives_the_same_bits() -> None:
    compiled = test_fp8.compiled_anew(ops.quantise_formula)
    for limit in LIMITS:
        for dtype in (torch.float16, torch.bfloat16):
            x = test_fp8.numbers_up_to(limit, dtype).cuda()
            test_fp8.assert_quantised(compiled(x, True, True), x, True, True)
    for name in ("no rows", "13 rows of fp16", "50 rows of fp32", "every second column", "NaN"):
        compiled, x = test_fp8.compiled_anew(ops.quantise_formula), test_fp8.INPUTS[name]().cuda()
        test_fp8.assert_quantised(compiled(x, True, True), x, True, True)


def test_many_matrices_get_the_scales_of_each() -> None:
    matrices = [torch.randn(size, device="cuda").bfloat16() for size in ((16, 32), (300, 352))] + [large()]
    scales = torch.zeros(3, device="cuda")
    batch = amax_many.Batch(matrices, scales)
    for _ in range(2):
        batch.launch()
        expected = [1 / fp8.multiplier_for(fp8.largest_magnitude(matrix)) for matrix in matrices]
        assert_bit_equal(scales, torch.stack(expected))
        matrices[1] *= 100


def test_a_replay_reads_what_is_there_then() -> None:
    x = torch.randn(50, 64, device="cuda")
    ops.quantise(x, True, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ops.quantise(x, True, True)
    for factor in (1.0, 1000.0, float("nan")):
        x.copy_(torch.randn(50, 64) * factor)
        graph.replay()
        test_fp8.assert_quantised(found, x, True, True)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_nothing_waits_for_the_device() -> None:
    x = torch.randn(50, 64, device="cuda")
    ops.quantise(x, True, True)
    try:
        torch.cuda.set_sync_debug_mode("error")
        _, _, scale = ops.quantise(x, True, True)
        ops.rescale(x, scale, scale, None, 13, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@test_fp8.EACH_DTYPE
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_rescale_and_its_formula_round_alike(given: torch.dtype, dtype: torch.dtype, with_bias: bool) -> None:
    y = torch.randn(5008, 528, device="cuda").to(given)
    bias = torch.randn(528, device="cuda").to(dtype) if with_bias else None
    arguments = y, torch.tensor(2.0**-3, device="cuda"), torch.tensor(4.0, device="cuda"), bias, 5003, dtype
    exact = y[:5003].double() / 2 + (0 if bias is None else bias.double())
    for call in (ops.rescale, ops.rescale_formula, test_fp8.compiled_anew(ops.rescale_formula)):
        assert_bit_equal(call(*arguments), exact.float().to(dtype))


@pytest.mark.skipif(not MODERN, reason="torch._scaled_mm needs capability 8.9")
@test_fp8.EACH_DTYPE
@pytest.mark.parametrize("sizes", [(16, 32, 48), (4096, 1024, 512), (0, 32, 16), (16, 0, 16)], ids=str)
def test_the_dense_product_is_that_of_the_codes(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, reduction, columns = sizes
    a8, b8 = (test_fp8.codes_of(size, reduction).cuda() for size in (rows, columns))
    exact = a8.double() @ b8.double().mT
    assert_bit_equal(ops.fp8_dense_product(a8, b8, dtype) + 0.0, exact.to(dtype) + 0.0)
    scales = torch.tensor(0.25, device="cuda"), torch.tensor(8.0, device="cuda")
    assert_bit_equal(ops.fp8_dense_product(a8, b8, dtype, *scales) + 0.0, (exact * 2).to(dtype) + 0.0)


def test_the_largest_magnitude_is_exact_whatever_the_number_of_blocks() -> None:
    matrix = large()
    partials = torch.empty(amax.programs_for(matrix), dtype=torch.int32, device="cuda")
    for place in ((0, 0), (5002, 4127), (2500, 2063)):
        matrix[place] = 10.0 + place[0]
        amax.launch(matrix, partials)
        assert_bit_equal(partials.max().view(torch.float32), fp8.largest_magnitude(matrix))
