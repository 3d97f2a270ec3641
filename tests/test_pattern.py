"""The generated tables against counts known beforehand and against brute force."""

from itertools import combinations

import pytest

from semisparse import pattern
from tests.reference import brute


def test_six_row_choices_in_lexicographic_order() -> None:
    assert pattern.ROW_CHOICES == ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
    assert pattern.ROW_BITS == (0b0011, 0b0101, 0b1001, 0b0110, 0b1010, 0b1100)
    assert (pattern.GROUP, pattern.KEPT) == (4, 2)


def test_halves_are_all_36_pairs_under_19_column_counts_in_order_of_first_appearance() -> None:
    assert len(pattern.HALVES) == 19
    pairs = [pair for halves in pattern.HALVES.values() for pair in halves]
    assert sorted(pairs) == [(upper, lower) for upper in range(6) for lower in range(6)]
    firsts = [halves[0] for halves in pattern.HALVES.values()]
    assert firsts == sorted(firsts)
    for counts, halves in pattern.HALVES.items():
        assert list(halves) == sorted(halves)
        for upper, lower in halves:
            kept = [*brute.ROWS[upper], *brute.ROWS[lower]]
            assert counts == tuple(kept.count(column) for column in range(4))
            assert pattern.column_counts(upper, lower) == counts


def test_each_column_count_has_its_complement() -> None:
    for counts in pattern.HALVES:
        assert [a + b for a, b in zip(counts, pattern.complement(counts), strict=True)] == [2, 2, 2, 2]
        assert pattern.complement(counts) in pattern.HALVES


def test_the_90_tiles_are_those_found_by_enumeration() -> None:
    found = {
        int(code)
        for code in brute.CODES
        if brute.BINARY_TILES[code].sum() == 8
        and set(brute.BINARY_TILES[code].sum(0)) == set(brute.BINARY_TILES[code].sum(1)) == {2}
    }
    assert len(pattern.TRANSPOSABLE_TILES) == 90
    assert set(pattern.TRANSPOSABLE_TILES) == found


def test_the_90_tiles_are_closed_under_transposition() -> None:
    def transpose(code: int) -> int:
        return sum((code >> 4 * i + j & 1) << 4 * j + i for i in range(4) for j in range(4))

    assert {transpose(code) for code in pattern.TRANSPOSABLE_TILES} == set(pattern.TRANSPOSABLE_TILES)


def test_tile_code_places_row_i_at_bits_4i() -> None:
    assert pattern.tile_code((0, 5, 2, 3)) == 0b0110_1001_1100_0011


def test_metadata_nibbles_hold_increasing_positions() -> None:
    for first, second in combinations(range(4), 2):
        assert pattern.metadata_nibble(1 << first | 1 << second) == first + 4 * second
    assert [pattern.metadata_nibble(bits) for bits in (0b0001, 0b0010, 0b0100, 0b1000)] == [12, 13, 14, 12]
    assert pattern.metadata_nibble(0) == 0b0100


def test_metadata_table_covers_all_group_masks() -> None:
    assert len(pattern.METADATA_NIBBLES) == 16
    for bits, nibble in enumerate(pattern.METADATA_NIBBLES):
        assert nibble == (pattern.metadata_nibble(bits) if bits.bit_count() <= 2 else None)


@pytest.mark.parametrize("bits", [0b0111, 0b1111])
def test_more_than_two_kept_have_no_metadata(bits: int) -> None:
    with pytest.raises(ValueError, match="at most 2"):
        pattern.metadata_nibble(bits)
