"""Foreign functions for the test library that compute on the CPU: products, kernels, streams and device guards.

Memory is read and written by C's own functions, so that the address sanitizer sees a wrong address or size.
"""

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from semisparse import ops
from semisparse.formats.layout import FP8, SM90_8BIT, SM90_16BIT, compressed_bytes, packed_bytes, sm90_layout
from semisparse.native.structures import DTYPE_CODES, Functions, LaunchKind
from semisparse.reference import fp8, packing
from tests.gemm import simulated
from tests.gemm.simulated import DTYPES, SimulatedLibrary

TORCH = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
STREAM = 6_999
ALIGNMENT = 16
_pointer, _int32, _unsigned = ctypes.c_void_p, ctypes.c_int32, ctypes.c_uint
SIGNATURES = {
    "matmul": (*[_pointer] * 9, ctypes.POINTER(_pointer), _int32),
    "set_attribute": (_pointer, _pointer, ctypes.c_int, _pointer, ctypes.c_size_t),
    "launch_kernel": (_pointer, *[_unsigned] * 7, _pointer, ctypes.POINTER(_pointer), _pointer),
    "fill": (ctypes.c_uint64, ctypes.c_ubyte, ctypes.c_size_t, _pointer),
    "current_stream": (_int32, ctypes.POINTER(_pointer)),
    "open_guard": (_int32, ctypes.POINTER(_pointer)),
    "close_guard": (_pointer,),
    "mm": (_pointer,) * 3,
    "addmm": (*[_pointer] * 4, ctypes.c_double, ctypes.c_double),
    "scaled_mm": (*[_pointer] * 8, _int32),
}
"""Arguments as csrc/functions.h has them; each function returns an int."""


