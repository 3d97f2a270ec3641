"""The sparse engine: 2:4 products and NVIDIA's compressor on tensors, for ops and the autotuner. On cusparselt.py.

Nothing here owns device memory. Outputs come from the caller and workspaces from PyTorch's allocator, per call, on the
current stream: a cached workspace would live in a CUDA graph's pool and be overwritten by its replays. A captured
product replays the addresses of that call, the bias's included, so a captured bias must be the module's parameter or
live in the graph's own memory pool.

Handles and plans belong to one thread (autograd runs backward passes on another one), so nothing is locked per call.
"""

import atexit
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from semisparse import native
from semisparse.errors import EngineError, ShapeError, TensorError
from semisparse.forks import renewed_in_children
from semisparse.formats import layout
from semisparse.formats.layout import ALIGNMENT, FP8, PACKED_DTYPES, sparse_multiple
from semisparse.gemm import cusparselt
from semisparse.gemm.cusparselt import Availability, Handle, Plan
from semisparse.gemm.operands import Operands, misfit
from semisparse.gemm.problem import Problem
from semisparse.gemm.runtime import CudaRuntime

logger = logging.getLogger(__name__)


class Engine:
    """cuSPARSELt on any number of devices and threads. One object per process: `engine()`.

    Args:
        load: Returns the bindings.
        runtime: CUDA, as far as this class uses it. Tests inject fakes for both.
    """

    MAX_PLANS = 256
    """Plans kept per device and thread. A plan is host memory only."""

    def __init__(self, load: Callable[[], Any] = cusparselt.load_bindings, runtime: CudaRuntime | None = None) -> None:
        self._load = load
        self.runtime = runtime or CudaRuntime()
        self._local = threading.local()
        self._lock = threading.Lock()
        renewed_in_children(self, "_lock", threading.Lock)
        self._verdicts: dict[int, Availability] = {}
        self._follows: dict[int, bool] = {}
        self.multiplied = False
        """Whether a product was started by Python since the process began, one of tuning, too."""
        self.python_products = 0
        """As products, without those that the native library started."""

    @property
    def products(self) -> int:
        """Sparse products started, or recorded in a CUDA graph, since the process began, without those of tuning."""
        return self.python_products + native.started()

    def available(self, device: torch.device | str | int | None = None) -> Availability:
        """Whether the engine can be used on a device, and the reason. Never raises.

        The first call for a device starts CUDA on it and loads the library; later calls repeat the answer.

        Args:
            device: Default: the current one.
        """
        try:
            index = self.runtime.index_of(device)
            if index is None:
                return Availability(False, f"device {device} is not a CUDA device")
            with self._lock:
                if index not in self._verdicts:
                    self._verdicts[index] = self._probe(index)
                    logger.info("sparse engine on device %d: %s", index, self._verdicts[index])
                return self._verdicts[index]
        except Exception as error:
            return Availability(False, f"{type(error).__name__}: {error}")

    def _probe(self, index: int) -> Availability:
        if obstacle := self.runtime.obstacle(index, cusparselt.MIN_CAPABILITY):
            return Availability(False, obstacle)
        with self._on(index):
            return cusparselt.probe(self._load)

    def matmul(self, problem: Problem, algorithm: int, operands: Operands) -> None:
        """D = A B (+ bias) on the current stream of the operands' device. Asynchronous; keeps no reference to a tensor.

        Args:
            problem: The product.
            algorithm: As the autotuner chose it; each id sums in its own order. Sums in fp32, rounded once.
            operands: The tensors; out is written.

        Raises:
            TensorError, ShapeError: A tensor does not fit.
            EngineError: The engine cannot be used here, or the library refuses.
        """
        packed, b, out, bias = operands
        index = out.get_device()
        if self.runtime.current_device() != index:
            if out.device.type != self.runtime.kind:
                raise TensorError(f"out is on {out.device}; sparse products need tensors on a CUDA device")
            with self._on(index):
                self.matmul(problem, algorithm, operands)
            return
        try:
            handle: Handle = self._local.handles[index]
        except (AttributeError, KeyError):
            handle = self._open(index)
        if (bias is not None) != problem.bias:
            raise misfit(problem, 0, operands)
        address = 0 if bias is None else bias.data_ptr()
        key = (problem, algorithm)
        plan = handle.plans.get(key)
        if plan is None:
            plan = handle.make_plan(problem, algorithm, address)
            self.multiplied = True
        plan.use()
        a_at, b_at, d_at, dtype = packed.data_ptr(), b.data_ptr(), out.data_ptr(), problem.dtype
        if not (
            packed.numel() >= plan.packed_bytes
            and b.shape == plan.b_shape
            and out.shape == plan.d_shape
            and packed.dtype is torch.uint8
            and b.dtype is dtype
            and out.dtype is problem.out_dtype
            and packed.get_device() == index
            and b.get_device() == index
            and packed.is_contiguous()
            and b.is_contiguous()
            and out.is_contiguous()
            and not (a_at | b_at | d_at | address) % ALIGNMENT
        ):
            raise misfit(problem, plan.packed_bytes, operands)
        if bias is not None:
            fits = bias.numel() == problem.rows and bias.dtype is dtype
            if not (fits and bias.is_contiguous() and bias.get_device() == index):
                raise misfit(problem, plan.packed_bytes, operands)
            if plan.bias.value != address:
                plan = self._rebind(index, handle, key, plan, address)
        if plan.workspace:
            scratch = torch.empty(plan.workspace, dtype=torch.uint8, device=out.device)
            handle.multiply(plan, a_at, b_at, d_at, scratch.data_ptr(), self.runtime.stream(index))
        else:
            handle.multiply(plan, a_at, b_at, d_at, 0, self.runtime.stream(index))

    def prepared(self, problem: Problem, algorithm: int, index: int) -> tuple[Handle, Plan, bool] | None:
        """The calling thread's plan of a product that it started before.

        Args:
            problem: The product.
            algorithm: Of the plan.
            index: Of the device.

        Returns:
            The handle, the plan, and whether the plan follows a new bias address; None if there is no plan.
        """
        handle: Handle | None = self._local.__dict__.get("handles", {}).get(index)
        plan = None if handle is None else handle.plans.get((problem, algorithm))
        if handle is None or plan is None:
            return None
        with self._on(index):
            return handle, plan, problem.bias and self._bias_follows(index)

    def _rebind(self, index: int, handle: Handle, key: tuple[Problem, int], plan: Plan, address: int) -> Plan:
        """A plan for the same product that adds the bias at another address."""
        if self._bias_follows(index):
            handle.set_bias(plan, address)
            return plan
        return handle.make_plan(*key, address)

    def _bias_follows(self, index: int) -> bool:
        """Whether a finished plan follows a bias address that is set after it was built.

        The library does not document it, so it is tried once per device, on a product of zeros. The trial waits for the
        device. Under capture, where that is forbidden, the answer is no: the plan is then built again, which is safe.
        """
        if index not in self._follows:
            if self.runtime.capturing():
                return False
            problem, handle = Problem(64, 64, 64, torch.float16, bias=True), self._handle(index)
            zeros = torch.zeros(64, 64, dtype=torch.float16, device=self.runtime.device(index))
            packed, out, ones = self.compress(zeros, check=False), torch.empty_like(zeros), torch.ones_like(zeros[0])
            twos = ones + 1
            plan = handle.make_plan(problem, 0, ones.data_ptr())
            handle.set_bias(plan, twos.data_ptr())
            self.matmul(problem, 0, Operands(packed, zeros, out, twos))
            handle.drop(problem, None)
            self._follows[index] = bool((out == twos[0]).all())
        return self._follows[index]

    def algorithms(self, problem: Problem, index: int) -> range:
        """Algorithm ids that the library offers for a problem on a device. Host work only. Raises EngineError."""
        with self._on(index):
            return self._handle(index).algorithms(problem)

    def share(self, problem: Problem, index: int, bias: Tensor | None = None) -> Callable[[], None]:
        """Make many plans of a problem fast in the calling thread, such as one per algorithm (Handle.share).

        Args:
            problem: Of the plans.
            index: Of the device.
            bias: Of one of the products, which may each have another; None where the problem has none.

        Returns:
            What ends it, called in the same thread; not to be called where the CUDA context is lost.

        Raises:
            EngineError: The engine cannot be used here, or the library refuses.
        """
        with self._on(index):
            handle = self._handle(index)
            try:
                right = not problem.bias or self._bias_follows(index)
            except torch.OutOfMemoryError:
                right = False
            if not right or not handle.share(problem, 0 if bias is None else bias.data_ptr()):
                return lambda: None

        def end() -> None:
            with self._on(index):
                handle.unshare(problem)

        return end

    def packed_bytes(self, rows: int, columns: int, dtype: torch.dtype, index: int) -> int:
        """Bytes of a packed rows x columns matrix, metadata and its padding included. Raises EngineError."""
        with self._on(index), self._handle(index).matrix(rows, columns, dtype) as (_, packed, _scratch):
            return packed

    def compress(self, dense: Tensor, check: bool = True) -> Tensor:
        """Pack a 2:4 matrix with NVIDIA's compressor.

        Args:
            dense: rows x columns, contiguous, float16, bfloat16 or float8_e4m3fn, at most two nonzeros per group of
                four along the columns.
            check: Verify that first, which waits for the device; unchecked, another matrix gives garbage.

        Returns:
            A new uint8 buffer; bytes that the compressor does not write are padding.

        Raises:
            ShapeError: The sizes do not fit, or the check failed.
            TensorError: Device, dtype or memory layout do not fit.
            EngineError: The engine cannot be used here, or the library refuses.
        """
        rows, columns = _check_matrix(dense, self.runtime.kind)
        index, device = dense.get_device(), dense.device
        with self._on(index):
            handle, stream = self._handle(index), self.runtime.stream(index)
            with handle.matrix(rows, columns, dense.dtype) as (matrix, packed_bytes, scratch_bytes):
                if check:
                    invalid = torch.zeros(1, dtype=torch.int32, device=device)
                    handle.check(matrix, dense.data_ptr(), invalid.data_ptr(), stream)
                    if invalid.item():
                        raise ShapeError(f"dense {(rows, columns)} keeps more than 2 of 4 in a group: prune it first")
                # Products read behind what the compressor asks for: the memory goes on there.
                whole = max(packed_bytes, layout.packed_bytes(rows, columns, dense.itemsize))
                packed = torch.full((whole,), layout.PADDING, dtype=torch.uint8, device=device)[:packed_bytes]
                scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=device)
                handle.compress(matrix, dense.data_ptr(), packed.data_ptr(), scratch.data_ptr(), stream)
        return packed

    def release(self, problem: Problem, index: int, keep: int | None = None) -> None:
        """Free the calling thread's plans of a problem on a device, except those of one algorithm."""
        with self._on(index):
            self._handle(index).drop(problem, keep)

    def plan_count(self, index: int) -> int:
        """Plans that the calling thread holds on a device."""
        handle = self._local.__dict__.get("handles", {}).get(index)
        return len(handle.plans) if handle else 0

    def close(self) -> None:
        """Free the calling thread's handles and plans. Later calls open new ones."""
        self._local.__dict__.pop("handles", None)
        for finalizer in self._local.__dict__.pop("finalizers", ()):
            if alive := finalizer.detach():
                alive[1](*alive[2])

    @contextmanager
    def _on(self, index: int) -> Iterator[None]:
        previous = self.runtime.exchange_device(index)
        try:
            yield
        finally:
            self.runtime.exchange_device(previous)

    def _handle(self, index: int) -> Handle:
        handle: Handle | None = self._local.__dict__.get("handles", {}).get(index)
        return handle or self._open(index)

    def _open(self, index: int) -> Handle:
        """A handle for this thread. It is freed when the thread ends, with the thread-local storage that holds it."""
        verdict = self.available(index)
        if not verdict.ok:
            raise EngineError(f"no sparse engine on device {index}: {verdict.reason}; or use backend='dense'")
        lib = self._load()
        handle = Handle(lib, self.MAX_PLANS)
        owned = (lib, handle.handle, handle.plans)
        finalizer = weakref.finalize(handle, _close, self.runtime, index, os.getpid(), *owned)
        # When the interpreter exits, other threads may still be inside the library, and CUDA may be gone.
        finalizer.atexit = False
        self._local.__dict__.setdefault("handles", {})[index] = handle
        self._local.__dict__.setdefault("finalizers", []).append(finalizer)
        return handle


