"""e4m3 on a real GPU with the real library: the format, exact products, masked dense, tuning."""

import pytest
import torch

from semisparse.formats.layout import FP8, SM90_8BIT, compressed_bytes
from semisparse.formats.packed import packed_format
from semisparse.gemm import dense
from semisparse.gemm import problem as problems
from semisparse.gemm.autotune.autotuner import Autotuner
from semisparse.gemm.operands import Operands
from semisparse.gemm.problem import Problem
from semisparse.reference import packing
from tests.gemm.products import FP8_PRODUCTS, product, whole

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="needs capability 8.9"
    ),
]

# Tokens, N, K: the smallest, no multiples of 64, long and short in each direction, and shapes of large layers.
SIZES = [
    (1, 32, 32), (13, 96, 160), (200, 160, 96), (1000, 32, 2048), (24, 2048, 32), (1024, 1024, 4096),
    (4104, 4096, 1024), (4096, 11008, 4096), (7, 14336, 4096),
]  # fmt: skip


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", FP8_PRODUCTS)
def test_sparse_and_masked_dense_products_of_integers_are_exact(engine, name, sizes):
    problem = FP8_PRODUCTS[name](*sizes)
    a, b, out, _ = whole(problem)
    right = product(problem, a, b, None, torch.float32).to(problem.out_dtype)
    engine.matmul(problem, 8, Operands(engine.compress(a), b, out))
    assert torch.equal(out, right)
    dense.product(problem, a, Operands(a, b, out.fill_(float("nan"))))
    assert torch.equal(out, right)
    engine.release(problem, out.get_device())


def test_a_row_major_result_is_exact(engine):
    problem = Problem(96, 160, 64, FP8, "column", "row", out_dtype=torch.bfloat16)
    a, b, out, _ = whole(problem)
    right = product(problem, a, b, None, torch.float32).to(problem.out_dtype)
    engine.matmul(problem, 0, Operands(engine.compress(a), b, out))
    assert torch.equal(out, right)
    dense.product(problem, a, Operands(a, b, out.fill_(float("nan"))))
    assert torch.equal(out, right)


@pytest.mark.parametrize(
    "shape", [(32, 32), (96, 352), (192, 160), (160, 96), (256, 256), (32, 4096), (4096, 32)], ids=str
)
def test_the_compressor_writes_the_layout_that_is_found_in_a_buffer_of_the_promised_size(engine, shape):
    """All finite codes but -0 occur."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(1, 127, shape, generator=generator) | torch.randint(2, shape, generator=generator) << 7
    kept = (torch.rand(shape, generator=generator).view(-1, 4).argsort(1) < 2).view(shape)
    pruned = torch.where(kept, codes, 0).to(torch.uint8)
    packed = engine.compress(pruned.cuda().view(FP8)).cpu()
    assert packed.numel() == compressed_bytes(*shape, 1) == engine.packed_bytes(*shape, FP8, 0)
    found = packed_format(0, FP8, engine)
    assert found.layout is not None
    assert torch.equal(packed, found.layout.encode(packing.pack(pruned, kept)))
    assert torch.equal(packing.unpack(found.layout.decode(packed, *shape, torch.uint8)), pruned)


def test_the_layout_of_sm90_is_found(engine):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs capability 9.0")
    found = packed_format(0, FP8, engine)
    assert (found.packer, found.layout) == ("kernel", SM90_8BIT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_tuning_finds_a_right_algorithm(engine, dtype):
    problem = problems.fp8_forward(4096, 4096, 2048, dtype)
    a, b, out, _ = whole(problem)
    operands = Operands(engine.compress(a), b, out)
    choice = Autotuner(engine, None, shipped=tuple).choose(
        problem, 0, operands, lambda asked, given: dense.product(asked, a, given)
    )
    assert choice.sparse_algorithm is not None
    assert choice.dense_us is not None and choice.note == ""


def test_a_captured_product_can_be_replayed(engine):
    problem = problems.fp8_forward(200, 160, 96, torch.bfloat16)
    a, b, out, _ = whole(problem)
    packed, other = engine.compress(a), whole(problem, seed=1)[1]
    calls = (
        lambda: engine.matmul(problem, 8, Operands(packed, b, out)),
        lambda: dense.product(problem, a, Operands(a, b, out)),
    )
    right = product(problem, a, other, None, torch.float32).to(problem.out_dtype)
    first = b.clone()
    for call in calls:
        b.copy_(first)
        call()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            call()
        b.copy_(other)
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, right)
