"""The structures of native/structures.py are those of C++, field by field."""

import ctypes

import pytest
import torch

from semisparse.native import structures
from tests.native.conftest import Bench


@pytest.mark.parametrize("structure", [structures.Functions, structures.ProductFacts, structures.LaunchFacts])
def test_sizes_and_offsets_agree(bench: Bench, structure: type[ctypes.Structure]) -> None:
    name = structure.__name__.encode()
    offset = bench.hot.offset
    assert offset(name, b"sizeof") == ctypes.sizeof(structure)
    for field, *_ in structure._fields_:
        assert offset(name, field.encode()) == getattr(structure, field).offset, field
    assert offset(name, b"no such field") == -1


def test_dtype_codes_are_torchs() -> None:
    """C++ sees dtypes as torch's numbers; a wrong one would never be found."""
    for dtype, code in structures.DTYPE_CODES.items():
        assert torch.ops.aten.empty.memory_format([0], dtype=code).dtype is dtype
