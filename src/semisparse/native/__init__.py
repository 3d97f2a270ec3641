"""The native launch layer: C++ implementations of the hot ops on CUDA (csrc/), loaded where they were built.

The library holds what Python has prepared (plans of cuSPARSELt, compiled kernels) and starts it without Python. It is
optional: without it the Python implementations of ops/ do the same and take longer on the host.
"""

from semisparse.native.fallback import in_python, typed
from semisparse.native.loading import Status, library, registered, status
from semisparse.native.watching import forget_products, started, started_dense, watch

__all__ = [
    "Status",
    "forget_products",
    "in_python",
    "library",
    "registered",
    "started",
    "started_dense",
    "status",
    "typed",
    "watch",
]
