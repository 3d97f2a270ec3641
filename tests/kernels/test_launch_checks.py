"""What the pack kernel cannot take is refused by name; what was compiled for a dtype serves that dtype only."""

import pytest
import torch

from semisparse import masks
from semisparse.errors import ConfigError, ShapeError, TensorError
from semisparse.formats.layout import SM90_16BIT, MetadataLayout
from semisparse.kernels import bias, prune_pack, tile_codes
from semisparse.kernels.launch_checks import check_buffer, check_choice, check_held, check_sizes
from semisparse.kernels.prune_pack import DEFAULT_BLOCK, Block, check_block

BF16, FP16 = torch.bfloat16, torch.float16


def sizes(rows=32, rows_padded=32, columns=32, types=(BF16, BF16), mask="row", transposed=False, block=DEFAULT_BLOCK):
    check_sizes(rows, rows_padded, columns, types, masks.get(mask), transposed)
    check_block(block, SM90_16BIT)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": 33}, ShapeError, "matrix is 33 x 32, padded to 32 rows"),
        ({"rows_padded": 40}, ShapeError, "padded to 40 rows; both must be multiples of 16"),
        ({"columns": 40}, ShapeError, "matrix is 32 x 40"),
        ({"types": (torch.float64, BF16)}, TensorError, "matrix is torch.float64"),
        ({"types": (BF16, torch.float32)}, TensorError, "packed as torch.float32"),
        ({"transposed": True}, ConfigError, "mask='row' keeps 2:4 along the columns only: pass packed_t=None"),
        ({"transposed": True, "mask": "soft"}, ConfigError, "mask='soft' keeps 2:4 along the columns only"),
        ({"block": Block(tile_rows=8, pairs=8)}, ConfigError, "whole metadata blocks of 64 rows x 8 groups"),
        ({"block": Block(tile_rows=16, pairs=4)}, ConfigError, "whole metadata blocks of 64 rows x 8 groups"),
        ({"block": Block(tile_rows=20, pairs=8)}, ConfigError, "whole metadata blocks of 64 rows x 8 groups"),
    ],
)
def test_sizes_that_do_not_fit(change, error, message):
    sizes()
    with pytest.raises(error) as caught:
        sizes(**change)
    assert message in str(caught.value)


def test_a_block_must_hold_whole_metadata_blocks_along_both_axes_of_both_results():
    """Blocks of 4 rows x 32 groups: 64 rows x 16 groups hold no whole one, though 64 rows are 16 times 4."""
    with pytest.raises(ConfigError, match="whole metadata blocks of 4 rows x 32 groups"):
        check_block(DEFAULT_BLOCK, MetadataLayout((0, 1, 32, 33, 34, 35, 36)))


@pytest.mark.parametrize(
    ("codes", "error", "message"),
    [
        (torch.zeros(8, 16, dtype=torch.int32), TensorError, "contiguous int16"),
        (torch.zeros(16, 8, dtype=torch.int16).mT, TensorError, "contiguous int16"),
        (torch.zeros(16, 8, dtype=torch.int16), ShapeError, "codes has shape (16, 8); it must be (8, 16)"),
    ],
)
def test_codes_that_do_not_fit(codes, error, message):
    check_held(torch.zeros(8, 16, dtype=torch.int16), None, 32, 64)
    with pytest.raises(error) as caught:
        check_held(codes, None, 32, 64)
    assert message in str(caught.value)


@pytest.mark.parametrize("scale", [torch.ones(2), torch.ones(1, dtype=torch.float64)])
def test_a_scale_that_does_not_fit(scale):
    check_held(None, torch.ones(()), 32, 64)
    with pytest.raises(TensorError, match="it must be one float32 element"):
        check_held(None, scale, 32, 64)


@pytest.mark.parametrize(
    ("mask", "given", "message"),
    [
        ("row", (True, False), "mask='row' cannot be given as codes"),
        ("soft", (False, False), "mask='soft' needs a scale"),
        ("row", (False, True), "mask='row' takes no scale"),
        (
            "greedy",
            (False, False),
            "mask='greedy' is not chosen by this kernel; use one of 'transposable', 'row', 'soft'",
        ),
    ],
)
def test_a_mask_gets_exactly_what_it_needs(mask, given, message):
    with pytest.raises(ConfigError, match=message):
        check_choice(masks.get(mask), *given)


def test_a_buffer_needs_whole_blocks_to_the_last_byte():
    needed = 48 * 80 + 64 * 24 // 2
    check_buffer("packed", torch.empty(needed, dtype=torch.uint8), 48, 80, SM90_16BIT)
    with pytest.raises(ShapeError, match=f"packed has {needed - 1} bytes; a 48 x 80 matrix needs {needed}"):
        check_buffer("packed", torch.empty(needed - 1, dtype=torch.uint8), 48, 80, SM90_16BIT)
    for wrong in (torch.empty(needed, dtype=torch.int8), torch.empty(2 * needed, dtype=torch.uint8)[::2]):
        with pytest.raises(TensorError, match="contiguous uint8"):
            check_buffer("packed", wrong, 48, 80, SM90_16BIT)


def test_a_kernel_that_was_compiled_for_a_dtype_never_serves_another():
    """The interpreter compiles nothing, so on the CPU only the key of the launcher can show it."""
    assert bias._prepare(16, 16, BF16) is not bias._prepare(16, 16, FP16)
    codes = [tile_codes._prepare(4, 4, 16, 1, 2, dtype) for dtype in (torch.float32, BF16, FP16)]
    assert len({id(launcher) for launcher in codes}) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors need the interpreter")
def test_each_launch_asks_for_the_launcher_of_its_dtype(monkeypatch):
    asked = []
    for kernel in (bias, tile_codes, prune_pack):
        launcher = (lambda *_: None, (0, 0)) if kernel is prune_pack else lambda *_: None
        monkeypatch.setattr(kernel, "_prepare", lambda *key, result=launcher, **more: asked.append(key) or result)
    for dtype in (BF16, FP16):
        matrix = torch.zeros(64, 64, dtype=dtype)
        bias.launch(matrix, matrix[0])
        tile_codes.launch(matrix, torch.zeros(16, 16, dtype=torch.int16), mask="row")
        packed = torch.zeros(64 * 72, dtype=torch.uint8)
        prune_pack.launch(matrix, packed, None, dtype=BF16, layout=SM90_16BIT, mask="row")
    assert len(set(map(repr, asked))) == 6


@pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors need the interpreter")
@pytest.mark.parametrize("columns", [96, 100, 104])
def test_rows_that_are_not_16_byte_aligned_are_copied_first(monkeypatch, columns):
    """A GPU reads 16 bytes at once; the interpreter would not mind."""
    asked = []
    monkeypatch.setattr(
        prune_pack, "_prepare", lambda sizes, *_, **more: asked.append(sizes) or (lambda *_: None, (0, 0))
    )
    matrix, packed = torch.zeros(64, columns, dtype=BF16)[:, :96], torch.zeros(64 * 96 * 9 // 8, dtype=torch.uint8)
    prune_pack.launch(matrix, packed, None, dtype=BF16, layout=SM90_16BIT, mask="row")
    assert asked == [(64, 64, 96, 26 if columns == 104 else 24)]