def _close(runtime: CudaRuntime, index: int, process: int, *owned: Any) -> None:
    """Free what a handle owned, unless this is a forked child, whose copy has no CUDA behind it."""
    if os.getpid() != process:
        return
    previous = runtime.exchange_device(index)
    cusparselt.free(*owned)
    runtime.exchange_device(previous)


def _check_matrix(dense: Tensor, kind: str) -> tuple[int, int]:
    """Rows and columns of a matrix that can be compressed. Raises ShapeError, TensorError."""
    if dense.device.type != kind or dense.dtype not in (*PACKED_DTYPES, FP8):
        raise TensorError(
            f"dense is {dense.dtype} on {dense.device}; use float16, bfloat16 or float8_e4m3fn on a CUDA device"
        )
    multiple = sparse_multiple(dense.dtype)
    if dense.dim() != 2 or any(size == 0 or size % multiple for size in dense.shape):
        raise ShapeError(f"dense has shape {tuple(dense.shape)}; it needs two multiples of {multiple}: pad it")
    if not dense.is_contiguous() or dense.data_ptr() % ALIGNMENT:
        raise TensorError(f"dense must be contiguous and {ALIGNMENT}-byte aligned; pass a contiguous copy")
    return dense.shape[0], dense.shape[1]


@cache
def engine() -> Engine:
    """The process's engine. Making it touches nothing: CUDA and the library start with the first real question."""
    made = Engine()
    atexit.register(made.close)
    return made


def available(device: torch.device | str | int | None = None) -> Availability:
    """Whether sparse products can run on a device, with the reason. Never raises."""
    return engine().available(device)
