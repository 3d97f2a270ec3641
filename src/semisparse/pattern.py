"""Facts of the 2:4 pattern, generated from its definition: row choices, halves and transposable tiles.

A *row choice* keeps 2 of 4 neighbours. A *tile* is 4 x 4 entries, so four row choices describe it. It is
*transposable* if each of its columns keeps exactly 2 as well. A weight of such tiles is 2:4 along both axes, so that
one mask serves the forward pass (groups along K) and the input gradient (groups along N).

A *half* is the upper or lower two rows of a tile. Two halves make a transposable tile exactly if their column counts
add up to (2, 2, 2, 2). The best tile can therefore be found from the best half for each of the 19 possible column-count
vectors, instead of from all 90 tiles (reference/masks.py).
"""

from itertools import combinations, product
from typing import NamedTuple

from torch import Tensor

GROUP = 4
"""Entries in one group; also rows and columns of one tile."""

KEPT = 2
"""Entries kept in each group."""

ROW_CHOICES: tuple[tuple[int, int], ...] = tuple(combinations(range(GROUP), KEPT))  # type: ignore[arg-type]
"""The 6 ways to keep 2 of 4, as (first, second) kept index, in lexicographic order."""

ROW_BITS: tuple[int, ...] = tuple(sum(1 << kept for kept in choice) for choice in ROW_CHOICES)
"""The row choices as 4-bit masks: bit j is set if entry j is kept."""


def column_counts(upper: int, lower: int) -> tuple[int, ...]:
    """Kept entries per column of a half, given by two row choices (indices into ROW_CHOICES)."""
    return tuple((ROW_BITS[upper] >> j & 1) + (ROW_BITS[lower] >> j & 1) for j in range(GROUP))


def _halves() -> dict[tuple[int, ...], tuple[tuple[int, int], ...]]:
    found: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for upper, lower in product(range(len(ROW_CHOICES)), repeat=2):
        found.setdefault(column_counts(upper, lower), []).append((upper, lower))
    return {counts: tuple(pairs) for counts, pairs in found.items()}


HALVES = _halves()
"""Column-count vector -> the (upper, lower) row choices that give it; vectors in order of first appearance."""


def complement(counts: tuple[int, ...]) -> tuple[int, ...]:
    """The column counts that the other half must have for a transposable tile."""
    return tuple(KEPT - count for count in counts)


def tile_code(rows: tuple[int, ...]) -> int:
    """16-bit code of a tile given by four row choices: bit 4 * i + j is set if entry (i, j) is kept."""
    return sum(ROW_BITS[choice] << (GROUP * i) for i, choice in enumerate(rows))


TRANSPOSABLE_TILES: tuple[int, ...] = tuple(
    tile_code((*upper, *lower))
    for counts, uppers in HALVES.items()
    for upper in uppers
    for lower in HALVES[complement(counts)]
)
"""The codes of all 90 transposable tiles."""


def metadata_nibble(bits: int) -> int:
    """Kept positions of one group as the hardware stores them: first kept index | second kept index << 2.

    If fewer than two entries are kept, the pair is filled up so that it stays increasing: a lone index 3 goes to the
    second slot, every other lone index to the first.

    Args:
        bits: A 4-bit mask with at most two bits set.

    Raises:
        ValueError: bits has more than two bits set.
    """
    kept = [j for j in range(GROUP) if bits >> j & 1]
    if len(kept) > KEPT:
        raise ValueError(f"bits={bits:#06b} keeps {len(kept)} of {GROUP}; at most {KEPT} can be stored")
    if not kept:
        kept = [0, 1]
    elif len(kept) == 1:
        kept = [kept[0], GROUP - 1] if kept[0] < GROUP - 1 else [0, kept[0]]
    return kept[0] | kept[1] << 2


METADATA_NIBBLES: tuple[int | None, ...] = tuple(
    metadata_nibble(bits) if bits.bit_count() <= KEPT else None for bits in range(1 << GROUP)
)
"""metadata_nibble of each of the 16 group masks; None if the group keeps more than two."""


class Packed(NamedTuple):
    """A packed matrix (R x C) in logical order, row-major and contiguous.

    Attributes:
        values: The kept entries, R x C/2 in the packed dtype.
        nibbles: metadata_nibble per group, R x C/4, uint8 (0 to 15).
    """

    values: Tensor
    nibbles: Tensor
