"""Masks and packing by brute force, written from the definitions. Imports nothing from the package under test.

Tiles are numpy arrays of shape (n, 4, 4), groups of shape (n, 4), masks bool. Scores are fp32, as the definition says.
"""

import numpy as np

CODES = np.arange(1 << 16)
BINARY_TILES = (CODES[:, None] >> np.arange(16) & 1).reshape(-1, 4, 4).astype(bool)
"""All 65,536 tiles of zeros and ones; bit 4 * i + j of the index is entry (i, j)."""

TRANSPOSABLE = BINARY_TILES[(BINARY_TILES.sum(1) == 2).all(1) & (BINARY_TILES.sum(2) == 2).all(1)]
"""The tiles that keep exactly two entries in each row and each column."""

ROWS = [(a, b) for a in range(4) for b in range(4) if a < b]
"""Which two of four a row keeps: 01, 02, 03, 12, 13, 23."""


def to_tiles(matrix: np.ndarray) -> np.ndarray:
    """(R, C) -> (R/4 * C/4, 4, 4), tiles in row-major order."""
    rows, columns = matrix.shape
    return matrix.reshape(rows // 4, 4, columns // 4, 4).transpose(0, 2, 1, 3).reshape(-1, 4, 4)


def from_tiles(tiles: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The inverse of to_tiles."""
    return tiles.reshape(rows // 4, columns // 4, 4, 4).transpose(0, 2, 1, 3).reshape(rows, columns)


def magnitude(values: np.ndarray) -> np.ndarray:
    """|values| in fp32; a NaN scores as +Inf."""
    scores = np.abs(values.astype(np.float32))
    return np.where(np.isnan(scores), np.float32(np.inf), scores)


def pair_sums(tiles: np.ndarray) -> list[list[np.ndarray]]:
    """fp32 sums of the six pairs of each row: [row][pair] -> (n,)."""
    entries = np.ascontiguousarray(np.moveaxis(magnitude(tiles), 0, -1))
    with np.errstate(over="ignore"):
        return [[entries[i, a] + entries[i, b] for a, b in ROWS] for i in range(4)]


def best_total(tiles: np.ndarray) -> np.ndarray:
    """The largest score over all 90 transposable tiles: pair sums, rows 0+1 and 2+3, then both halves."""
    pairs = pair_sums(tiles)
    best = np.full(len(tiles), -1, np.float32)
    with np.errstate(over="ignore"):
        for kept in TRANSPOSABLE:
            a, b, c, d = (ROWS.index(tuple(np.flatnonzero(kept[i]))) for i in range(4))
            best = np.maximum(best, (pairs[0][a] + pairs[1][b]) + (pairs[2][c] + pairs[3][d]))
    return best


def total(tiles: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The score of the tiles for given masks, one per tile, in the same order of sums."""
    scores = magnitude(tiles)[kept].reshape(-1, 4, 2)
    with np.errstate(over="ignore"):
        rows = scores[:, :, 0] + scores[:, :, 1]
        return (rows[:, 0] + rows[:, 1]) + (rows[:, 2] + rows[:, 3])


def transposable(tiles: np.ndarray) -> np.ndarray:
    """The specified tile, tie rule included: argmax returns the first of equals, lists are in order of enumeration."""
    pairs = pair_sums(tiles)
    halves: dict[tuple[int, ...], list[tuple[int, int]]] = {}  # column counts -> (upper, lower), by first appearance
    for upper in range(6):
        for lower in range(6):
            counts = [0, 0, 0, 0]
            for column in (*ROWS[upper], *ROWS[lower]):
                counts[column] += 1
            halves.setdefault(tuple(counts), []).append((upper, lower))
    assert len(halves) == 19
    with np.errstate(over="ignore"):
        best = {}
        for first_row in (0, 2):
            for counts, choices in halves.items():
                sums = np.stack([pairs[first_row][u] + pairs[first_row + 1][v] for u, v in choices], axis=-1)
                best[first_row, counts] = sums.max(-1), np.array(choices)[sums.argmax(-1)]
        partner = {counts: tuple(2 - count for count in counts) for counts in halves}
        totals = np.stack([best[0, counts][0] + best[2, partner[counts]][0] for counts in halves], axis=-1)
    winner = totals.argmax(-1)
    kept = np.zeros(tiles.shape, bool)
    for index, counts in enumerate(halves):
        chosen = np.flatnonzero(winner == index)
        choices = np.concatenate([best[0, counts][1], best[2, partner[counts]][1]], axis=-1)
        for row in range(4):
            for slot in range(2):
                kept[chosen, row, np.array(ROWS)[choices[chosen, row], slot]] = True
    return kept


def transposable_matrix(matrix: np.ndarray) -> np.ndarray:
    """transposable for a whole matrix (R, C)."""
    return from_tiles(transposable(to_tiles(matrix)), *matrix.shape)


def row(group: np.ndarray) -> np.ndarray:
    """The two largest magnitudes of one group of four; of equals the lower index."""
    scores = magnitude(group)
    kept = np.zeros(4, bool)
    kept[sorted(range(4), key=lambda j: (-scores[j], j))[:2]] = True
    return kept


def greedy(tile: np.ndarray, signed: bool) -> np.ndarray:
    """Entries of one 4x4 tile from the best down, each kept if its row and column hold fewer than two."""
    scores = tile.astype(np.float32) if signed else magnitude(tile)
    kept = np.zeros((4, 4), bool)
    for place in sorted(range(16), key=lambda p: (-scores.flat[p], p)):
        i, j = divmod(place, 4)
        if kept[i].sum() < 2 and kept[:, j].sum() < 2:
            kept[i, j] = True
    return kept


def pack(group: np.ndarray, kept: np.ndarray) -> tuple[list[float], int]:
    """The two stored values of one group and its 4 bits of metadata: first index | second index << 2."""
    places = [j for j in range(4) if kept[j]]
    if places == [3]:
        slots = [0, 3]
    elif len(places) == 1:
        slots = [places[0], 3]
    elif not places:
        slots = [0, 1]
    else:
        slots = places
    return [float(group[j]) if kept[j] else 0.0 for j in slots], slots[0] + 4 * slots[1]
