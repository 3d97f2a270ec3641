"""The interpreter that was made faster is Triton's own in all that can be seen."""

import pytest
import torch
import triton
from triton import language as tl

from tests.arch.source import ROOT
from tests.conftest import GPU_MISSING
from tests.interpreting import VERSION

pytestmark = pytest.mark.skipif(not GPU_MISSING, reason="kernels are compiled where there is a GPU")


@triton.jit
def _twice(values):
    return tl.sum(values + values, axis=0)


@triton.jit
def _sums(source, sums, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(sums + tl.program_id(0), _twice(tl.load(source + at)) + _twice(tl.load(source + SIZE + at)))


def test_it_is_made_faster_with_the_triton_that_is_pinned() -> None:
    assert f"triton=={VERSION}" in (ROOT / "constraints-triton.txt").read_text().splitlines()


def test_functions_called_twice_in_each_of_two_launches_compute_the_same_and_the_language_is_as_before() -> None:
    before = dict(vars(tl))
    source, found = torch.arange(32.0), []
    for programs in (1, 3):
        sums = torch.zeros(programs)
        _sums[(programs,)](source, sums, 16)
        found += sums.tolist()
    assert found == [2.0 * source.sum().item()] * 4
    assert dict(vars(tl)) == before


def test_the_name_of_a_tuples_type_is_the_one_that_triton_gives_it() -> None:
    assert tl.tuple_type([tl.int32, tl.float32], ["x", "y"]).name == "[x:int32,y:fp32]"
    assert tl.tuple_type([tl.int32, tl.constexpr(4).type]).name == "[:int32,:constexpr_type[4]]"
