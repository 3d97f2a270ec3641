"""NVIDIA's cuSPARSELt through its own bindings, nvmath.bindings.cusparseLt. The only file that calls the library.

This layer knows addresses and sizes, not tensors (engine.py does). The library is imported on first use. A Handle
serves one device and one thread, and keeps the plans built with it.

Plans and handles are host objects. A kernel that was launched, or captured in a CUDA graph, carries its parameters by
value, so a plan may be freed while its kernels are still queued and a graph may outlive the plan it was captured from.
"""

import ctypes
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from semisparse.errors import EngineError
from semisparse.formats.layout import ALIGNMENT
from semisparse.gemm.problem import Order, Problem
from semisparse.versions import package_version

MIN_CAPABILITY = (8, 0)
"""The first GPUs with sparse tensor cores."""

MIN_VERSION = 800
"""cuSPARSELt 0.8.0, the first whose algorithm selections can be freed; encoded 1000 major + 100 minor + patch."""

ALGORITHMS = 36
"""Ids from here on are never tried. For fp16 the library offers 52. On one H200 (cuSPARSELt 0.8.0) those from 36 on end
in an illegal instruction, after which the process cannot use the GPU, so they cannot be checked by trying."""

_FEWER: dict[tuple[torch.dtype, Order, Order], int] = {(torch.float16, "row", "column"): 34}
"""The same for some products, by dtype, b_order and d_order. On one H100 (cuSPARSELt 0.8.0) 34 and 35 ended so at each
such shape that the trust suite tried (docs/reliability.md). A weight's gradient from a pruned activation is one."""

_NEEDED = ("matmul_alg_selection_destroy", "sp_mma_compressed_size2", "sp_mma_prune_check2", "matmul_get_workspace")
_INSTALL = "pip install 'nvmath-python>=1.0'"

# Values from the C headers: cudaDataType, cusparseOrder_t, cusparseOperation_t, cusparseComputeType, then
# cusparseLtSparsity_t, cusparseLtMatmulAlg_t, cusparseLtMatmulAlgAttribute_t and cusparseLtMatmulDescAttribute_t.
_DATA_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14, torch.float8_e4m3fn: 28, torch.float8_e5m2: 29}
_ORDERS = {"column": 1, "row": 2}
_NO_TRANSPOSE, _COMPUTE_32F, _HALF_SPARSE, _DEFAULT = 0, 2, 0, 0
_CONFIG_ID, _CONFIG_MAX_ID, _BIAS_POINTER = 0, 1, 8

