"""A cuSPARSELt in pure Python behind the bindings' interface, on CPU memory, for tests without a GPU.

It computes real products from the addresses it is given, so a wrong shape, leading dimension, order or pointer shows as
wrong numbers; and it keeps books, so that a leak, a double free or a use after free is an error.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from semisparse.formats.layout import PADDING, packed_bytes
from semisparse.gemm import problem as problems
from semisparse.gemm.engine import Engine
from semisparse.gemm.operands import Operands
from semisparse.gemm.problem import Problem
from semisparse.gemm.runtime import CudaRuntime
from semisparse.reference import packing

DTYPES = {0: torch.float32, 2: torch.float16, 14: torch.bfloat16, 28: torch.float8_e4m3fn}
ALGORITHMS = 6


class cuSPARSELtError(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(f"cuSPARSELtError ({status})")
        self.status = status


def tensor_at(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The CPU memory at an address, as a contiguous tensor that shares it."""
    count = torch.Size(shape).numel()
    memory = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def packed_size(rows: int, columns: int, itemsize: int = 2) -> int:
    return rows * columns * itemsize // 2 + rows * columns // 8


def pack(dense: Tensor) -> Tensor:
    """Values, then two nibbles a byte, both row by row."""
    values, nibbles = packing.pack(bits(dense), dense != 0)
    pairs = nibbles.view(-1, 2)
    return torch.cat([values.view(torch.uint8).flatten(), pairs[:, 0] | pairs[:, 1] << 4])


