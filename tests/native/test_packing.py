"""The packing ops in C++: what they start, with which addresses, and when they ask Python."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import Tensor

from semisparse import errors, ops
from semisparse.native.structures import MOST_PARAMETERS, LaunchKind
from semisparse.testing import assert_bit_equal
from tests.native.conftest import Bench
from tests.native.foreign import STREAM
from tests.native.hot import shifted

BF16, HALF, SINGLE = torch.bfloat16, torch.float16, torch.float32
MASKS = ("transposable", "row", "soft", "codes")


def arguments(mask: str) -> tuple[str, Tensor | None, Tensor | None]:
    """Mask, codes and scale of a 32 x 48 matrix."""
    if mask == "codes":
        return "transposable", ops.tile_codes(torch.randn(32, 48), "transposable"), None
    return mask, None, torch.tensor(1.1875) if mask == "soft" else None


def prepare_pack(
    bench: Bench, mask: str, stride: int = 48, dtype: torch.dtype = SINGLE, kind: LaunchKind = LaunchKind.PACK
) -> None:
    name = "transposable" if mask == "codes" else mask
    bench.hot.launch(kind, (dtype, BF16), (32, 48, stride), name, (mask == "codes", mask == "soft"))


def assert_buffers(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for ours, wanted in zip(found, expected, strict=True):
        assert_bit_equal(ours, wanted)


@pytest.mark.parametrize("mask", MASKS)
def test_pack_is_python_until_its_kernel_is_prepared_and_then_cpp(bench: Bench, mask: str) -> None:
    matrix, given = torch.randn(32, 48), arguments(mask)
    expected = ops.pack(matrix, BF16, *given)
    assert_buffers(bench.hot.by_python(lambda: bench.hot.ops.pack(matrix, BF16, *given)), expected)
    prepare_pack(bench, mask)
    assert_buffers(bench.hot.natively(lambda: bench.hot.ops.pack(matrix, BF16, *given)), expected)
    padded = 2 if expected[1].numel() else 1  # buffers whose end no kernel writes, at this size
    assert (bench.hot.foreign.launched, bench.hot.foreign.streams) == ([LaunchKind.PACK], [STREAM] * (padded + 1))
    assert bench.hot.foreign.guards > 0


def test_buffers_without_room_behind_their_metadata_are_not_padded(bench: Bench) -> None:
    matrix = torch.randn(128, 256)
    bench.hot.launch(LaunchKind.PACK, (SINGLE, BF16), (128, 256, 256), "transposable")
    expected = ops.pack(matrix, BF16, "transposable")
    assert_buffers(bench.hot.natively(lambda: bench.hot.ops.pack(matrix, BF16, "transposable")), expected)
    assert bench.hot.foreign.streams == [STREAM]


@pytest.mark.parametrize("mask", ["transposable", "codes"])
def test_the_transpose_alone_is_a_kernel_of_its_own(bench: Bench, mask: str) -> None:
    matrix, given = torch.randn(32, 48), arguments(mask)
    expected = ops.pack(matrix, BF16, *given)[1]
    call = partial(bench.hot.ops.pack_transpose, matrix, BF16, *given)
    prepare_pack(bench, mask)
    assert_bit_equal(bench.hot.by_python(call), expected)  # the kernel that writes both is not it
    prepare_pack(bench, mask, kind=LaunchKind.PACK_TRANSPOSE)
    assert_bit_equal(bench.hot.natively(call), expected)
    assert bench.hot.foreign.launched == [LaunchKind.PACK_TRANSPOSE]
    for other in (matrix.to(HALF), torch.randn(32, 64)[:, :48], shifted(matrix)):
        call = partial(bench.hot.ops.pack_transpose, other, BF16, *given)
        assert_bit_equal(bench.hot.by_python(call), ops.pack_transpose(other, BF16, *given))
    assert bench.hot.foreign.launched == [LaunchKind.PACK_TRANSPOSE]


@pytest.mark.parametrize("tokens", range(1, 18))
def test_pack_tokens_pads_any_number_of_tokens(bench: Bench, tokens: int) -> None:
    x = torch.randn(tokens, 48).to(HALF)
    expected = ops.pack_tokens(x, BF16)
    assert_buffers(bench.hot.by_python(lambda: bench.hot.ops.pack_tokens(x, BF16)), expected)
    bench.hot.launch(LaunchKind.PACK_TOKENS, (HALF, BF16), (tokens, 48, 48))
    assert_buffers(bench.hot.natively(lambda: bench.hot.ops.pack_tokens(x, BF16)), expected)


@pytest.mark.parametrize("dtype", [BF16, HALF])
def test_unpack_gives_the_pruned_matrix(bench: Bench, dtype: torch.dtype) -> None:
    packed, _ = ops.pack(torch.randn(32, 48), dtype, "transposable")
    expected = ops.unpack(packed, 32, 48, dtype)
    assert_bit_equal(bench.hot.by_python(lambda: bench.hot.ops.unpack(packed, 32, 48, dtype)), expected)
    bench.hot.launch(LaunchKind.UNPACK, (None, dtype), (32, 48, 0))
    assert_bit_equal(bench.hot.natively(lambda: bench.hot.ops.unpack(packed, 32, 48, dtype)), expected)
    longer = torch.nn.functional.pad(packed, (0, 64))
    assert_bit_equal(bench.hot.natively(lambda: bench.hot.ops.unpack(longer, 32, 48, dtype)), expected)


def test_rows_at_a_distance_are_another_kernel_and_columns_at_a_distance_are_pythons(bench: Bench) -> None:
    wide, turned = torch.randn(32, 64)[:, :48], torch.randn(48, 32).mT
    prepare_pack(bench, "transposable")
    for matrix in (wide, turned):
        expected = ops.pack(matrix, BF16, "transposable")
        call = partial(bench.hot.ops.pack, matrix, BF16, "transposable")
        assert_buffers(bench.hot.by_python(call), expected)
    prepare_pack(bench, "transposable", stride=64)
    expected = ops.pack(wide, BF16, "transposable")
    assert_buffers(bench.hot.natively(lambda: bench.hot.ops.pack(wide, BF16, "transposable")), expected)


def test_calls_that_differ_in_dtype_mask_size_or_what_is_held_are_not_prepared_by_one_another(bench: Bench) -> None:
    prepare_pack(bench, "transposable")
    codes = arguments("codes")[1]
    matrix = torch.randn(32, 48)
    for other in (
        lambda: bench.hot.ops.pack(matrix.to(HALF), BF16, "transposable"),
        lambda: bench.hot.ops.pack(matrix, HALF, "transposable"),
        lambda: bench.hot.ops.pack(matrix, BF16, "row"),
        lambda: bench.hot.ops.pack(matrix, BF16, "transposable", codes),
        lambda: bench.hot.ops.pack(matrix[:16], BF16, "transposable"),
        lambda: bench.hot.ops.pack_tokens(matrix, BF16),
        lambda: bench.hot.ops.pack(matrix.double(), BF16, "transposable"),
    ):
        bench.hot.by_python(other)
    bench.hot.natively(lambda: bench.hot.ops.pack(matrix, BF16, "transposable"))


def test_a_launch_serves_every_thread(bench: Bench) -> None:
    prepare_pack(bench, "transposable")
    matrix = torch.randn(32, 48)
    with ThreadPoolExecutor(1) as pool:
        bench.hot.natively(lambda: pool.submit(bench.hot.ops.pack, matrix, BF16, "transposable").result())


def test_misaligned_operands_are_pythons(bench: Bench) -> None:
    matrix = torch.randn(32, 48)
    for mask in MASKS:
        prepare_pack(bench, mask)
        name, codes, scale = arguments(mask)
        expected = ops.pack(matrix, BF16, name, codes, scale)
        given = [(shifted(matrix), codes, scale)]
        given += [] if codes is None else [(matrix, shifted(codes), scale)]
        given += [] if scale is None else [(matrix, codes, shifted(scale))]
        for a, b, c in given:
            call = partial(bench.hot.ops.pack, a, BF16, name, b, c)
            assert_buffers(bench.hot.by_python(call), expected)
    packed, _ = ops.pack(matrix, BF16, "transposable")
    bench.hot.launch(LaunchKind.UNPACK, (None, BF16), (32, 48, 0))
    bench.hot.by_python(lambda: bench.hot.ops.unpack(shifted(packed), 32, 48, BF16))
    bench.hot.by_python(lambda: bench.hot.ops.unpack(packed.repeat_interleave(2)[::2], 32, 48, BF16))


@pytest.mark.parametrize("failing", ["launch_kernel", "current_stream", "open_guard"])
def test_what_cuda_refuses_python_does(bench: Bench, failing: str) -> None:
    matrix = torch.randn(32, 48)
    packed, _ = expected = ops.pack(matrix, BF16, "transposable")
    prepare_pack(bench, "transposable")
    bench.hot.launch(LaunchKind.UNPACK, (None, BF16), (32, 48, 0))
    bench.hot.foreign.failing.add(failing)
    assert_buffers(bench.hot.by_python(lambda: bench.hot.ops.pack(matrix, BF16, "transposable")), expected)
    bench.hot.by_python(lambda: bench.hot.ops.unpack(packed, 32, 48, BF16))
    assert bench.hot.foreign.launched == []
    bench.hot.foreign.failing.clear()
    bench.hot.natively(lambda: bench.hot.ops.pack(matrix, BF16, "transposable"))


def test_a_buffer_that_cannot_be_padded_is_pythons(bench: Bench) -> None:
    matrix = torch.randn(32, 48)
    prepare_pack(bench, "transposable")
    bench.hot.foreign.failing.add("fill")
    expected = ops.pack(matrix, BF16, "transposable")
    assert_buffers(bench.hot.by_python(lambda: bench.hot.ops.pack(matrix, BF16, "transposable")), expected)
    assert bench.hot.foreign.launched == []


@pytest.mark.parametrize("place", [0, 1])
def test_what_cannot_be_allocated_python_does(bench: Bench, place: int) -> None:
    matrix = torch.randn(32, 48)
    facts = bench.hot.launch(LaunchKind.PACK, (SINGLE, BF16), (32, 48, 48), "transposable")
    facts.bytes[place] = 1 << 60
    bench.hot.interface.add_launch(LaunchKind.PACK, -1, (6, 15), "transposable", (32, 48, 48), (False, False), facts)
    expected = ops.pack(matrix, BF16, "transposable")
    assert_buffers(bench.hot.by_python(lambda: bench.hot.ops.pack(matrix, BF16, "transposable")), expected)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((8, 12), torch.int16),
        ((12, 8), torch.int16),
        ((8, 8), torch.int16),
        ((8, 12), torch.int32),
        ((96,), torch.int16),
    ],
)
def test_codes_that_do_not_fit_never_reach_the_kernel(bench: Bench, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    prepare_pack(bench, "codes")
    matrix, codes = torch.randn(32, 48), torch.zeros(shape, dtype=dtype)
    fits = shape == (8, 12) and dtype is torch.int16
    codes = arguments("codes")[1] if fits else codes
    call = partial(bench.hot.ops.pack, matrix, BF16, "transposable", codes)
    if fits:
        bench.hot.natively(call)
        return
    with pytest.raises(errors.SemiSparseError, match="codes"):
        call()
    assert (bench.hot.asked, bench.hot.foreign.launched) == (["pack"], [])


@pytest.mark.parametrize("scale", [torch.ones(1), torch.ones((), dtype=torch.float64)], ids=["shape", "dtype"])
def test_a_scale_that_does_not_fit_never_reaches_the_kernel(bench: Bench, scale: Tensor) -> None:
    prepare_pack(bench, "soft")
    with pytest.raises(errors.SemiSparseError, match="scale"):
        bench.hot.ops.pack(torch.randn(32, 48), BF16, "soft", None, scale)
    assert (bench.hot.asked, bench.hot.foreign.launched) == (["pack"], [])


def test_a_buffer_that_is_too_small_is_never_read_behind_its_end(bench: Bench) -> None:
    packed, _ = ops.pack(torch.randn(32, 48), BF16, "transposable")
    bench.hot.launch(LaunchKind.UNPACK, (None, BF16), (32, 48, 0))
    needed = 32 * 48 + 64 * 64 // 8
    bench.hot.natively(lambda: bench.hot.ops.unpack(packed[:needed], 32, 48, BF16))
    bench.hot.python["unpack"] = lambda *_: torch.zeros(32, 48)
    bench.hot.by_python(lambda: bench.hot.ops.unpack(packed[: needed - 1], 32, 48, BF16))
    bench.hot.by_python(lambda: bench.hot.ops.unpack(packed.view(torch.int8), 32, 48, BF16))


def test_empty_matrices_are_pythons(bench: Bench) -> None:
    for rows, columns in ((0, 48), (32, 0)):
        given = torch.randn(rows, columns), BF16, "transposable"
        assert_buffers(bench.hot.by_python(partial(bench.hot.ops.pack, *given)), ops.pack(*given))
        transposed = bench.hot.by_python(partial(bench.hot.ops.pack_transpose, *given))
        assert_bit_equal(transposed, ops.pack_transpose(*given))
    x = torch.randn(0, 48)
    assert_buffers(bench.hot.by_python(lambda: bench.hot.ops.pack_tokens(x, BF16)), ops.pack_tokens(x, BF16))


def test_watched_calls_are_pythons(bench: Bench) -> None:
    prepare_pack(bench, "transposable")
    matrix = torch.randn(32, 48)
    call = partial(bench.hot.ops.pack, matrix, BF16, "transposable")
    bench.hot.interface.watch(1)
    bench.hot.interface.watch(1)
    bench.hot.by_python(call)
    bench.hot.interface.watch(-1)
    bench.hot.by_python(call)
    bench.hot.interface.watch(-1)
    bench.hot.natively(call)


def test_a_kernel_can_have_as_many_parameters_as_python_hands_over(bench: Bench) -> None:
    facts = bench.hot.launch(LaunchKind.UNPACK, (None, BF16), (32, 48, 0))
    facts.parameter_count = MOST_PARAMETERS
    facts.source[7:] = [-1] * (MOST_PARAMETERS - 7)
    bench.hot.interface.add_launch(LaunchKind.UNPACK, -1, (0, 15), "", (32, 48, 0), (False, False), facts)
    packed, _ = ops.pack(torch.randn(32, 48), BF16, "transposable")
    bench.hot.natively(lambda: bench.hot.ops.unpack(packed, 32, 48, BF16))


def test_wrong_matrices_raise_the_typed_error_of_python(bench: Bench) -> None:
    for kind in (LaunchKind.PACK, LaunchKind.PACK_TRANSPOSE):
        prepare_pack(bench, "transposable", kind=kind)
    with pytest.raises(errors.ConfigError, match="mask='row' is 2:4 along the columns only"):
        bench.hot.ops.pack_transpose(torch.randn(32, 48), BF16, "row")
    for matrix, dtype, mask, error in (
        (torch.randn(30, 48), BF16, "transposable", errors.ShapeError),
        (torch.randn(2, 32, 48), BF16, "transposable", errors.ShapeError),
        (torch.ones(32, 48, dtype=torch.int32), BF16, "transposable", errors.TensorError),
        (torch.randn(32, 48), SINGLE, "transposable", errors.TensorError),
        (torch.randn(32, 48), BF16, "no such mask", errors.ConfigError),
        (torch.randn(32, 48), BF16, "soft", errors.ConfigError),
    ):
        for pack in (bench.hot.ops.pack, bench.hot.ops.pack_transpose):
            with pytest.raises(error):
                pack(matrix, dtype, mask)
        assert bench.hot.foreign.launched == []
