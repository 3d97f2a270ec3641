"""The tables of dense, torchao float8, 2:4 and 2:4 with a sampled gradient beside each other."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks import tables
from benchmarks.compare import DENSE, ROWS, SPARSE
from benchmarks.float8 import INSTALL
from benchmarks.origin import gpu
from benchmarks.sampling import COPY, DENSE_PRODUCT, SAMPLE, SAMPLE_BIAS, SPARSE_PRODUCT, WHOLE
from benchmarks.table import Table
from semisparse import recipes

Result = dict[str, Any]

COMPARED = (
    "Rows interleaved and sustained, each from its newest run that timed dense before any sparse product, or else from "
    "its newest; *dense / this* above 1 means faster than that dense bf16, unless the ratio is marked. Packing, "
    "sampling and casting are part of each call. *2:4*: weights packed at each forward, or once *per step*. *mvue*: dW "
    'from a sampled gradient (`grad_output="mvue"`). *repacked*: `repack=True`. *dense fp8*, *fp8 + 2:4*: '
    '`precision="fp8"`; with *mvue*, all three products are sparse in fp8. *torchao float8*: tensorwise, dynamic '
    "scaling, compiled. *peak*: what a row holds between calls, parameters and optimizer state included, and what a "
    "call allocates beyond that."
)
SAMPLED = (
    "The parts of the sampled gradient alone, with dense dW beside them. *share*: of the rate of a copy that reads and "
    "writes as many bytes, with nothing in the L2 cache. *ratio*: dense dW / sparse product; *sampled too*: dense dW / "
    "sampling and the sparse product together."
)
GRAPH = "graph: "
SLOWED = "‡"
SLOWED_NOTE = (
    f"{SLOWED}: nothing sparse, but it ran beside 2:4, which slows it, and is compared with dense that was slowed, too."
)
AFTER = "dense fp8 after 2:4"
"""A dense step in fp8 in a process that has run 2:4, as at the end of a run, to dense before any sparse product."""
_TITLES = (DENSE, *(row.title for row in ROWS.values()))
SHORT_ROWS = ("float8", "2:4", "mvue", "fp8-2:4", "fp8-mvue")


def text(layers: Sequence[Result], steps: Sequence[Result]) -> str:
    """All tables of these results with what to know about them, as Markdown."""
    sampled = [one for one in layers if one["parts"]]
    shown = [COMPARED]
    shown += [models(steps).markdown()] if steps else []
    shown += ["One linear layer, forward + backward, bf16 with bias; 2:4 and dense are eager:"] if layers else []
    shown += [linears(layers).markdown()] if layers else []
    shown += [SAMPLED, parts(sampled).markdown()] if sampled else []
    return "\n\n".join(shown)


def linears(results: Sequence[Result]) -> Table:
    """Forward and backward of single linears, a line per shape and row."""
    columns = ("M x K x N", "row", "ms", "dense / this", "p20 to p80", "CUDA graph")
    return _table(results, columns, 3, lambda result, title: _ratio(result, f"{GRAPH}{title}")[:1])


def models(results: Sequence[Result]) -> Table:
    """Whole training steps, a line per model and row."""
    return _table(results, ("training step", "row", "ms", "dense / this", "p20 to p80"), 1, lambda result, title: ())


def _table(
    results: Sequence[Result],
    columns: tuple[str, ...],
    digits: int,
    more: Callable[[Result, str], tuple[str, ...]],
) -> Table:
    rows, notes = [], []
    for (what, card), found in _by_step(results).items():
        for title in _TITLES:
            if (result := _newest(found, title)) is None:
                continue
            times = result["times_ms"]
            ms = tables.dense_ms(result, title, digits) if title == DENSE else f"{times[title]['median_ms']:.{digits}f}"
            memory = _memory(result, title)
            rows.append((what, title, ms, *_ratio(result, title), *more(result, title), *memory, card))
        notes += remarks(found)
    notes = [*tables.beside_note(rows), *slowed_note(rows), *notes]
    made = Table((*columns, "peak MiB", "of dense's", "GPU"), tuple(rows), tuple(dict.fromkeys(notes)))
    return tables.without_empty(made)


def slowed_note(cells: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """What the mark says, where a cell has it."""
    return (SLOWED_NOTE,) if any(cell.endswith(SLOWED) for row in cells for cell in row) else ()


def _newest(results: Sequence[Result], title: str) -> Result | None:
    """The run that a row is taken from: see COMPARED; a row without sparse products best from a run without any."""
    found = [result for result in results if title in result["times_ms"]]
    alone = title not in {DENSE, *SPARSE}
    rated = [(tables.is_fresh(one), alone != ran_sparse(one), place) for place, one in enumerate(found)]
    return found[max(rated)[-1]] if rated else None


def ran_sparse(result: Result) -> bool:
    """Whether a comparison has rows with sparse products."""
    return not SPARSE.isdisjoint(result["times_ms"])


def remarks(results: Sequence[Result]) -> list[str]:
    """What results of one model or layer lack, all together, and why."""
    lacking = [name for name in results[0]["left_out"] if all(name in result["left_out"] for result in results)]
    names = [ROWS[name].title for name in lacking]
    how = f" (--rows names it; it needs `{INSTALL}`)" if "float8" in lacking else ""
    what = _what(results[0])
    left_out = [f"{what}: left out: {', '.join(names)}{how}"] if names else []
    errors = {row: error for result in results for row, error in result["errors"].items()}
    return [*left_out, *(f"{what}: {row} does not run: {' '.join(error.split())}" for row, error in errors.items())]


def parts(results: Sequence[Result]) -> Table:
    """The sampled gradient's kernel and product alone, of results that have them."""
    rows = []
    newest = {key: found[-1] for key, found in _by_step([one for one in results if one["parts"]]).items()}
    for result in newest.values():
        ms, faster = result["parts"]["ms"], {name: one["median"] for name, one in result["parts"]["faster"].items()}
        cells = [_what(result), *(f"{ms[name] * 1000:.0f}" for name in (SAMPLE, SAMPLE_BIAS, COPY))]
        cells += [f"**{faster[SAMPLE]:.1%}**", f"{faster[SAMPLE_BIAS]:.1%}"]
        cells += [f"{ms[name]:.3f}" for name in (DENSE_PRODUCT, SPARSE_PRODUCT)]
        rows.append((*cells, *(f"**{faster[name]:.2f}**" for name in (SPARSE_PRODUCT, WHOLE)), _gpu(result)))
    columns = ("M x K x N", "sample us", "+ bias us", "copy us", "share", "+ bias", "dW ms", "sparse ms")
    return tables.without_empty(Table((*columns, "ratio", "sampled too", "GPU"), tuple(rows)))


