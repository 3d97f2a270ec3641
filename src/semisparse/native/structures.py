"""The structures that C++ and Python share (csrc/functions.h and csrc/prepared.h), and the numbers in its keys."""

import ctypes
from enum import IntEnum

import torch

INTERFACE = 9
"""csrc/interface.h's number: a library of another one is never used."""

MOST_PARAMETERS = 32
"""Most parameters of a kernel."""

DTYPE_CODES = {torch.float16: 5, torch.float32: 6, torch.bfloat16: 15, torch.float8_e4m3fn: 24}
"""torch's ScalarType numbers of the dtypes that keys hold; they are part of its stable ABI."""


class ProductKind(IntEnum):
    """Which product of gemm/problem.py an entry is, or which way to a weight gradient."""

    WEIGHT = 0
    TOKENS = 1
    GRAD_WEIGHT = 2
    SAMPLED = 3
    FP8 = 4
    FP8_SAMPLED = 5
    # Not products, but which way leads to a weight gradient: its entries have no facts.
    SAMPLED_WAY = 6
    WHOLE_WAY = 7


class LaunchKind(IntEnum):
    """Which kernel an entry starts."""

    PACK = 0
    PACK_TOKENS = 1
    UNPACK = 2
    ADD_BIAS = 3
    SAMPLE = 4
    SUM_ROWS = 5
    PACK_TRANSPOSE = 6
    LARGEST = 7
    QUANTISE = 8
    PACK_FP8 = 9
    RESCALE = 10
    SAMPLE_FP8 = 11


class Functions(ctypes.Structure):
    """Addresses of the foreign functions; 0 for one that is not there."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            "matmul",
            "set_attribute",
            "launch_kernel",
            "fill",
            "current_stream",
            "open_guard",
            "close_guard",
            "mm",
            "addmm",
            "scaled_mm",
        )
    ]


class ProductFacts(ctypes.Structure):
    """A product, and what a call must match; sizes in bytes or entries. Without a plan it is masked dense."""

    _fields_ = [
        ("handle", ctypes.c_void_p),
        ("plan", ctypes.c_void_p),
        ("descriptor", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("uses", ctypes.c_void_p),
        ("last_use", ctypes.c_void_p),
        ("packed_bytes", ctypes.c_int64),
        ("workspace", ctypes.c_int64),
        ("a_rows", ctypes.c_int64),
        ("a_columns", ctypes.c_int64),
        ("b_rows", ctypes.c_int64),
        ("b_columns", ctypes.c_int64),
        ("d_rows", ctypes.c_int64),
        ("d_columns", ctypes.c_int64),
        ("b_transposed", ctypes.c_int32),
        ("d_transposed", ctypes.c_int32),
        ("bias_follows", ctypes.c_int32),
    ]


class LaunchFacts(ctypes.Structure):
    """A compiled kernel with grid and sizes. source: index of an address of the call, or -1 for value."""

    _fields_ = [
        ("function", ctypes.c_void_p),
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32),
        ("parameter_count", ctypes.c_int32),
        ("bytes", ctypes.c_int64 * 2),
        ("behind", ctypes.c_int64 * 2),
        ("source", ctypes.c_int32 * MOST_PARAMETERS),
        ("value", ctypes.c_int64 * MOST_PARAMETERS),
    ]
