"""The ops with the masks of recipes: held tile codes, the soft threshold and the greedy masks."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from semisparse import ops
from semisparse.errors import ConfigError, ShapeError, TensorError
from semisparse.formats.layout import packed_bytes
from semisparse.ops.masks import prune_anywhere
from semisparse.reference import linear, masks
from semisparse.testing import DTYPES, HALF_DTYPES, assert_as_good_as_torch, assert_bit_equal
from tests.reference import brute
from tests.support import MaskArguments, brute_mask

pytestmark = pytest.mark.usefixtures("poison")

CHOSEN = ["transposable", "row", "greedy", "signed_greedy"]
ALL = [*CHOSEN, "codes", "soft"]  # "codes": a transposable mask that is given as codes
BOTH_WAYS = ["transposable", "greedy", "signed_greedy", "codes"]
TILE_CODES, PRUNE, PACK, PACK_TRANSPOSE = (
    getattr(torch.ops.semisparse, name).default for name in ("tile_codes", "prune", "pack", "pack_transpose")
)
SCALE = 1.1875  # exact in fp32, and most products with it must be rounded


def brute_of(matrix: Tensor, mask: str) -> Tensor:
    """The mask of a matrix by brute force, whatever its name."""
    values = matrix.detach().float().numpy()
    if mask == "transposable":
        return brute_mask(matrix)
    if mask == "row":
        return torch.tensor(np.stack([brute.row(group) for group in values.reshape(-1, 4)])).view(matrix.shape)
    tiles = np.stack([brute.greedy(tile, mask == "signed_greedy") for tile in brute.to_tiles(values)])
    return torch.from_numpy(brute.from_tiles(tiles, *values.shape))


def arguments_for(matrix: Tensor, setting: str) -> MaskArguments:
    """The mask, with the codes of another matrix's best tiles for "codes" and a scale for "soft"."""
    if setting == "soft":
        return MaskArguments("soft", scale=torch.tensor(SCALE))
    if setting == "codes":
        other = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(5))
        return MaskArguments("transposable", masks.to_codes(brute_mask(other)).to(torch.int16))
    return MaskArguments(setting)


def calls(op: torch._ops.OpOverload, matrix: Tensor) -> dict[str, tuple[object, ...]]:
    """Arguments of op for each mask it takes."""
    if op is TILE_CODES:
        return {mask: (matrix, mask) for mask in CHOSEN}
    dtype, known = torch.bfloat16, BOTH_WAYS if op is PACK_TRANSPOSE else ALL
    return {mask: (matrix, dtype, *arguments_for(matrix, mask)) for mask in known}


MATRICES = {
    "square": lambda: torch.randn(16, 16),
    "wide_bf16": lambda: torch.randn(16, 48).bfloat16(),
    "transposed": lambda: torch.randn(48, 32).mT,
    "needs_grad": lambda: torch.randn(32, 16, requires_grad=True),
}
CASES = [
    (op, name, mask)
    for op, known in ((TILE_CODES, CHOSEN), (PRUNE, ALL), (PACK, ALL), (PACK_TRANSPOSE, BOTH_WAYS))
    for name in MATRICES
    for mask in known
]
EVERY_CASE = pytest.mark.parametrize(
    ("op", "name", "mask"), CASES, ids=lambda part: getattr(part, "name", lambda: part)()
)


@pytest.mark.filterwarnings("ignore:.*is non-deterministic.*")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # read by torch 2.15's opcheck
@EVERY_CASE
def test_opcheck(op: torch._ops.OpOverload, name: str, mask: str) -> None:
    torch.library.opcheck(op, calls(op, MATRICES[name]())[mask])


@EVERY_CASE
def test_fake_and_meta_agree_with_the_real_result(op: torch._ops.OpOverload, name: str, mask: str) -> None:
    arguments = calls(op, MATRICES[name]())[mask]
    real = op(*arguments)
    mode = FakeTensorMode()
    with mode:
        fake = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
    meta = op(*(a.to("meta") if isinstance(a, Tensor) else a for a in arguments))
    results = [(result,) if isinstance(result, Tensor) else result for result in (real, fake, meta)]
    for ours, faked, abstract in zip(*results, strict=True):
        for other in (faked, abstract):
            assert (other.shape, other.dtype, other.stride()) == (ours.shape, ours.dtype, ours.stride())
        assert (faked.device.type, abstract.device.type) == ("cpu", "meta")
        assert ours.is_contiguous() and ours.requires_grad is (op is PRUNE and name == "needs_grad")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", CHOSEN)
