"""The hot ops of csrc/ on the CPU, as torch.ops.semisparse_test, beside Python implementations that are counted."""

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from semisparse import masks, ops
from semisparse.formats.layout import packed_bytes
from semisparse.native.interface import Interface
from semisparse.native.structures import DTYPE_CODES, LaunchFacts, LaunchKind
from semisparse.ops import packing, products, register, sampling
from tests.native.building import cpu_library
from tests.native.foreign import Foreign, Kernel

BUILT = "SEMISPARSE_TEST_LIBRARY"
"""Environment variable: the test library to load, such as one built with sanitizers."""

FAKES = {
    "pack": packing._fake_pack,
    "pack_transpose": packing._fake_pack_transpose,
    "pack_tokens": packing._fake_pack_tokens,
    "unpack": packing._fake_unpack,
    "packed_matmul": products._fake_packed_matmul,
    "pack_linear": products._fake_pack_linear,
    "packed_tokens_matmul": products._fake_packed_tokens_matmul,
    "packed_tokens_grad_weight": products._fake_packed_tokens_grad_weight,
    "sampled_grad_weight": sampling._fake_sampled_grad_weight,
}
# In the tests that use products.*, the simulated engine stands behind them (conftest.py).
PYTHON: dict[str, Callable[..., Any]] = {
    "pack": ops.pack,
    "pack_transpose": ops.pack_transpose,
    "pack_tokens": ops.pack_tokens,
    "unpack": ops.unpack,
    "packed_matmul": products._cuda_packed_matmul,
    "pack_linear": products._cuda_pack_linear,
    "packed_tokens_matmul": products._cuda_packed_tokens_matmul,
    "packed_tokens_grad_weight": products._cuda_packed_tokens_grad_weight,
    "sampled_grad_weight": sampling._cuda_sampled_grad_weight,
}


SUM_ROWS = 3
"""Rows of the sums that a sampling kernel writes here."""


class Hot:
    """The ops, as semisparse.ops offers them, and what they asked of Python.

    Attributes:
        interface: Of the test library.
        foreign: Its foreign functions.
        asked: Names of the ops whose Python implementation was called.
        python: The Python implementations; a test may replace them.
    """

    def __init__(self) -> None:
        self.interface = Interface(Path(os.environ.get(BUILT) or cpu_library()))
        self.foreign = Foreign()
        self.asked: list[str] = []
        self.python = dict(PYTHON)
        self._define()
        self.interface.register()
        self.functions = self.foreign.functions()
        self.interface.connect(self.functions)
        self.forget_launches = self.interface._lib.semisparse_forget_launches
        self.offset = self.interface._lib.semisparse_offset
        self.offset.restype, self.offset.argtypes = ctypes.c_int64, (ctypes.c_char_p, ctypes.c_char_p)

    def _define(self) -> None:
        """The ops with their schemas, by the functions that define the real ones."""
        self._library = torch.library.Library("semisparse_test", "FRAGMENT")
        real, register.LIBRARY = register.LIBRARY, self._library
        try:
            for name, fake in FAKES.items():
                schema = str(getattr(torch.ops.semisparse, name).default._schema).removeprefix("semisparse::")
                self._library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
                self._library.impl(name, torch.library.fallthrough_kernel, "Autograd")
                torch.library.register_fake(f"semisparse_test::{name}", fake, lib=self._library)
                register._register_fallback(schema, self._answer(name))
        finally:
            register.LIBRARY = real
        self.ops = SimpleNamespace(**{
            name: register._typed_caller(PYTHON[name], getattr(torch.ops.semisparse_test, name).default)
            for name in FAKES
        })  # fmt: skip

    def _answer(self, name: str) -> Callable[..., Any]:
        def answer(*arguments: Any) -> Any:
            self.asked.append(name)
            return self.python[name](*arguments)

        return answer

    def natively(self, call: Callable[[], Any]) -> Any:
        """What call returns, which must not ask Python."""
        self.asked.clear()
        result = call()
        assert self.asked == []
        return result

    def by_python(self, call: Callable[[], Any]) -> Any:
        """What call returns, which must ask Python for one op."""
        self.asked.clear()
        result = call()
        assert len(self.asked) == 1
        return result

    def launch(
        self,
        kind: LaunchKind,
        dtypes: tuple[torch.dtype | None, torch.dtype],
        sizes: tuple[int, int, int],
        mask: str = "",
        given: tuple[bool, bool] = (False, False),
        **change: Any,
    ) -> LaunchFacts:
        """Hand a kernel over, as ops/prepare.py does on CUDA. change: other facts than the right ones."""
        rows, columns, _ = sizes
        packs = kind in (LaunchKind.PACK, LaunchKind.PACK_TOKENS, LaunchKind.PACK_TRANSPOSE)
        both = packs and (kind is LaunchKind.PACK_TOKENS or masks.get(mask).both_ways)
        buffers = [3] * (kind is not LaunchKind.PACK_TRANSPOSE) + [4] * both
        pointers = [0, *(n for n in (1, 2) if given[n - 1]), *buffers] if packs else [0, 1]
        if kind is LaunchKind.SAMPLE:
            pointers = [0, *([1] if given[0] else []), 2, *([3] if given[1] else [])]
        read, written = dtypes
        function = len(self.foreign.kernels) + 1
        self.foreign.kernels[function] = Kernel(kind, read or torch.uint8, written, sizes, mask, tuple(pointers))
        facts = LaunchFacts(function=function, threads=128, shared_bytes=1024, parameter_count=len(pointers) + 5)
        facts.grid[:] = 2, 3, 1
        if packs:
            padded = -(-rows // 16) * 16
            facts.bytes[:] = packed_bytes(padded, columns) * (3 in buffers), packed_bytes(columns, padded) * both
        elif kind is LaunchKind.SAMPLE:
            facts.bytes[:] = packed_bytes(columns, -(-rows // 16) * 16), SUM_ROWS * columns * 4 if given[1] else 0
        elif kind is LaunchKind.UNPACK:
            facts.bytes[0] = packing.SM90_16BIT.buffer_bytes(rows, columns)
        for number, source in enumerate(pointers):
            facts.source[number] = source
        for number, value in enumerate((*sizes, 0, 0), len(pointers)):
            facts.source[number], facts.value[number] = -1, value
        for name, value in change.items():
            setattr(facts, name, value)
        codes = 0 if read is None else DTYPE_CODES[read], DTYPE_CODES[written]
        self.interface.add_launch(kind, -1, codes, mask, sizes, given, facts)
        return facts


@cache
def installed() -> Hot:
    """The ops, defined once in this process."""
    return Hot()


def shifted(tensor: Tensor) -> Tensor:
    """The same values at an address that is not a multiple of 16."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    view = memory[1:].view(tensor.shape)
    view.copy_(tensor)
    assert view.data_ptr() % 16
    return view
