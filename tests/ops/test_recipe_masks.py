"""The ops with the masks of recipes: frozen tile codes, the soft threshold and the greedy masks."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from semisparse import cpu_ops, ops
from semisparse.errors import ConfigError, ShapeError, TensorError
from semisparse.formats.layout import packed_bytes
from semisparse.reference import linear, masks
from semisparse.testing import DTYPES, HALF_DTYPES, assert_as_good_as_torch, assert_bit_equal
from tests.reference import brute
from tests.support import brute_mask

pytestmark = pytest.mark.usefixtures("poison")

CHOSEN = ["transposable", "row", "greedy", "signed_greedy"]
ALL = [*CHOSEN, "codes", "soft"]
TILE_CODES, PRUNE, PACK = (getattr(torch.ops.semisparse, name).default for name in ("tile_codes", "prune", "pack"))
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


def frozen_for(matrix: Tensor, mask: str) -> Tensor | None:
    """What mask needs frozen: the codes of another matrix's best tiles, or a scale."""
    if mask == "soft":
        return torch.tensor(SCALE)
    if mask == "codes":
        other = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(5))
        return masks.to_codes(brute_mask(other)).to(torch.int16)
    return None


def calls(op: torch._ops.OpOverload, matrix: Tensor) -> dict[str, tuple[object, ...]]:
    """Arguments of op for each mask it takes."""
    if op is TILE_CODES:
        return {mask: (matrix, mask) for mask in CHOSEN}
    dtype = torch.bfloat16
    return {mask: (matrix, dtype, mask, frozen_for(matrix, mask)) for mask in ALL}


MATRICES = {
    "square": lambda: torch.randn(16, 16),
    "wide_bf16": lambda: torch.randn(16, 48).bfloat16(),
    "transposed": lambda: torch.randn(48, 32).mT,
    "needs_grad": lambda: torch.randn(32, 16, requires_grad=True),
}
CASES = [(op, name, mask) for op, known in ((TILE_CODES, CHOSEN), (PRUNE, ALL), (PACK, ALL))
         for name in MATRICES for mask in known]  # fmt: skip
EVERY_CASE = pytest.mark.parametrize(
    ("op", "name", "mask"), CASES, ids=lambda part: getattr(part, "name", lambda: part)()
)


