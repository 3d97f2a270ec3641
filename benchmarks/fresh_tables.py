"""How much longer dense takes beside 2:4 than before any sparse product of its process, as far as results know both."""

from collections.abc import Sequence
from typing import Any

from benchmarks.compare_tables import ran_sparse
from benchmarks.origin import gpu
from benchmarks.table import Table
from benchmarks.tables import is_fresh, label, size

Result = dict[str, Any]

KINDS = ("compare-model", "compare-linear", "end-to-end", "linear")
"""Kinds of results of whole steps and single layers."""

INTRO = (
    "Dense steps and eager layers before anything sparse ran in their process, and beside 2:4 where that ran, too. "
    "Several lines of one step or layer are of several processes."
)


def table(results: Sequence[Result]) -> Table:
    """A line per process that timed dense before anything sparse.

    Args:
        results: Of KINDS; those that do not know it are left out.
    """
    rows = []
    for result in filter(is_fresh, results):
        name, fresh = next(iter(result["fresh_ms"].items()))
        digits, what = (3, size(result["mkn"])) if "mkn" in result else (1, label(result))
        beside = result["times_ms"][name]["median_ms"]
        sparse = result["kind"] in ("end-to-end", "linear") or ran_sparse(result)
        more = (f"{beside:.{digits}f}", f"{100 * (beside / fresh - 1):+.1f} %") if sparse else ("", "")
        rows.append((what, f"{fresh:.{digits}f}", *more, gpu(result)))
    columns = ("dense step or layer", "before, ms", "beside 2:4, ms", "longer", "GPU")
    return Table(columns, tuple(sorted(rows)))
