"""The C functions of the native library (csrc/interface.h), with types."""

import ctypes
from pathlib import Path

from semisparse.native.structures import INTERFACE, Functions, LaunchFacts, LaunchKind, ProductFacts, ProductKind


class Interface:
    """One loaded library. Loading alone changes nothing; register() makes its functions the ops' implementations.

    Args:
        path: Of the shared library.

    Raises:
        OSError: It cannot be loaded.
        ImportError: It was built from other sources than these Python files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lib = lib = ctypes.CDLL(str(path))
        number = getattr(lib, "semisparse_interface", lambda: None)()
        if number != INTERFACE:
            raise ImportError(f"{path.name} has interface {number}, this version needs {INTERFACE}: build it again")
        int64, int32, text = ctypes.c_int64, ctypes.c_int32, ctypes.c_char_p
        lib.semisparse_connect.argtypes = (ctypes.POINTER(Functions),)
        lib.semisparse_add_product.argtypes = (
            int64, int32, int32, int64, int64, int64, int32, text, ctypes.POINTER(ProductFacts)
        )  # fmt: skip
        lib.semisparse_add_launch.argtypes = (
            int64, int32, int32, int32, text, int64, int64, int64, int32, int32, ctypes.POINTER(LaunchFacts)
        )  # fmt: skip
        lib.semisparse_drop_plan.argtypes = (ctypes.c_void_p,)
        lib.semisparse_watch.argtypes = (int64,)
        for name in ("drop_plan", "forget_products", "prepared", "started", "started_dense"):
            getattr(lib, f"semisparse_{name}").restype = int64
        for name in ("register", "connect", "add_product", "add_launch", "watch"):
            getattr(lib, f"semisparse_{name}").restype = None
        self.multiplies = False
        """Whether products with a plan may be added: cuSPARSELt's functions were handed over."""

    def register(self) -> None:
        """Make C++ the implementation of the hot ops."""
        self._lib.semisparse_register()

    def connect(self, functions: Functions) -> None:
        """Hand over the foreign functions, once. Until then Python answers every call."""
        self._lib.semisparse_connect(ctypes.byref(functions))
        self.multiplies = bool(functions.matmul and functions.set_attribute)

    def add_product(
        self,
        kind: ProductKind,
        device: int,
        dtype: int,
        sizes: tuple[int, int, int],
        bias: bool,
        backend: str,
        facts: ProductFacts,
    ) -> None:
        """Let calls of the calling thread start a product.

        Args:
            kind: Which product.
            device: Index of the device.
            dtype: Code of the result's dtype; for a way, of dW's and, 8 bits higher, of dy's.
            sizes: Tokens (before padding), out_features and in_features of the op's call.
            bias: Whether the call has a bias.
            backend: As the call names it.
            facts: What is started. Its plan, if it has one, must live until drop_plan.
        """
        self._lib.semisparse_add_product(
            kind, device, dtype, *sizes, bias, backend.encode(), ctypes.byref(facts)
        )  # fmt: skip

    def add_launch(
        self,
        kind: LaunchKind,
        device: int,
        dtypes: tuple[int, int],
        mask: str,
        sizes: tuple[int, int, int],
        given: tuple[bool, bool],
        facts: LaunchFacts,
    ) -> None:
        """Let calls start a compiled kernel, which must live as long as the process.

        Args:
            kind: Which kernel.
            device: Index of the device.
            dtypes: Codes of the dtypes read and written; 0 where there is none.
            mask: The mask's name; empty where the op has none.
            sizes: Rows, columns and, where the op reads strides, entries from row to row; else 0. Of rescale: the code
                of the bias's dtype.
            given: Whether the call's optional operands are there, as csrc/keys.h lists them.
            facts: What is started.
        """
        self._lib.semisparse_add_launch(
            kind, device, *dtypes, mask.encode(), *sizes, *given, ctypes.byref(facts)
        )  # fmt: skip

    def drop_plan(self, plan: int) -> int:
        """Forget a plan's products; when this returns, no call uses the plan, and it may be freed."""
        return int(self._lib.semisparse_drop_plan(plan))

    def forget_products(self) -> int:
        """Forget all products, so that the next calls ask Python again."""
        return int(self._lib.semisparse_forget_products())

    def prepared(self) -> int:
        """Number of products and launches that calls can start."""
        return int(self._lib.semisparse_prepared())

    def started(self) -> int:
        """Sparse products started so far, or recorded in a CUDA graph."""
        return int(self._lib.semisparse_started())

    def started_dense(self) -> int:
        """Masked-dense products started so far, or recorded in a CUDA graph."""
        return int(self._lib.semisparse_started_dense())

    def watch(self, more: int) -> None:
        """Add watchers, or take some away; while there are any, Python answers every call."""
        self._lib.semisparse_watch(more)
