"""C++ implements the hot ops on CUDA: the bits of the Python implementations, on any thread and stream, in graphs."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from semisparse import errors, native, ops, sparsify
from semisparse.ops import packing, prepare, products, sampling
from semisparse.testing import assert_bit_equal, small_integers
from tests.support import config_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context"),
]
if not native.status().loaded and os.environ.get("SEMISPARSE_REQUIRE_NATIVE") != "1":
    pytestmark.append(pytest.mark.skip(reason=f"{native.status()}; SEMISPARSE_REQUIRE_NATIVE=1 makes this a failure"))

K, N = 512, 256
DTYPES = (torch.bfloat16, torch.float16)
BF16 = torch.bfloat16
BACKEND = "cusparselt"  # "auto" may find masked dense faster
TOKENS = (1, 7, 8, 13, 64, 200)
PYTHON = {
    "pack": packing._cuda_pack,
    "pack_transpose": packing._cuda_pack_transpose,
    "pack_tokens": packing._cuda_pack_tokens,
    "unpack": packing._cuda_unpack,
    "packed_matmul": products._cuda_packed_matmul,
    "pack_linear": products._cuda_pack_linear,
    "packed_tokens_matmul": products._cuda_packed_tokens_matmul,
    "packed_tokens_grad_weight": products._cuda_packed_tokens_grad_weight,
    "sampled_grad_weight": sampling._cuda_sampled_grad_weight,
}


def integers(*shape: int, seed: int = 0, dtype: torch.dtype = BF16) -> Tensor:
    """Products of these are exact, in any order of summation."""
    return small_integers(shape, seed=seed, dtype=dtype, device="cuda")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What Python launched and then handed over; empty for as long as C++ works alone."""
    found: list[str] = []
    for name in ("launch", "product"):
        original = getattr(prepare, name)

        def noting(kind: Any, *given: Any, original: Callable[..., None] = original, **named: Any) -> None:
            found.append(kind.name)
            original(kind, *given, **named)

        monkeypatch.setattr(prepare, name, noting)
    return found


def natively(asked: list[str], name: str, *given: Any) -> Any:
    """The result of an op that was prepared; Python must not have seen the call."""
    call = getattr(ops, name)
    call(*given)
    asked.clear()
    sparse, dense = native.started(), native.started_dense()
    result = call(*given)
    assert asked == []
    multiplies, by_torch = name not in ("pack", "pack_transpose", "pack_tokens", "unpack"), "dense" in given
    assert native.started() - sparse == (multiplies and not by_torch)
    assert native.started_dense() - dense == (multiplies and by_torch)
    return result


def held(mask: str, weight: Tensor) -> tuple[str, Tensor | None, Tensor | None]:
    if mask == "codes":
        return "transposable", ops.tile_codes(weight.roll(1, 0), "transposable"), None
    return mask, None, torch.tensor(1.1875, device="cuda") if mask == "soft" else None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", ["transposable", "row", "soft", "codes"])