def unpack(packed: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    size = rows * columns * dtype.itemsize // 2
    values = bits(packed[:size].view(dtype)).view(rows, columns // 2)
    pairs = packed[size:]
    nibbles = torch.stack([pairs & 15, pairs >> 4], dim=-1).view(rows, columns // 4)
    return packing.unpack(packing.Packed(values, nibbles)).view(dtype)


def bits(tensor: Tensor) -> Tensor:
    """tensor, or its bytes for an 8-bit dtype, for which PyTorch has few functions."""
    return tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor


def read_behind(address: int, begin: int, end: int) -> None:
    """Read what products of the real library read behind a packed matrix at an address: it must be padding."""
    assert bool((tensor_at(address, (end,), torch.uint8)[begin:] == PADDING).all())


class SimulatedLibrary:
    """The functions that gemm/cusparselt.py calls.

    faults: algorithm -> called with (problem sizes, D) after the product, may change D or raise.
    follows_bias: whether a finished plan heeds a bias address set later. workspace: bytes that a plan asks for.
    """

    cuSPARSELtError = cuSPARSELtError

    def __init__(self, version: int = 800, follows_bias: bool = True, workspace: int = 0) -> None:
        self.version, self.follows_bias, self.workspace = version, follows_bias, workspace
        self.split = 1, 1  # the factor of split-K and its mode
        self.faults: dict[int, Callable[[Tensor], None]] = {}
        self.refuse: dict[str, int] = {}
        self.live: dict[int, tuple[str, Any]] = {}
        self.log: list[tuple[str, int]] = []
        self.streams: list[int] = []
        self.workspaces: list[int] = []
        self.products: list[int] = []
        self.made = 0

    def _make(self, kind: str, content: Any) -> int:
        if kind in self.refuse:
            raise cuSPARSELtError(self.refuse[kind])
        self.made += 1
        self.live[1_000 + self.made] = kind, content
        return 1_000 + self.made

    def _get(self, kind: str, number: int) -> Any:
        found, content = self.live[number]
        assert found == kind, f"{number} is a {found}, not a {kind}"
        return content

    def _destroy(self, kind: str, number: int) -> None:
        self._get(kind, number)
        if f"destroy {kind}" in self.refuse:
            raise cuSPARSELtError(self.refuse[f"destroy {kind}"])
        del self.live[number]
        self.log.append((kind, number))

    def init(self) -> int:
        return self._make("handle", None)

    def destroy(self, handle: int) -> None:
        self._destroy("handle", handle)

    def get_version(self, handle: int) -> int:
        self._get("handle", handle)
        return self.version

    def get_error_name(self, status: int) -> str:
        return {2: "CUSPARSE_STATUS_ALLOC_FAILED", 10: "CUSPARSE_STATUS_NOT_SUPPORTED"}[status]

    def structured_descriptor_init(
        self, handle: int, rows: int, columns: int, ld: int, align: int, kind: int, order: int, sparsity: int
    ) -> int:
        self._get("handle", handle)
        assert (ld, align, order, sparsity) == (columns, 16, 2, 0)
        multiple = 32 // DTYPES[kind].itemsize
        if rows % multiple or columns % multiple:
            raise cuSPARSELtError(10)
        return self._make("matrix", (rows, columns, ld, kind, order))

    def dense_descriptor_init(
        self, handle: int, rows: int, columns: int, ld: int, align: int, kind: int, order: int
    ) -> int:
        self._get("handle", handle)
        assert align == 16
        multiple = 8 if DTYPES[kind].itemsize > 1 else 16
        if rows % multiple or columns % multiple:
            raise cuSPARSELtError(10)
        return self._make("matrix", (rows, columns, ld, kind, order))

    def mat_descriptor_destroy(self, matrix: int) -> None:
        self._destroy("matrix", matrix)

    def matmul_descriptor_init(
        self, handle: int, op_a: int, op_b: int, a: int, b: int, c: int, d: int, compute: int
    ) -> int:
        self._get("handle", handle)
        assert (op_a, op_b, compute, c) == (0, 0, 2, d)
        (*_, of_a, _), (*_, of_b, order_b), (*_, of_d, _) = (self._get("matrix", matrix) for matrix in (a, b, d))
        results = {28: (0, 2, 14)}.get(of_a, (of_a,))
        if of_b != of_a or of_d not in results or (of_a == 28 and order_b != 1):
            raise cuSPARSELtError(10)
        return self._make("matmul", {"matrices": (a, b, d), "bias": 0})

    def matmul_desc_set_attribute(self, handle: int, matmul: int, attribute: int, data: int, size: int) -> None:
        self._get("handle", handle)
        assert (attribute, size) == (8, 8)
        if "bias" in self.refuse:
            raise cuSPARSELtError(self.refuse["bias"])
        self._get("matmul", matmul)["bias"] = ctypes.c_size_t.from_address(data).value

    def matmul_descriptor_destroy(self, matmul: int) -> None:
        self._destroy("matmul", matmul)

    def matmul_alg_selection_init(self, handle: int, matmul: int, algorithm: int) -> int:
        self._get("handle", handle)
        has_bias = bool(self._get("matmul", matmul)["bias"])
        return self._make("selection", {"matmul": matmul, "algorithm": algorithm, "has_bias": has_bias})

    def matmul_alg_set_attribute(self, handle: int, selection: int, attribute: int, data: int, size: int) -> None:
        self._get("handle", handle)
        assert (attribute, size) == (0, 4)
        algorithm = ctypes.c_int32.from_address(data).value
        if not 0 <= algorithm < ALGORITHMS:
            raise cuSPARSELtError(10)
        self._get("selection", selection)["algorithm"] = algorithm

    def matmul_alg_get_attribute(self, handle: int, selection: int, attribute: int, data: int, size: int) -> None:
        self._get("handle", handle), self._get("selection", selection)
        assert size == 4
        ctypes.c_int32.from_address(data).value = {1: ALGORITHMS, 3: self.split[0], 4: self.split[1]}[attribute]

    def matmul_alg_selection_destroy(self, selection: int) -> None:
        self._destroy("selection", selection)

    def matmul_plan_init(self, handle: int, matmul: int, selection: int) -> int:
        self._get("handle", handle)
        chosen = self._get("selection", selection)
        assert chosen["matmul"] == matmul
        bias = self._get("matmul", matmul)["bias"]
        assert chosen["has_bias"] == bool(bias), "the selection was made for the other kind of product"
        # A plan keeps the algorithm that is set now: so does the real library (test_engine_gpu.py).
        content = {"handle": handle, "algorithm": chosen["algorithm"], "selection": selection, "matmul": matmul}
        return self._make("plan", {**content, "bias": bias})

    def matmul_plan_destroy(self, plan: int) -> None:
        self._destroy("plan", plan)

    def matmul_get_workspace(self, handle: int, plan: int) -> int:
        assert self._get("plan", plan)["handle"] == handle
        return self.workspace

    def sp_mma_compressed_size(self, handle: int, plan: int) -> tuple[int, int]:
        matmul = self._get("matmul", self._get("plan", plan)["matmul"])
        return self.sp_mma_compressed_size2(handle, matmul["matrices"][0])

    def sp_mma_compressed_size2(self, handle: int, matrix: int) -> tuple[int, int]:
        self._get("handle", handle)
        rows, columns, _, kind, _ = self._get("matrix", matrix)
        return packed_size(rows, columns, DTYPES[kind].itemsize), 64

    def sp_mma_prune_check2(
        self, handle: int, matrix: int, is_a: int, op: int, dense: int, invalid: int, stream: int
    ) -> None:
        rows, columns, _, kind, _ = self._get("matrix", matrix)
        groups = tensor_at(dense, (rows, columns // 4, 4), DTYPES[kind])
        tensor_at(invalid, (1,), torch.int32).fill_(int(((groups != 0).sum(-1) > 2).any()))

    def sp_mma_compress2(
        self, handle: int, matrix: int, is_a: int, op: int, dense: int, packed: int, scratch: int, stream: int
    ) -> None:
        rows, columns, _, kind, _ = self._get("matrix", matrix)
        tensor_at(scratch, (64,), torch.uint8).fill_(0)
        out = tensor_at(packed, (packed_size(rows, columns, DTYPES[kind].itemsize),), torch.uint8)
        out.copy_(pack(tensor_at(dense, (rows, columns), DTYPES[kind])))

    def matmul(
        self, handle: int, plan: int, alpha: int, a: int, b: int, beta: int, c: int, d: int, workspace: int,
        streams: int, count: int,
    ) -> None:  # fmt: skip
        content = self._get("plan", plan)
        assert content["handle"] == handle and count == 1 and c == d
        assert ctypes.c_float.from_address(alpha).value == 1 and ctypes.c_float.from_address(beta).value == 0
        self.streams.append(ctypes.c_size_t.from_address(streams).value)
        self.workspaces.append(workspace)
        matmul = self._get("matmul", content["matmul"])
        self._get("selection", content["selection"])
        algorithm = content["algorithm"]
        self.products.append(algorithm)
        rows, reduction, *_, kind, _ = self._get("matrix", matmul["matrices"][0])
        packed = tensor_at(a, (packed_size(rows, reduction, DTYPES[kind].itemsize),), torch.uint8)
        left = unpack(packed, rows, reduction, DTYPES[kind]).float()
        read_behind(a, packed.numel(), packed_bytes(rows, reduction, DTYPES[kind].itemsize))
        sums = left @ self._dense(matmul["matrices"][1], b).float()
        bias = matmul["bias"] if self.follows_bias else content["bias"]
        if bias:
            sums += tensor_at(bias, (rows, 1), DTYPES[kind]).float()
        out = self._dense(matmul["matrices"][2], d)
        out.copy_(sums.to(out.dtype))
        if algorithm in self.faults:
            self.faults[algorithm](out)

    def _dense(self, matrix: int, address: int) -> Tensor:
        rows, columns, ld, kind, order = self._get("matrix", matrix)
        lines = tensor_at(address, (rows, ld) if order == 2 else (columns, ld), DTYPES[kind])
        return lines[:, :columns] if order == 2 else lines[:, :rows].mT


class SimulatedRuntime(CudaRuntime):
    """The CPU as device -1, which is the index that CPU tensors report."""

    kind = "cpu"

    def __init__(self) -> None:
        self.device_now = -1
        self.exchanges: list[int] = []
        self.is_capturing = False
        self.trouble: str | None = None

    def current_device(self) -> int:
        return self.device_now

    def exchange_device(self, index: int) -> int:
        self.exchanges.append(index)
        previous, self.device_now = self.device_now, index
        return previous

    def stream(self, index: int) -> int:
        return 7_000 + index

    def device(self, index: int) -> torch.device:
        return torch.device("cpu")

    def wait(self, index: int) -> None:
        pass

    def capturing(self) -> bool:
        return self.is_capturing

    def index_of(self, device: torch.device | str | int | None) -> int | None:
        if isinstance(device, int):
            return device
        return -1 if device is None or torch.device(device).type == "cpu" else None

    def obstacle(self, index: int, capability: tuple[int, int]) -> str | None:
        return self.trouble

    def identity(self, index: int) -> dict[str, str | int]:
        return {
            "gpu": "Simulated",
            "sm_count": 1,
            "capability": "9.0",
            "driver": "1.2.3",
            "cuda": "13.0",
            "torch": "2.11.0",
            "triton": "3.6.0",
        }


def make_engine(library: SimulatedLibrary | None = None) -> tuple[Engine, SimulatedLibrary, SimulatedRuntime]:
    library, runtime = library or SimulatedLibrary(), SimulatedRuntime()
    return Engine(lambda: library, runtime), library, runtime


def two_of_four(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Random small integers, two nonzeros in each group of four."""
    picked = torch.rand(rows, columns // 4, 4).argsort(-1) < 2
    values = torch.randint(1, 4, picked.shape) * (1 - 2 * torch.randint(2, picked.shape))
    return (values * picked).to(dtype).view(rows, columns)


def operands(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """a (full matrix), b, out (NaN) and bias of small integers; b and out as they are stored."""
    a = two_of_four(problem.rows, problem.reduction, problem.dtype)
    b = torch.randint(-3, 4, problem.b_shape).to(problem.dtype)
    bias = torch.randint(-3, 4, (problem.rows,)).to(problem.dtype) if problem.bias else None
    return a, b, torch.full(problem.d_shape, float("nan"), dtype=problem.out_dtype), bias


def exact(problem: Problem, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """What the product must be, bit for bit, stored as D is; from integer operands."""
    product = a.double() @ (b if problem.b_order == "row" else b.mT).double()
    if bias is not None:
        product += bias.double()[:, None]
    return (product if problem.d_order == "row" else product.mT).to(problem.out_dtype)


PRODUCTS = {
    "forward": problems.forward(24, 32, 48, torch.bfloat16),
    "forward with bias": problems.forward(24, 32, 48, torch.float16, bias=True),
    "grad_input": problems.grad_input(24, 32, 48, torch.bfloat16),
    "activation_forward": problems.activation_forward(24, 32, 48, torch.bfloat16),
    "activation_weight": problems.activation_weight(24, 32, 48, torch.float16),
    "sampled_weight": problems.sampled_weight(24, 32, 48, torch.bfloat16),
    "fp8_forward": problems.fp8_forward(24, 32, 96, torch.bfloat16),
    "fp8_grad_input": problems.fp8_grad_input(24, 32, 96, torch.float32),
    "fp8_sampled_weight": problems.fp8_sampled_weight(24, 32, 48, torch.bfloat16),
}
FORWARD = PRODUCTS["forward"]


def run(engine: Engine, problem: Problem, algorithm: int = 0) -> None:
    """One product on fresh operands, checked bit for bit."""
    a, b, out, bias = operands(problem)
    engine.matmul(problem, algorithm, Operands(engine.compress(a), b, out, bias))
    assert torch.equal(out, exact(problem, a, b, bias))