def short(results: Sequence[Result]) -> Table:
    """How many times faster than dense each row is, a line per model, for the first screen.

    Runs are chosen and ratios marked as in the long tables. Of several GPUs those are shown on which most rows were
    measured.
    """
    rows = []
    for (what, card), found in _by_step(results).items():
        dense = tables.dense_ms(_newest(found, DENSE) or {}, DENSE, 1)
        chosen = ((ROWS[name].title, _newest(found, ROWS[name].title)) for name in SHORT_ROWS)
        ratios = ("" if result is None else _ratio(result, title, 2)[0] for title, result in chosen)
        rows.append((what, dense, *ratios, card))
    most: dict[str, int] = {}
    for what, *cells in rows:
        most[what] = max(most.get(what, 0), sum(map(bool, cells)))
    rows = [row for row in rows if sum(map(bool, row[1:])) == most[row[0]]]
    columns = ("training step", "dense ms", *(ROWS[name].title for name in SHORT_ROWS), "GPU")
    return tables.without_empty(Table(columns, tuple(rows), (*tables.beside_note(rows), *slowed_note(rows))))


def beside_float8(results: Sequence[Result]) -> Table:
    """How many times faster than torchao's float8 fp8 is, a line per model or layer and GPU, smallest gain first.

    Both figures are ratios to dense, from the newest run that has both sides; or, where runs know dense of a fresh
    process, from the newest of these for each side, because torchao's is then measured without sparse products. A whole
    run is sparse for the share of its steps that recipes.fastest takes, then dense in fp8.

    Args:
        results: Of models and of layers; those without float8 or without fp8 + 2:4 are left out.
    """
    peer, sparse, sampled = (ROWS[name].title for name in ("float8", "fp8-2:4", "fp8-mvue"))
    rows = []
    for (what, card), found in _by_step(results).items():
        gains = {name: _gain(found, peer, name) for name in (sparse, sampled, AFTER)}
        if (least := gains[sparse]) is None:
            continue
        whole = _gain(found, peer, sparse, AFTER)
        cells = ("" if gain is None else f"**{gain:.2f}**" for gain in (*gains.values(), whole))
        rows.append((least, (what, *cells, card)))
    columns = ("step or layer", sparse, sampled, AFTER, "whole run", "GPU")
    return tables.without_empty(Table(columns, tuple(cells for _, cells in sorted(rows))))