def test_pack_and_unpack(asked: list[str], mask: str, stored: torch.dtype, dtype: torch.dtype) -> None:
    weight = torch.randn(N, K, device="cuda", dtype=stored)
    for matrix in (weight, torch.randn(N, 2 * K, device="cuda", dtype=stored)[:, :K]):
        given = matrix, dtype, *held(mask, weight)
        packed, packed_t = natively(asked, "pack", *given)
        expected, expected_t = packing._cuda_pack(*given)
        assert_bit_equal(packed, expected)
        if expected_t.numel():
            assert_bit_equal(packed_t, expected_t)
            assert_bit_equal(natively(asked, "pack_transpose", *given), expected_t)
        else:
            assert packed_t.numel() == 0
        unpacked = natively(asked, "unpack", packed, N, K, dtype)
        assert_bit_equal(unpacked, packing._cuda_unpack(packed, N, K, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_pack_tokens(asked: list[str], tokens: int, dtype: torch.dtype) -> None:
    x = torch.randn(tokens, K, device="cuda", dtype=dtype)
    packed, packed_t = natively(asked, "pack_tokens", x, dtype)
    expected, expected_t = packing._cuda_pack_tokens(x, dtype)
    assert_bit_equal(packed, expected)
    assert_bit_equal(packed_t, expected_t)


def arguments(name: str, tokens: int, bias: bool, dtype: torch.dtype, backend: str = BACKEND) -> tuple[Any, ...]:
    x, weight = (torch.randn(rows, K, device="cuda", dtype=dtype) for rows in (tokens, N))
    added = torch.randn(N, device="cuda", dtype=dtype) if bias else None
    if name == "packed_matmul":
        return x, ops.pack(weight, dtype, "transposable")[0], added, N, backend
    if name == "pack_linear":
        return x, weight, added, "transposable", None, None, backend
    if name == "sampled_grad_weight":
        seed = torch.tensor(-5, device="cuda") if bias else None
        return torch.randn(tokens, N, device="cuda", dtype=dtype), x, seed, bias, backend
    packed, packed_t = ops.pack_tokens(x, dtype)
    if name == "packed_tokens_matmul":
        return packed, weight, added, tokens, backend
    return packed_t, torch.randn(tokens, N, device="cuda", dtype=dtype), K, backend


@pytest.mark.parametrize("backend", [BACKEND, "dense"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(
    ("name", "bias"),
    [("packed_matmul", True), ("packed_matmul", False), ("pack_linear", True), ("pack_linear", False),
     ("packed_tokens_matmul", True), ("packed_tokens_matmul", False), ("packed_tokens_grad_weight", False),
     ("sampled_grad_weight", True), ("sampled_grad_weight", False)],
)  # fmt: skip
def test_products(asked: list[str], name: str, bias: bool, tokens: int, dtype: torch.dtype, backend: str) -> None:
    given = arguments(name, tokens, bias, dtype, backend)
    found, expected = natively(asked, name, *given), PYTHON[name](*given)
    if name == "pack_linear":
        assert_bit_equal(found[1], expected[1])
        found, expected = found[0], expected[0]
    if name == "sampled_grad_weight":
        assert_bit_equal(found[1], expected[1])
        found, expected = found[0], expected[0]
    assert_bit_equal(found, expected)


def test_strided_and_higher_dimensional_tokens(asked: list[str]) -> None:
    _, packed, bias, *rest = arguments("packed_matmul", 24, True, BF16)
    for x in (integers(2, 3, 4, K), integers(K, 24).mT, integers(24, 2 * K)[:, :K]):
        found = natively(asked, "packed_matmul", x, packed, bias, *rest)
        assert_bit_equal(found, products._cuda_packed_matmul(x, packed, bias, *rest))


def test_two_layers_of_one_shape_add_their_own_biases(asked: list[str]) -> None:
    x, packed, first, *rest = arguments("packed_matmul", 64, True, BF16)
    second = first + 1
    expected = [products._cuda_packed_matmul(x, packed, bias, *rest) for bias in (first, second)]
    natively(asked, "packed_matmul", x, packed, first, *rest)
    for turn in (0, 1, 1, 0, 1):
        assert_bit_equal(ops.packed_matmul(x, packed, (first, second)[turn], *rest), expected[turn])


def test_it_runs_on_the_current_stream(asked: list[str]) -> None:
    """Only there does it see what was written just before."""
    weight, bias = integers(N, K), integers(N)
    new = integers(64, K, seed=3)
    expected = products._cuda_pack_linear(new, weight, bias, "transposable", None, None, BACKEND)[0]
    x = integers(64, K, seed=4)
    natively(asked, "pack_linear", x, weight, bias, "transposable", None, None, BACKEND)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        x.copy_(new)
        found = ops.pack_linear(x, weight, bias, "transposable", None, None, BACKEND)[0]
    assert asked == []
    side.synchronize()
    assert_bit_equal(found, expected)


def test_each_thread_prepares_its_own_plan_and_then_starts_it(asked: list[str]) -> None:
    given = arguments("packed_matmul", 64, True, BF16)
    expected = natively(asked, "packed_matmul", *given)
    seen: list[tuple[list[str], Tensor]] = []

    def work() -> None:
        for _ in range(2):
            asked.clear()
            y = ops.packed_matmul(*given)
            torch.cuda.synchronize()
            seen.append((list(asked), y))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [names for names, _ in seen] == [["WEIGHT"], []]
    for _, y in seen:
        assert_bit_equal(y, expected)
    asked.clear()
    assert_bit_equal(ops.packed_matmul(*given), expected)  # the other thread's plans were freed, and not this one's
    assert asked == []


def layers(operand: str) -> torch.nn.Sequential:
    """Two linears with small-integer weights."""
    net = torch.nn.Sequential(torch.nn.Linear(K, N), torch.nn.ReLU(), torch.nn.Linear(N, K)).to("cuda", BF16)
    with torch.no_grad():
        for seed, parameter in enumerate(net.parameters()):
            parameter.copy_(integers(*parameter.shape, seed=seed))
    sparsify(net, config_of(operand, backend=BACKEND))
    return net


def step(net: torch.nn.Module, call: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> list[Tensor]:
    net.zero_grad(set_to_none=True)
    y = call(x)
    y.backward(grad)
    return [y.detach().clone(), *(p.grad.clone() for p in net.parameters())]


@pytest.mark.parametrize("operand", ["weight", "activation"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_training_step_asks_nothing_of_python_and_keeps_its_bits(
    asked: list[str], operand: str, compiled: bool
) -> None:
    """The backward runs on autograd's own thread."""
    torch._dynamo.reset()
    net, x, grad = layers(operand), integers(200, K, seed=7).requires_grad_(), integers(200, K, seed=8)
    expected = step(net, net, x, grad)
    call = torch.compile(net, fullgraph=True) if compiled else net
    for _ in range(2):
        step(net, call, x, grad)
    asked.clear()
    before = native.started()
    found = step(net, call, x, grad)
    assert asked == []
    assert native.started() - before >= 4  # two forward products, and at least one in each layer's backward
    for ours, first in zip(found, expected, strict=True):
        assert_bit_equal(ours, first)
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", [BACKEND, "dense"])
def test_a_prepared_step_replays_from_a_cuda_graph(asked: list[str], backend: str) -> None:
    weight, bias, x = integers(N, K), integers(N), integers(64, K)
    given = weight, bias, "transposable", None, None, backend
    natively(asked, "pack_linear", x, *given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.pack_linear(x, *given)[0]
    assert asked == []
    for seed in range(3):
        x.copy_(integers(64, K, seed=seed))
        weight.copy_(integers(N, K, seed=seed + 9))
        torch.empty(1 << 24, device="cuda").normal_()  # another user of freed memory
        graph.replay()
        assert_bit_equal(captured, products._cuda_pack_linear(x, *given)[0])


def run(program: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | variables, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


UNPREPARED = """
import torch
from semisparse import native, ops
weight = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
said = []
try:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        try:
            ops.pack(weight, torch.bfloat16, "transposable")
        except Exception as error:
            said.append(f"{native.status().loaded} {type(error).__name__}")
except Exception:
    pass  # of the broken capture
print(*said)
"""


def test_nothing_prepared_under_capture_is_an_engine_error() -> None:
    assert run(UNPREPARED) == "True EngineError"


@pytest.mark.parametrize(
    ("name", "place", "change", "error"),
    [
        ("packed_matmul", 1, lambda packed: packed.cpu(), errors.TensorError),
        ("packed_matmul", 1, lambda packed: packed[:-2048], errors.ShapeError),
        ("packed_matmul", 1, lambda packed: packed.view(torch.int8), errors.TensorError),
        ("packed_matmul", 0, lambda x: x.float(), errors.TensorError),
        ("packed_matmul", 2, lambda bias: bias[:16], errors.ShapeError),
        ("packed_matmul", 2, lambda bias: bias.half(), errors.TensorError),
        ("packed_matmul", 2, lambda bias: bias.cpu(), errors.TensorError),
        ("packed_matmul", 4, lambda _: "fast", errors.ConfigError),
        ("pack_linear", 1, lambda weight: weight[:30], errors.ShapeError),
        ("pack_linear", 3, lambda _: "none", errors.ConfigError),
        ("packed_tokens_matmul", 0, lambda packed: packed[:-2048], errors.ShapeError),
        ("packed_tokens_grad_weight", 0, lambda packed: packed[:-2048], errors.ShapeError),
        ("sampled_grad_weight", 1, lambda x: x[:8], errors.ShapeError),
        ("sampled_grad_weight", 2, lambda seed: seed.cpu(), errors.TensorError),
    ],
)
def test_wrong_operands_of_prepared_calls_raise_typed_errors(
    asked: list[str], name: str, place: int, change: Callable[[Any], Any], error: type[Exception]
) -> None:
    given = list(arguments(name, 64, True, BF16))
    natively(asked, name, *given)
    with pytest.raises(error) as raised:
        getattr(ops, name)(*given[:place], change(given[place]), *given[place + 1 :])
    assert type(raised.value) is error
    natively(asked, name, *given)
    torch.cuda.synchronize()


def test_out_of_memory_stays_its_own_error(asked: list[str]) -> None:
    packed = ops.pack(torch.ones(4096, 4096, device="cuda", dtype=BF16), BF16, "transposable")[0]
    natively(asked, "unpack", packed, 4096, 4096, BF16)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            [ops.unpack(packed, 4096, 4096, BF16) for _ in range(8)]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    natively(asked, "unpack", packed, 4096, 4096, BF16)


SUMS = """
import torch
from semisparse import SparseConfig, native, sparsify
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(512, 256), torch.nn.GELU(), torch.nn.Linear(256, 512)).cuda().bfloat16()
sparsify(net, SparseConfig(backend="cusparselt"))
for _ in range(3):
    x = torch.randn(100, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    net(x).square().mean().backward()
found = [x.grad, *(p.grad for p in net.parameters())]
print(native.status().loaded, native.started() > 0, *(f"{t.double().sum().item():.17e}" for t in found))
"""


def test_training_without_the_library_gives_the_same_numbers(tmp_path: Path) -> None:
    """Both follow the choices of algorithms that the first one writes to disk."""
    cache = {"XDG_CACHE_HOME": str(tmp_path)}
    in_cpp, in_python = (run(SUMS, SEMISPARSE_NATIVE=value, **cache).split() for value in ("1", "0"))
    assert in_cpp[:2] == ["True", "True"]
    assert in_python[:2] == ["False", "False"]
    assert in_cpp[2:] == in_python[2:]
