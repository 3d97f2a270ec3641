"""Facts of the random numbers behind "mvue", shared by specification, kernel and schedule.

Four neighbouring tokens of one output feature are a *group*, and four neighbouring groups a 4x4 *tile*. One evaluation
of Philox4x32-10 gives the four uniforms of a tile. Its key is a layer's 64-bit seed, its counter the tile's row and
column and a fold of its 16 values' bits into two words. So the same gradient at the same step draws the same sample
again (recomputation, replay of a CUDA graph), while micro-batches, which share the seed, differ in their values.
"""

import hashlib

FOLD = 31
"""What the rows of a tile are folded by: word = ((row0 * FOLD + row1) * FOLD + row2) * FOLD + row3 modulo 2^32."""

UNIFORM_BITS = 23
"""Bits of a uniform number, the upper ones of a 32-bit word: k becomes (k + 1/2) 2^-23, exact in fp32 and never 0."""

ROUNDING_BITS = 32 - UNIFORM_BITS
"""The lower bits of the word, which choose nothing: in fp8 they round what is kept."""

ADVANCE = -7046029254386353131
"""Added to every seed when a step was applied: 2^64 divided by the golden ratio, odd, as a signed integer."""


def layer_seed(seed: int, name: str, rank: int, applied_steps: int) -> int:
    """The key of a layer's random numbers.

    Args:
        seed: Of the whole run.
        name: Of the layer.
        rank: In the data-parallel group. Each rank draws its own samples, so that their errors average out.
        applied_steps: Optimizer steps counted so far.

    Returns:
        64 bits as a signed integer. That of the next step is larger by ADVANCE, modulo 2^64.
    """
    first = hashlib.sha256(f"{seed} {rank} {name}".encode()).digest()
    bits = (int.from_bytes(first[:8], "little") + applied_steps * ADVANCE) % 2**64
    return bits - 2**64 if bits >= 2**63 else bits