def read(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A copy of the memory at an address, which must be aligned as device memory is."""
    assert address and address % ALIGNMENT == 0
    count = torch.Size(shape).numel()
    return torch.frombuffer(bytearray(ctypes.string_at(address, count * dtype.itemsize)), dtype=dtype).view(shape)


def write(address: int, tensor: Tensor) -> None:
    """Copy a tensor to an address."""
    assert address and address % ALIGNMENT == 0
    raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    ctypes.memmove(address, raw, len(raw))


def sm90_pack(dense: Tensor) -> Tensor:
    """As the simulated library's pack, in the format of the CPU's ops."""
    written = SM90_16BIT.encode(packing.pack(dense, dense != 0))
    return torch.nn.functional.pad(written, (0, compressed_bytes(*dense.shape) - written.numel()))


def sm90_unpack(packed: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """As the simulated library's unpack, in the format of the CPU's ops."""
    if dtype is FP8:
        return ops.unpack_fp8(packed, rows, columns)
    return packing.unpack(SM90_16BIT.decode(packed, rows, columns, dtype))


@dataclass
class Kernel:
    """A compiled kernel: what it computes, and the numbers that it must be given behind its pointers."""

    kind: LaunchKind
    read: torch.dtype
    written: torch.dtype
    sizes: tuple[int, int, int]
    mask: str
    pointers: tuple[int, ...]

    def run(self, words: list[int]) -> None:
        given = dict(zip(self.pointers, words, strict=False))
        assert words[len(self.pointers) :] == [*self.sizes, 0, 0]
        rows, columns, stride = self.sizes
        if self.kind in (LaunchKind.PACK, LaunchKind.PACK_TOKENS, LaunchKind.PACK_TRANSPOSE):
            memory = read(given[0], ((rows - 1) * stride + columns,), self.read)
            matrix = memory.as_strided((rows, columns), (stride, 1))
            codes = read(given[1], (rows // 4, columns // 4), torch.int16) if 1 in given else None
            scale = read(given[2], (), torch.float32) if 2 in given else None
            tokens = self.kind is LaunchKind.PACK_TOKENS
            made = (
                ops.pack_tokens(matrix, self.written) if tokens
                else ops.pack(matrix, self.written, self.mask, codes, scale)
            )  # fmt: skip
            padded = -(-rows // 16) * 16
            for place, buffer, sizes in zip((3, 4), made, ((padded, columns), (columns, padded)), strict=True):
                if place in given:
                    write(given[place], buffer[: SM90_16BIT.buffer_bytes(*sizes)])
        elif self.kind is LaunchKind.SAMPLE:
            memory = read(given[0], ((rows - 1) * stride + columns,), self.read)
            gradient = memory.as_strided((rows, columns), (stride, 1))
            seed = read(given[1], (), torch.int64) if 1 in given else None
            packed, sums = ops.pack_sample(gradient, seed, True)
            write(given[2], packed[: SM90_16BIT.buffer_bytes(columns, -(-rows // 16) * 16)])
            if 3 in given:
                write(given[3], torch.stack([sums.float() - 2, torch.ones(columns), torch.ones(columns)]))
        elif self.kind is LaunchKind.SUM_ROWS:
            write(given[1], read(given[0], (rows, columns), torch.float32).sum(0).to(self.written))
        elif self.kind in FP8_KINDS:
            FP8_KINDS[self.kind](self, given)
        elif self.kind is LaunchKind.UNPACK:
            layout = SM90_8BIT if self.written is FP8 else SM90_16BIT
            packed = read(given[0], (layout.buffer_bytes(rows, columns, self.written.itemsize),), torch.uint8)
            write(given[1], sm90_unpack(packed, rows, columns, self.written))
        else:
            write(given[0], read(given[0], (rows, columns), self.read) + read(given[1], (columns,), self.read))

    def matrix(self, address: int) -> Tensor:
        """The matrix that a kernel of fp8 reads."""
        rows, columns, stride = self.sizes
        memory = read(address, ((rows - 1) * stride + columns,), self.read)
        return memory.as_strided((rows, columns), (stride, 1))

    def largest(self, given: dict[int, int]) -> None:
        bits = fp8.largest_magnitude(self.matrix(given[0])).view(torch.int32)
        write(given[1], torch.stack([bits // 2, bits, bits * 0]))

    def quantise(self, given: dict[int, int]) -> None:
        x = self.matrix(given[0])
        assert read(given[1], (3,), torch.int32).max() == fp8.largest_magnitude(x).view(torch.int32)
        for place, result in zip((2, 3, 4), ops.quantise(x, True, True), strict=True):
            if place in given:
                write(given[place], result)

    def pack_fp8(self, given: dict[int, int]) -> None:
        weight = self.matrix(given[0])
        assert read(given[2], (3,), torch.int32).max() == fp8.largest_magnitude(weight).view(torch.int32)
        codes = read(given[1], (weight.shape[0] // 4, weight.shape[1] // 4), torch.int16) if 1 in given else None
        packed, packed_t, scale = ops.pack_fp8(weight, self.mask, codes)
        rows, columns = weight.shape
        packed = packed[: SM90_8BIT.buffer_bytes(rows, columns, 1)]
        packed_t = packed_t[: SM90_8BIT.buffer_bytes(columns, rows, 1)]
        for place, result in ((3, scale), (4, packed), (5, packed_t)):
            if place in given:
                write(given[place], result)

    def sample_fp8(self, given: dict[int, int]) -> None:
        gradient = self.matrix(given[0])
        assert read(given[2], (3,), torch.int32).max() == fp8.largest_magnitude(gradient).view(torch.int32)
        seed = read(given[1], (), torch.int64) if 1 in given else None
        dy8, packed, sums, *scales = ops.sample_fp8(gradient, seed, True, torch.float32)
        packed = packed[: SM90_8BIT.buffer_bytes(gradient.shape[1], dy8.shape[0], 1)]
        ones = torch.ones_like(sums)
        for place, result in ((3, dy8), (4, packed), (5, torch.stack([sums - 2, ones, ones])), *enumerate(scales, 6)):
            if place in given:
                write(given[place], result)

    def rescale(self, given: dict[int, int]) -> None:
        rows, columns, code = self.sizes
        dtype = next(dtype for dtype, number in (DTYPE_CODES | {None: 0}).items() if number == code)
        y, scales = read(given[0], (rows, columns), self.read), (read(given[n], (), torch.float32) for n in (1, 2))
        bias = read(given[3], (columns,), dtype) if dtype else None
        write(given[4], ops.rescale(y, *scales, bias, rows, self.written))


FP8_KINDS = {
    LaunchKind.LARGEST: Kernel.largest,
    LaunchKind.QUANTISE: Kernel.quantise,
    LaunchKind.PACK_FP8: Kernel.pack_fp8,
    LaunchKind.RESCALE: Kernel.rescale,
    LaunchKind.SAMPLE_FP8: Kernel.sample_fp8,
}


@dataclass
class Foreign:
    """The functions, and what happened in them.

    Attributes:
        library: Where plans were made.
        kernels: By the number that stands for their function.
        failing: Names of functions that return an error.
        streams: Of every product and launch.
        workspaces: Address and bytes of every product.
        launched: Kinds of the kernels.
        multiplied: Names of torch's products.
        open: Devices of the guards that are open.
        errors: What went wrong inside.
    """

    library: SimulatedLibrary = field(default_factory=SimulatedLibrary)
    kernels: dict[int, Kernel] = field(default_factory=dict)
    failing: set[str] = field(default_factory=set)
    streams: list[int] = field(default_factory=list)
    workspaces: list[tuple[int | None, int]] = field(default_factory=list)
    launched: list[LaunchKind] = field(default_factory=list)
    multiplied: list[str] = field(default_factory=list)
    open: dict[int, int] = field(default_factory=dict)
    guards: int = 0
    errors: list[BaseException] = field(default_factory=list)

    def functions(self) -> Functions:
        """As the library takes them. They live as long as this object."""
        self.callbacks = {
            name: ctypes.CFUNCTYPE(ctypes.c_int, *types)(self._safe(name)) for name, types in SIGNATURES.items()
        }
        return Functions(**{name: ctypes.cast(made, _pointer).value for name, made in self.callbacks.items()})

    def reset(self, library: SimulatedLibrary) -> None:
        """As new, for plans of another library."""
        self.library = library
        logs = self.kernels, self.failing, self.streams, self.workspaces, self.launched, self.multiplied
        for log in (*logs, self.open, self.errors):
            log.clear()

    def _safe(self, name: str) -> Callable[..., int]:
        function = getattr(self, name)

        def call(*arguments: Any) -> int:
            try:
                if name in self.failing:
                    return 1
                function(*arguments)
            except simulated.cuSPARSELtError as error:
                return error.status
            except BaseException as error:
                self.errors.append(error)
                return 1
            return 0

        return call

    def matmul(self, handle, plan, alpha, a, b, beta, c, d, workspace, streams, count):
        content = self.library._get("plan", plan)
        assert content["handle"] == handle and c == d and count == 1
        assert ctypes.c_float.from_address(alpha).value == 1 and ctypes.c_float.from_address(beta).value == 0
        assert list(self.open.values()) == [-1]
        self.streams.append(streams[0])
        self.workspaces.append((workspace, self.library.workspace))
        if self.library.workspace:
            ctypes.memset(workspace, 0xFF, self.library.workspace)
        matmul = self.library._get("matmul", content["matmul"])
        (rows, reduction, *_, kind, _), of_b, of_d = (self.library._get("matrix", m) for m in matmul["matrices"])
        dtype, size = DTYPES[kind], compressed_bytes(rows, reduction, DTYPES[kind].itemsize)
        left = sm90_unpack(read(a, (size,), torch.uint8), rows, reduction, dtype)
        matrix = rows, reduction, dtype.itemsize
        simulated.read_behind(a, sm90_layout(dtype).buffer_bytes(*matrix), packed_bytes(*matrix))
        shape_b, shape_d = (m[:2] if m[4] == 2 else m[1::-1] for m in (of_b, of_d))
        right = read(b, shape_b, dtype)
        sums = left.float() @ (right if of_b[4] == 2 else right.mT).float()
        bias = matmul["bias"] if self.library.follows_bias else content["bias"]
        if bias:
            sums += read(bias, (rows, 1), dtype).float()
        write(d, (sums if of_d[4] == 2 else sums.mT).to(DTYPES[of_d[3]]).reshape(shape_d))

    def set_attribute(self, handle, descriptor, attribute, value, size):
        self.library.matmul_desc_set_attribute(handle, descriptor, attribute, value, size)

    def launch_kernel(self, function, x, y, z, block_x, block_y, block_z, shared, stream, parameters, extra):
        assert (x, y, z, block_x, block_y, block_z, shared, extra) == (2, 3, 1, 128, 1, 1, 1024, None)
        assert list(self.open.values()) == [-1]
        kernel = self.kernels[function]
        count = len(kernel.pointers) + 5
        kernel.run([ctypes.c_int64.from_address(parameters[n]).value for n in range(count)])
        self.streams.append(stream)
        self.launched.append(kernel.kind)

    def fill(self, address, value, size, stream):
        assert size > 0 and list(self.open.values()) == [-1]
        ctypes.memset(address, value, size)
        self.streams.append(stream)

    def current_stream(self, device, stream):
        assert list(self.open.values()) == [device]
        stream[0] = STREAM - 1 - device

    def open_guard(self, device, guard):
        self.guards += 1
        self.open[self.guards] = device
        guard[0] = self.guards

    def close_guard(self, guard):
        del self.open[guard]

    def mm(self, *operands):
        self._torch("mm", *operands)

    def addmm(self, *operands):
        self._torch("addmm", *operands)

    def scaled_mm(self, *operands):
        self._torch("_scaled_mm", *operands)

    def _torch(self, name, *operands):
        assert list(self.open.values()) == [-1]
        function = getattr(TORCH, f"aoti_torch_cpu_{name}_out")
        function.argtypes = SIGNATURES[name.removeprefix("_")]
        assert function(*operands) == 0
        self.multiplied.append(name)
