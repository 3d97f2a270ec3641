"""Public helpers for tests and benchmarks: error bounds, inputs with exact products, and shape grids.

The rest of the package does not import it. The helpers take and return plain tensors, so they apply to any layer or
kernel.
"""

from semisparse.testing.bounds import assert_as_good_as_torch, assert_bit_equal, assert_same_up_to_rounding
from semisparse.testing.inputs import DTYPES, HALF_DTYPES, LINEAR_SHAPES, TOKEN_COUNTS, small_integers

__all__ = [
    "DTYPES",
    "HALF_DTYPES",
    "LINEAR_SHAPES",
    "TOKEN_COUNTS",
    "assert_as_good_as_torch",
    "assert_bit_equal",
    "assert_same_up_to_rounding",
    "small_integers",
]