def test_tile_codes_describe_the_mask(mask: str, dtype: torch.dtype) -> None:
    for matrix in (torch.randn(24, 36).to(dtype), torch.randint(-3, 4, (24, 36)).to(dtype), torch.randn(8, 12).mT):
        codes = ops.tile_codes(matrix, mask)
        assert codes.dtype == torch.int16 and codes.is_contiguous()
        assert torch.equal(masks.from_codes(codes), brute_of(matrix, mask))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["greedy", "signed_greedy", "codes"])
def test_prune_chooses_before_rounding_and_rounds_once(mask: str, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    matrix = torch.randn(24, 36).to(dtype)
    given = arguments_for(matrix, mask)
    kept = brute_of(matrix, mask) if given.codes is None else masks.from_codes(given.codes)
    assert_bit_equal(ops.prune(matrix, out_dtype, *given), torch.where(kept, matrix, 0).to(out_dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_soft_prune_is_computed_wide_and_rounded_once(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    matrix, scale = torch.randn(24, 36).to(dtype), torch.tensor(SCALE)
    wide = matrix.to(torch.promote_types(dtype, torch.float32))
    pruned = ops.prune(matrix, out_dtype, "soft", scale=scale)
    assert_bit_equal(pruned, linear.soft_threshold(wide, scale).to(out_dtype))
    if out_dtype.itemsize <= wide.dtype.itemsize:
        exact = linear.soft_threshold(matrix.double(), scale)
        assert_as_good_as_torch(pruned, exact.to(out_dtype), exact)
    if dtype in HALF_DTYPES and out_dtype == dtype:
        twice = linear.soft_threshold(matrix, 1.0) * scale
        assert not torch.equal(pruned, twice)


def test_codes_do_not_follow_the_matrix() -> None:
    matrix = torch.randn(16, 32)
    codes = ops.tile_codes(matrix, "transposable")
    first = ops.prune(matrix, torch.float32, "transposable", codes)
    assert_bit_equal(first, ops.prune(matrix, torch.float32, "transposable"))
    other = torch.randn(16, 32)
    assert_bit_equal(ops.prune(other, torch.float32, "transposable", codes), torch.where(brute_mask(matrix), other, 0))
    assert not torch.equal(brute_mask(matrix), brute_mask(other))


@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("mask", ALL)
def test_unpacking_what_was_packed_is_pruning(mask: str, dtype: torch.dtype, source: torch.dtype) -> None:
    for matrix in (torch.randn(32, 48).to(source), torch.randint(-2, 3, (32, 48)).to(source)):
        given = arguments_for(matrix, mask)
        pruned = ops.prune(matrix, dtype, *given)
        packed, packed_t = ops.pack(matrix, dtype, *given)
        assert_bit_equal(ops.unpack(packed, 32, 48, dtype), pruned)
        if mask in BOTH_WAYS:
            assert packed_t.numel() == packed_bytes(48, 32)
            assert_bit_equal(ops.unpack(packed_t, 48, 32, dtype), pruned.mT.contiguous())
            assert_bit_equal(ops.pack_transpose(matrix, dtype, *given), packed_t)
        else:
            assert packed_t.numel() == 0
            with pytest.raises(ConfigError, match=f"mask='{mask}' is 2:4 along the columns only"):
                ops.pack_transpose(matrix, dtype, *given)


@pytest.mark.parametrize("mask", ALL)
def test_results_never_alias_an_input_and_leave_what_is_held_alone(mask: str) -> None:
    matrix = torch.zeros(16, 16)
    given = arguments_for(matrix, mask)
    before = given.held
    ops.prune(matrix, torch.float32, *given).fill_(1)
    for buffer in ops.pack(matrix, torch.bfloat16, *given):
        buffer.fill_(1)
    if mask in BOTH_WAYS:
        ops.pack_transpose(matrix, torch.bfloat16, *given).fill_(1)
    assert not matrix.any()
    for name, tensor in given.held.items():
        assert tensor is None or torch.equal(tensor, before[name])


CODES = torch.zeros(4, 4, dtype=torch.int16)
BAD_HELD = {
    "scale_missing": (ConfigError, "needs its scale: start its recipe", lambda: MaskArguments("soft")),
    "row_codes": (ConfigError, "mask='row' cannot be given as codes", lambda: MaskArguments("row", CODES)),
    "soft_codes": (ConfigError, "mask='soft' cannot be given as codes", lambda: MaskArguments("soft", CODES)),
    "row_scale": (ConfigError, "mask='row' takes no scale", lambda: MaskArguments("row", scale=torch.tensor(1.0))),
    "codes_dtype": (TensorError, r"codes is torch\.int32 on cpu", lambda: MaskArguments("transposable", CODES.int())),
    "codes_shape": (
        ShapeError,
        r"codes has shape \(4, 3\); for a \(16, 16\) weight it must be \(4, 4\)",
        lambda: MaskArguments("transposable", CODES[:, :3]),
    ),
    "codes_flat": (ShapeError, r"codes has shape \(16,\)", lambda: MaskArguments("transposable", CODES.view(-1))),
    "scale_dtype": (TensorError, r"torch\.float64", lambda: MaskArguments("soft", scale=torch.tensor(1.0).double())),
    "scale_shape": (ShapeError, r"scale has shape \(1,\)", lambda: MaskArguments("soft", scale=torch.ones(1))),
    "scale_codes": (TensorError, "int16", lambda: MaskArguments("soft", scale=CODES)),
}


@pytest.mark.parametrize("case", BAD_HELD)
def test_what_is_held_is_checked(case: str) -> None:
    error, message, make = BAD_HELD[case]
    with pytest.raises(error, match=message):
        ops.prune(torch.ones(16, 16), torch.float32, *make())
    for pack in (ops.pack, ops.pack_transpose):
        with pytest.raises(error, match=message):
            pack(torch.ones(16, 16), torch.bfloat16, *make())


@pytest.mark.parametrize("mask", ["codes", "soft"])
def test_what_is_held_must_be_on_the_matrix_device(mask: str) -> None:
    # Not through the dispatcher: it would take the meta device for the one to run on.
    matrix = torch.ones(16, 16)
    with pytest.raises(TensorError, match=r"on meta; .* start the recipe after moving the model"):
        prune_anywhere(matrix, torch.float32, *arguments_for(matrix, mask).to("meta"))


BAD_MATRICES = {
    "1-d": (ShapeError, lambda: torch.ones(16)),
    "columns": (ShapeError, lambda: torch.ones(16, 18)),
    "integers": (TensorError, lambda: torch.ones(16, 16, dtype=torch.int64)),
}


@pytest.mark.parametrize("case", BAD_MATRICES)
@pytest.mark.parametrize("mask", ALL)
def test_bad_matrices_raise_typed_errors(mask: str, case: str) -> None:
    error, make = BAD_MATRICES[case]
    with pytest.raises(error, match="matrix"):
        ops.prune(make(), torch.float32, *arguments_for(torch.ones(16, 16), mask))
    if mask in CHOSEN:
        with pytest.raises(error, match="matrix"):
            ops.tile_codes(make(), mask)


@pytest.mark.parametrize("rows", [1, 3, 17])
def test_codes_need_whole_tiles_and_row_wise_masks_any_rows(rows: int) -> None:
    matrix = torch.randn(rows, 16)
    with pytest.raises(ShapeError, match="both sizes must be a multiple of 4"):
        ops.prune(matrix, torch.float32, "transposable", torch.zeros(rows // 4, 4, dtype=torch.int16))
    for mask in CHOSEN:
        with pytest.raises(ShapeError, match="both sizes must be a multiple of 4"):
            ops.tile_codes(matrix, mask)
    assert ops.prune(matrix, torch.float32, "soft", scale=torch.tensor(1.0)).shape == (rows, 16)


@pytest.mark.parametrize("mask", ["sideways", "codes"])
def test_an_unknown_mask_is_named_with_those_there_are(mask: str) -> None:
    matrix = torch.ones(16, 16)
    expected = f"mask='{mask}' is not one of 'transposable', 'row', 'soft', 'greedy', 'signed_greedy'(\n|$)"
    for call in (
        lambda: ops.prune(matrix, torch.float32, mask),
        lambda: ops.pack(matrix, torch.bfloat16, mask),
        lambda: ops.pack_transpose(matrix, torch.bfloat16, mask),
        lambda: ops.tile_codes(matrix, mask),
    ):
        with pytest.raises(ConfigError, match=expected):
            call()