@pytest.mark.filterwarnings("ignore:.*is non-deterministic.*")
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
        assert ours.is_contiguous() and not ours.requires_grad


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
    frozen = frozen_for(matrix, mask)
    kept = brute_of(matrix, mask) if frozen is None else masks.from_codes(frozen)
    assert_bit_equal(ops.prune(matrix, out_dtype, mask, frozen), torch.where(kept, matrix, 0).to(out_dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_soft_prune_is_computed_wide_and_rounded_once(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    matrix, scale = torch.randn(24, 36).to(dtype), torch.tensor(SCALE)
    wide = matrix.to(torch.promote_types(dtype, torch.float32))
    pruned = ops.prune(matrix, out_dtype, "soft", scale)
    assert_bit_equal(pruned, linear.soft_threshold(wide, scale).to(out_dtype))
    if out_dtype.itemsize <= wide.dtype.itemsize:
        exact = linear.soft_threshold(matrix.double(), scale)
        assert_as_good_as_torch(pruned, exact.to(out_dtype), exact)
    if dtype in HALF_DTYPES and out_dtype == dtype:
        twice = linear.soft_threshold(matrix, 1.0) * scale
        assert not torch.equal(pruned, twice)


def test_frozen_codes_do_not_follow_the_matrix() -> None:
    matrix = torch.randn(16, 32)
    codes = ops.tile_codes(matrix, "transposable")
    first = ops.prune(matrix, torch.float32, "codes", codes)
    assert_bit_equal(first, ops.prune(matrix, torch.float32, "transposable"))
    other = torch.randn(16, 32)
    assert_bit_equal(ops.prune(other, torch.float32, "codes", codes), torch.where(brute_mask(matrix), other, 0))
    assert not torch.equal(brute_mask(matrix), brute_mask(other))


@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("mask", ALL)
def test_unpacking_what_was_packed_is_pruning(mask: str, dtype: torch.dtype, source: torch.dtype) -> None:
    for matrix in (torch.randn(32, 48).to(source), torch.randint(-2, 3, (32, 48)).to(source)):
        frozen = frozen_for(matrix, mask)
        pruned = ops.prune(matrix, dtype, mask, frozen)
        packed, packed_t = ops.pack(matrix, dtype, mask, frozen)
        assert_bit_equal(ops.unpack(packed, 32, 48, dtype), pruned)
        if mask in ("row", "soft"):
            assert packed_t.numel() == 0
        else:
            assert packed_t.numel() == packed_bytes(48, 32)
            assert_bit_equal(ops.unpack(packed_t, 48, 32, dtype), pruned.mT.contiguous())


@pytest.mark.parametrize("mask", ALL)
def test_results_never_alias_an_input_and_leave_frozen_alone(mask: str) -> None:
    matrix = torch.zeros(16, 16)
    frozen = frozen_for(matrix, mask)
    before = None if frozen is None else frozen.clone()
    ops.prune(matrix, torch.float32, mask, frozen).fill_(1)
    for buffer in ops.pack(matrix, torch.bfloat16, mask, frozen):
        buffer.fill_(1)
    assert not matrix.any()
    assert frozen is None or (before is not None and torch.equal(frozen, before))


CODES = torch.zeros(4, 4, dtype=torch.int16)
BAD_FROZEN = {
    "codes_missing": (ConfigError, "codes", "needs what a recipe froze", lambda: None),
    "soft_missing": (ConfigError, "soft", "needs what a recipe froze", lambda: None),
    "codes_dtype": (TensorError, "codes", r"frozen is torch\.int32 on cpu", lambda: CODES.int()),
    "codes_shape": (ShapeError, "codes", r"frozen has shape \(4, 3\).*needs \(4, 4\)", lambda: CODES[:, :3]),
    "codes_flat": (ShapeError, "codes", r"frozen has shape \(16,\)", lambda: CODES.view(-1)),
    "codes_scale": (TensorError, "codes", "float32", lambda: torch.tensor(1.0)),
    "soft_dtype": (TensorError, "soft", r"torch\.float64", lambda: torch.tensor(1.0).double()),
    "soft_shape": (ShapeError, "soft", r"frozen has shape \(1,\)", lambda: torch.ones(1)),
    "soft_codes": (TensorError, "soft", "int16", lambda: CODES),
}


@pytest.mark.parametrize("case", BAD_FROZEN)
def test_what_is_frozen_is_checked(case: str) -> None:
    error, mask, message, make = BAD_FROZEN[case]
    with pytest.raises(error, match=message):
        ops.prune(torch.ones(16, 16), torch.float32, mask, make())
    with pytest.raises(error, match=message):
        ops.pack(torch.ones(16, 16), torch.bfloat16, mask, make())


@pytest.mark.parametrize("mask", ["codes", "soft"])
def test_what_is_frozen_must_be_on_the_matrix_device(mask: str) -> None:
    # Not through the dispatcher: it would take the meta device for the one to run on.
    matrix = torch.ones(16, 16)
    frozen = frozen_for(matrix, mask)
    assert frozen is not None
    with pytest.raises(TensorError, match=r"on meta; .* start the recipe after moving the model"):
        cpu_ops.prune(matrix, torch.float32, mask, frozen.to("meta"))


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
        ops.prune(make(), torch.float32, mask, torch.tensor(1.0) if mask == "soft" else CODES)
    if mask in CHOSEN:
        with pytest.raises(error, match="matrix"):
            ops.tile_codes(make(), mask)


@pytest.mark.parametrize("rows", [1, 3, 17])
def test_codes_need_whole_tiles_and_row_wise_masks_any_rows(rows: int) -> None:
    matrix = torch.randn(rows, 16)
    with pytest.raises(ShapeError, match="both sizes must be a multiple of 4"):
        ops.prune(matrix, torch.float32, "codes", torch.zeros(rows // 4, 4, dtype=torch.int16))
    for mask in CHOSEN:
        with pytest.raises(ShapeError, match="both sizes must be a multiple of 4"):
            ops.tile_codes(matrix, mask)
    assert ops.prune(matrix, torch.float32, "soft", torch.tensor(1.0)).shape == (rows, 16)


def test_an_unknown_mask_is_named_with_those_there_are() -> None:
    matrix = torch.ones(16, 16)
    everything = "'transposable', 'row', 'greedy', 'signed_greedy', 'codes', 'soft'$"
    with pytest.raises(ConfigError, match=f"mask='sideways' is not one of {everything}"):
        ops.prune(matrix, torch.float32, "sideways")
    with pytest.raises(ConfigError, match=f"mask='sideways' is not one of {everything}"):
        ops.pack(matrix, torch.bfloat16, "sideways")
    for mask in ("sideways", "soft", "codes"):
        with pytest.raises(ConfigError, match=f"mask='{mask}' is not one of .*'signed_greedy'$"):
            ops.tile_codes(matrix, mask)