_ONE, _ZERO = ctypes.c_float(1.0), ctypes.c_float(0.0)
_ALPHA, _BETA = ctypes.addressof(_ONE), ctypes.addressof(_ZERO)
_POINTER_BYTES = ctypes.sizeof(ctypes.c_void_p)


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether the engine can be used on a device.

    Attributes:
        ok: Whether it can.
        reason: Why, or why not.
        version: cuSPARSELt's, where it was loaded.
    """

    ok: bool
    reason: str
    version: int | None = None


def load_bindings() -> Any:
    """The bindings module. Needs no driver; the library itself is loaded by the first call into it."""
    from nvmath.bindings import cusparseLt

    return cusparseLt


def version_name(version: int) -> str:
    """'0.8.1' for 801."""
    return f"{version // 1000}.{version // 100 % 10}.{version % 100}"


def probe(load: Callable[[], Any]) -> Availability:
    """Load the library and open a handle on the current device, to see whether it works."""
    try:
        lib = load()
    except ImportError as error:
        return Availability(False, f"nvmath-python cannot be imported ({error}): {_INSTALL}")
    if missing := [name for name in _NEEDED if not hasattr(lib, name)]:
        return Availability(False, f"nvmath-python {package_version('nvmath-python')} has no {missing[0]}: {_INSTALL}")
    try:
        handle = lib.init()
        try:
            version = int(lib.get_version(handle))
        finally:
            lib.destroy(handle)
    except Exception as error:
        # A missing or broken driver or library raises many types.
        return Availability(False, f"cuSPARSELt cannot be used ({type(error).__name__}: {error})")
    if version < MIN_VERSION:
        reason = f"cuSPARSELt {version_name(version)} is older than {version_name(MIN_VERSION)}: install a newer torch"
        return Availability(False, reason, version)
    return Availability(True, f"cuSPARSELt {version_name(version)}", version)


class Description:
    """What the library knows of a problem before an algorithm is chosen: one plan's own, or shared by several.

    Attributes:
        descriptor: Of the product.
        selection: Of its algorithm; a plan keeps the one that was set when it was made.
        bias: As Plan's.
        users: Plans that need it, and one more while new plans may.
    """

    __slots__ = ("bias", "descriptor", "owned", "selection", "users")

    def __init__(self, bias: int) -> None:
        self.bias = ctypes.c_size_t(bias)
        self.descriptor = self.selection = self.users = 0
        self.owned = ExitStack()

    def let_go(self) -> None:
        """One user fewer; the last one frees it."""
        self.users -= 1
        if not self.users:
            self.owned.close()


class Plan:
    """One prepared product.

    Attributes:
        b_shape, d_shape, packed_bytes: What a call must match.
        workspace: Bytes on the device that a call must provide.
        bias: The device address that the product adds from, 0 for none, as the host word that the library reads.
        uses: The handle's count of uses, as a host word that the native library counts in, too.
        last_use: That count at the last use of this plan, likewise.
        handed_over: Whether the native library knows the plan, too.
    """

    __slots__ = (
        "address",
        "b_shape",
        "bias",
        "d_shape",
        "descriptor",
        "handed_over",
        "last_use",
        "owned",
        "packed_bytes",
        "uses",
        "workspace",
    )

    def __init__(self, problem: Problem, known: Description, uses: ctypes.c_int64) -> None:
        self.b_shape, self.d_shape = problem.b_shape, problem.d_shape
        self.bias, self.descriptor = known.bias, known.descriptor
        self.uses, self.last_use = uses, ctypes.c_int64(0)
        self.address = self.packed_bytes = self.workspace = 0
        self.owned = ExitStack()
        self.handed_over = False

    def use(self) -> None:
        """Note that the plan is used now, so that it is freed later than others."""
        self.uses.value = self.last_use.value = self.uses.value + 1

    def before_freeing(self, call: Callable[[], object]) -> None:
        """Note that the plan is used elsewhere, by something that call ends before the plan is freed."""
        self.owned.callback(call)
        self.handed_over = True


class Handle:
    """cuSPARSELt on one device in one thread. The caller makes the device current around every call.

    Every method raises EngineError where the library refuses.

    Args:
        lib: The bindings.
        max_plans: Plans that are kept; the least recently used is freed for a new one.
    """

    __slots__ = ("__weakref__", "_lib", "_shared", "_stream", "_stream_address", "handle", "max_plans", "plans", "uses")

    def __init__(self, lib: Any, max_plans: int) -> None:
        self._lib = lib
        self.max_plans = max_plans
        self.plans: dict[tuple[Problem, int], Plan] = {}
        self._shared: dict[Problem, Description] = {}
        self.uses = ctypes.c_int64(0)
        self._stream = ctypes.c_size_t(0)
        self._stream_address = ctypes.addressof(self._stream)
        with self._explained("no handle"):
            self.handle = lib.init()

    def multiply(self, plan: Plan, a: int, b: int, d: int, workspace: int, stream: int) -> None:
        """Launch D = A B (+ bias) on a stream; a, b, d, workspace: device addresses. Hot path: no host allocation."""
        self._stream.value = stream
        try:
            self._lib.matmul(
                self.handle, plan.address, _ALPHA, a, b, _BETA, d, d, workspace, self._stream_address, 1
            )  # fmt: skip
        except self._lib.cuSPARSELtError as error:
            raise self._explain(error, "the product failed") from error

    def make_plan(self, problem: Problem, algorithm: int, bias: int) -> Plan:
        """A new plan, kept for later calls. bias: address of the bias vector, 0 for none. Host work only."""
        with self._explained(f"no plan with algorithm {algorithm} for {problem}"):
            plan = self._build(problem, algorithm, bias)
        replaced = self.plans.pop((problem, algorithm), None)
        if replaced is not None:
            self._free(replaced)
        self.plans[problem, algorithm] = plan
        plan.use()
        while len(self.plans) > self.max_plans:
            self._free(self.plans.pop(min(self.plans, key=lambda key: self.plans[key].last_use.value)))
        return plan

    def set_bias(self, plan: Plan, bias: int) -> None:
        """Point an existing plan at another bias vector; engine.py finds out whether its product follows."""
        with self._explained("no bias"):
            self._set_bias(plan.descriptor, plan.bias, bias)

    def algorithms(self, problem: Problem) -> range:
        """Algorithm ids that may be run."""
        with self._explained(f"no algorithms for {problem}"), ExitStack() as owned:
            return self._offered(problem, self._described(problem, 0, owned).selection)

    def share(self, problem: Problem, bias: int) -> bool:
        """From here on, plans of a problem share what the library knows of it, their bias too; until unshare().

        False where they already do. bias: address of a bias vector, 0 for none: selections are made as those of plans
        are, with the bias set.

        For tuning, which makes a plan per algorithm: cuSPARSELt 0.8.0 takes much longer for each selection of an fp16
        product into column-major than for a plan or for other products. A plan keeps the algorithm that was set when it
        was made. With a bias, sharing is only right where plans follow their descriptor's.
        """
        if problem in self._shared:
            return False
        with self._explained(f"no plan for {problem}"):
            self._shared[problem] = self._describe(problem, bias)
        return True

    def unshare(self, problem: Problem) -> None:
        """New plans are on their own again."""
        self._freed(self._shared.pop(problem).let_go)

    @contextmanager
    def matrix(self, rows: int, columns: int, dtype: torch.dtype) -> Iterator[tuple[int, int, int]]:
        """Descriptor of a 2:4 matrix, the bytes of its packed form, and the bytes of scratch that packing takes."""
        with self._explained(f"cannot pack a {rows}x{columns} matrix of {dtype}"), ExitStack() as owned:
            made = self._structured(rows, columns, dtype, owned)
            packed, scratch = self._lib.sp_mma_compressed_size2(self.handle, made)
            yield made, int(packed), int(scratch)

    def check(self, matrix: int, dense: int, invalid: int, stream: int) -> None:
        """Write nonzero to the int32 at invalid when a group of four of dense has more than two nonzeros."""
        self._lib.sp_mma_prune_check2(self.handle, matrix, 1, _NO_TRANSPOSE, dense, invalid, stream)

    def compress(self, matrix: int, dense: int, packed: int, scratch: int, stream: int) -> None:
        """Launch NVIDIA's compressor; dense, packed, scratch: device addresses."""
        self._lib.sp_mma_compress2(self.handle, matrix, 1, _NO_TRANSPOSE, dense, packed, scratch, stream)

    def drop(self, problem: Problem, keep: int | None) -> None:
        """Free the plans of a problem, except those of one algorithm."""
        for key in [key for key in self.plans if key[0] == problem and key[1] != keep]:
            self._free(self.plans.pop(key))

    def _build(self, problem: Problem, algorithm: int, bias: int) -> Plan:
        lib = self._lib
        with ExitStack() as owned:
            known = self._described(problem, bias, owned)
            plan = Plan(problem, known, self.uses)
            # Checked here, where every algorithm passes before its first use: the library accepts ids that end in an
            # illegal instruction, and a choice may come from a file, a table or another rank.
            offered = self._offered(problem, known.selection)
            if algorithm not in offered:
                raise EngineError(
                    f"algorithm={algorithm!r} is not offered for {problem}; the ids are 0 to {len(offered) - 1}: "
                    "take one of Engine.algorithms(), or backend='auto'"
                )
            chosen = ctypes.c_int32(algorithm)
            attribute = (_CONFIG_ID, ctypes.addressof(chosen), ctypes.sizeof(chosen))
            lib.matmul_alg_set_attribute(self.handle, known.selection, *attribute)
            plan.address = int(lib.matmul_plan_init(self.handle, known.descriptor, known.selection))
            owned.callback(lib.matmul_plan_destroy, plan.address)
            plan.workspace = int(lib.matmul_get_workspace(self.handle, plan.address))
            plan.packed_bytes = int(lib.sp_mma_compressed_size(self.handle, plan.address)[0])
            plan.owned = owned.pop_all()
        return plan

    def _offered(self, problem: Problem, selection: int) -> range:
        limit = ctypes.c_int32()
        attribute = (_CONFIG_MAX_ID, ctypes.addressof(limit), ctypes.sizeof(limit))
        self._lib.matmul_alg_get_attribute(self.handle, selection, *attribute)
        most = _FEWER.get((problem.dtype, problem.b_order, problem.d_order), ALGORITHMS)
        return range(min(limit.value, most))

    def _described(self, problem: Problem, bias: int, owned: ExitStack) -> Description:
        """The shared description with the bias at that address, or a new one; owned lets go of it."""
        known = self._shared.get(problem)
        if known is None:
            known = self._describe(problem, bias)
        else:
            known.users += 1
        owned.callback(known.let_go)
        if bias and bias != known.bias.value:
            self._set_bias(known.descriptor, known.bias, bias)
        return known

    def _describe(self, problem: Problem, bias: int) -> Description:
        """A new description with one user. bias: address of the bias vector, 0 for none.

        Split-K stays unset, which cuSPARSELt 0.8.0 gives as -1 on an H100: the algorithm decides. Split sums could
        depend on the order of arrival; the trust suite compares bits, and reads the names of the kernels that ran.
        """
        if refusal := problem.refusal():
            raise EngineError(f"the sparse engine cannot take {problem}: {refusal}; use the masked-dense product")
        lib, handle, made = self._lib, self.handle, Description(bias)
        with ExitStack() as owned:
            a = self._structured(problem.rows, problem.reduction, problem.dtype, owned)
            b = self._dense(problem.reduction, problem.columns, problem.dtype, problem.b_order, owned)
            d = self._dense(problem.rows, problem.columns, problem.out_dtype, problem.d_order, owned)
            made.descriptor = lib.matmul_descriptor_init(handle, _NO_TRANSPOSE, _NO_TRANSPOSE, a, b, d, d, _COMPUTE_32F)
            owned.callback(lib.matmul_descriptor_destroy, made.descriptor)
            if bias:
                self._set_bias(made.descriptor, made.bias, bias)
            made.selection = lib.matmul_alg_selection_init(handle, made.descriptor, _DEFAULT)
            owned.callback(lib.matmul_alg_selection_destroy, made.selection)
            made.owned, made.users = owned.pop_all(), 1
        return made

    def _set_bias(self, descriptor: int, word: ctypes.c_size_t, bias: int) -> None:
        before, word.value = word.value, bias
        address = ctypes.addressof(word)
        try:
            self._lib.matmul_desc_set_attribute(self.handle, descriptor, _BIAS_POINTER, address, _POINTER_BYTES)
        except self._lib.cuSPARSELtError:
            word.value = before
            raise

    def _structured(self, rows: int, columns: int, dtype: torch.dtype, owned: ExitStack) -> int:
        layout = (rows, columns, columns, ALIGNMENT, _DATA_TYPES[dtype], _ORDERS["row"])
        made = int(self._lib.structured_descriptor_init(self.handle, *layout, _HALF_SPARSE))
        owned.callback(self._lib.mat_descriptor_destroy, made)
        return made

    def _dense(self, rows: int, columns: int, dtype: torch.dtype, order: Order, owned: ExitStack) -> int:
        leading = columns if order == "row" else rows
        layout = (rows, columns, leading, ALIGNMENT, _DATA_TYPES[dtype], _ORDERS[order])
        made = int(self._lib.dense_descriptor_init(self.handle, *layout))
        owned.callback(self._lib.mat_descriptor_destroy, made)
        return made

    def _free(self, plan: Plan) -> None:
        self._freed(plan.owned.close)

    def _freed(self, free: Callable[[], object]) -> None:
        try:
            free()
        except self._lib.cuSPARSELtError as error:
            # The current product is not affected, so it does not fail.
            warnings.warn(
                f"a plan leaks host memory: {self._explain(error, 'not freed')}", RuntimeWarning, stacklevel=2
            )

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._lib.cuSPARSELtError as error:
            raise self._explain(error, what) from error

    def _explain(self, error: Any, what: str) -> EngineError:
        status = getattr(error, "status", None)
        name = f"status {status}"
        with suppress(Exception):
            name = f"{self._lib.get_error_name(status)}, status {status}"
        return EngineError(f"{what}: cuSPARSELt says {name}; backend='dense' works without it")


def free(lib: Any, handle: int, plans: dict[tuple[Problem, int], Plan]) -> None:
    """Free a handle and its plans. Errors are ignored: the process is shutting down or the handle is unusable."""
    while plans:
        with suppress(Exception):
            plans.popitem()[1].owned.close()
    with suppress(Exception):
        lib.destroy(handle)