def with_both_sides(results: Sequence[Result]) -> list[Result]:
    """The results that beside_float8 draws a line from."""
    sides = [ROWS[name].title for name in ("float8", "fp8-2:4")]
    groups = [found for found in _by_step(results).values() if _gain(found, *sides) is not None]
    return [one for found in groups for one in found if not one["ratio_to_dense"].keys().isdisjoint(sides)]


def _by_step(results: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    """Results by what was timed and on which GPU, oldest first."""
    found: dict[tuple[str, str], list[Result]] = {}
    for result in sorted(results, key=_time):
        found.setdefault((_what(result), _gpu(result)), []).append(result)
    return found


def _gain(results: Sequence[Result], peer: str, sparse: str, dense: str | None = None) -> float | None:
    """How many times faster than the peer a row is, or a run that ends with the steps of another row.

    Args:
        results: Of one model or layer on one GPU, oldest first.
        peer: Title of the peer's row.
        sparse: Of the row.
        dense: Of the row that a run ends with.
    """
    share = 1.0 if dense is None else recipes.fastest().sparse_fraction
    wanted = {peer, sparse, dense or sparse}
    fresh = list(filter(tables.is_fresh, results))
    chosen = ((title, _newest(fresh, title)) for title in _TITLES)
    together = {title: _ratios(result)[title] for title, result in chosen if result}
    after = [ratios[AFTER] for ratios in map(_ratios, fresh) if AFTER in ratios]
    runs = [*map(_ratios, results), together | ({AFTER: after[-1]} if after else {})]
    found = [ratios for ratios in runs if wanted <= ratios.keys()]
    if not found:
        return None
    newest = found[-1]
    return float(1 / (share / newest[sparse] + (1 - share) / newest[dense or sparse]) / newest[peer])


def _ratios(result: Result) -> dict[str, float]:
    """The ratios to dense of a run, AFTER with them."""
    ratios, title = dict(result["ratio_to_dense"]), ROWS["fp8"].title
    if title in ratios and ran_sparse(result):
        fresh = result.get("fresh_ms", {}).get(DENSE)
        ratios[AFTER] = fresh / result["times_ms"][title]["median_ms"] if fresh else ratios[title]
    return ratios


def _time(result: Result) -> str:
    return str(result.get("provenance", {}).get("time", ""))


def _what(result: Result) -> str:
    return tables.size(result["mkn"]) if "mkn" in result else tables.label(result)


def _gpu(result: Result) -> str:
    return gpu(result) if "provenance" in result else ""


def mark(result: Result, title: str) -> str:
    """BESIDE where sparse products are compared with dense beside them, SLOWED where others ran beside them."""
    if title.removeprefix(GRAPH) in SPARSE:
        return "" if tables.is_fresh(result) else tables.BESIDE
    return SLOWED if ran_sparse(result) else ""


def _ratio(result: Result, title: str, digits: int = 3) -> tuple[str, str]:
    """The ratio to dense, marked, and its spread; nothing for dense, and for a call that did not run."""
    if title.removeprefix(GRAPH) == DENSE or title not in result["ratio_to_dense"]:
        return "", ""
    return f"**{result['ratio_to_dense'][title]:.{digits}f}**{mark(result, title)}", tables.spread(result, title)


def _memory(result: Result, title: str) -> tuple[str, str]:
    """Most bytes that are allocated during a call, what is kept between calls included, and their share of dense's."""
    whole, dense = (sum(result["memory_bytes"][name].values()) for name in (title, DENSE))
    return (f"{whole / 2**20:.0f}", f"{whole / dense:.3f}") if dense else ("", "")
