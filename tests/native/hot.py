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
from semisparse.formats.layout import FP8, SM90_8BIT, SM90_16BIT, packed_bytes
from semisparse.native.interface import Interface
from semisparse.native.structures import DTYPE_CODES, LaunchFacts, LaunchKind
from semisparse.ops import fp8, fp8_packed, fp8_sampled_grad, fp8_sampling, packing, products, register, sampling
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
    "quantise": fp8._fake_quantise,
    "pack_fp8": fp8_packed._fake_pack_fp8,
    "unpack_fp8": fp8_packed._fake_unpack_fp8,
    "fp8_product": fp8_packed._fake_fp8_product,
    "fp8_dense_product": fp8._fake_dense_product,
    "sample_fp8": fp8_sampling._fake_sample_fp8,
    "fp8_sampled_product": fp8_sampling._fake_fp8_sampled_product,
    "fp8_sampled_grad_weight": fp8_sampled_grad._fake_fp8_sampled_grad_weight,
    "rescale": fp8._fake_rescale,
    "rescale_": fp8._fake_rescale_in_place,
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
    "quantise": ops.quantise,
    "pack_fp8": ops.pack_fp8,
    "unpack_fp8": ops.unpack_fp8,
    "fp8_product": fp8_packed._cuda_fp8_product,
    "fp8_dense_product": ops.fp8_dense_product,
    "sample_fp8": ops.sample_fp8,
    "fp8_sampled_product": fp8_sampling._cuda_fp8_sampled_product,
    "fp8_sampled_grad_weight": fp8_sampled_grad._cuda_fp8_sampled_grad_weight,
    "rescale": ops.rescale,
    "rescale_": ops.rescale_,
}


SUM_ROWS = 3
"""Rows of the sums that a sampling kernel writes here."""


POINTERS_OF_FP8: dict[LaunchKind, Callable[[str, tuple[bool, bool]], list[int]]] = {
    LaunchKind.LARGEST: lambda *_: [0, 1],
    LaunchKind.QUANTISE: lambda _, given: [0, 1, *[2] * given[0], *[3] * given[1], 4],
    LaunchKind.PACK_FP8: lambda mask, given: [0, *[1] * given[0], 2, 3, 4, *[5] * masks.get(mask).both_ways],
    LaunchKind.RESCALE: lambda _, given: [0, 1, 2, *[3] * given[0], 4],
    LaunchKind.SAMPLE_FP8: lambda _, given: [0, *[1] * given[0], 2, 3, 4, *[5] * given[1], 6, 7],
}
"""Which addresses of a call the kernels of fp8 take; the gradient in e4m3 is left out where it is not written."""


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
        dtypes: tuple[torch.dtype | None, torch.dtype | None],
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
        if kind in POINTERS_OF_FP8:
            pointers = POINTERS_OF_FP8[kind](mask, given)
        read, written = dtypes
        if kind is LaunchKind.SAMPLE_FP8 and written is None:
            pointers.remove(3)
        function = len(self.foreign.kernels) + 1
        self.foreign.kernels[function] = Kernel(kind, read or torch.uint8, written, sizes, mask, tuple(pointers))
        facts = LaunchFacts(function=function, threads=128, shared_bytes=1024, parameter_count=len(pointers) + 5)
        facts.grid[:] = 2, 3, 1
        if packs:
            padded = -(-rows // 16) * 16
            facts.bytes[:] = packed_bytes(padded, columns) * (3 in buffers), packed_bytes(columns, padded) * both
            leave_the_end(facts, 2, (padded, columns), (columns, padded))
        elif kind is LaunchKind.SAMPLE:
            facts.bytes[:] = packed_bytes(columns, -(-rows // 16) * 16), SUM_ROWS * columns * 4 if given[1] else 0
            leave_the_end(facts, 2, (columns, -(-rows // 16) * 16))
        elif kind is LaunchKind.UNPACK:
            layout = SM90_8BIT if written is FP8 else SM90_16BIT
            facts.bytes[0] = layout.buffer_bytes(rows, columns, written.itemsize)
        elif kind in POINTERS_OF_FP8:
            padded, both = -(-rows // 16) * 16, kind is LaunchKind.PACK_FP8 and masks.get(mask).both_ways
            facts.bytes[:] = {
                LaunchKind.LARGEST: (12, 0),
                LaunchKind.QUANTISE: (padded * columns * given[0], padded * columns * given[1]),
                LaunchKind.PACK_FP8: (packed_bytes(rows, columns, 1), packed_bytes(columns, rows, 1) * both),
                LaunchKind.RESCALE: (0, 0),
                LaunchKind.SAMPLE_FP8: (
                    packed_bytes(columns, -(-rows // 32) * 32, 1),
                    SUM_ROWS * columns * 4 * given[1],
                ),
            }[kind]
            if kind is LaunchKind.PACK_FP8:
                leave_the_end(facts, 1, (rows, columns), (columns, rows))
            elif kind is LaunchKind.SAMPLE_FP8:
                leave_the_end(facts, 1, (columns, -(-rows // 32) * 32))
        for number, source in enumerate(pointers):
            facts.source[number] = source
        for number, value in enumerate((*sizes, 0, 0), len(pointers)):
            facts.source[number], facts.value[number] = -1, value
        for name, value in change.items():
            setattr(facts, name, value)
        codes = tuple(0 if dtype is None else DTYPE_CODES[dtype] for dtype in dtypes)
        self.interface.add_launch(kind, -1, codes, mask, sizes, given, facts)
        return facts


def leave_the_end(facts: LaunchFacts, itemsize: int, *shapes: tuple[int, int]) -> None:
    """Note what the kernel does not write of the buffers of matrices of these shapes."""
    layout = SM90_8BIT if itemsize == 1 else SM90_16BIT
    for place, shape in enumerate(shapes):
        facts.behind[place] = max(0, facts.bytes[place] - layout.buffer_bytes(*shape, itemsize))


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
