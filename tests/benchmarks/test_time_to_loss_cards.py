"""README, docs and the card of time to loss from made-up runs, complete or not; without any, the pages say so."""

from pathlib import Path

import pytest

from benchmarks import accuracy_cards, blocks, cards, compare_tables, store, table, time_to_loss_cards
from lab.tests.made_timed import LOST, complete, made
from semisparse import recipes
from tests.arch.test_docs_links import README_LINES

README = store.ROOT / "README.md"
DOCS = store.ROOT / "docs" / "accuracy.md"
RUNS = {
    "complete": complete(),
    "one seed": complete((0,)),
    "partial": [made("bf16", 0), made("bf16", 1), made("fp8-24", 0), made("fp8-24", 1, "seconds", 20)],
    "diverged": [*complete((0, 1)), made("fp8-24", 2, **LOST), made("bf16", 2, **LOST)],
}


@pytest.fixture
def with_runs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    found = RUNS[request.param]
    monkeypatch.setattr(time_to_loss_cards, "results", lambda: found)
    monkeypatch.setattr(time_to_loss_cards, "tried", lambda: [made("bf16", 0)])
    return found


@pytest.mark.parametrize("with_runs", RUNS, indirect=True)
def test_any_set_of_runs_fills_card_and_pages_and_fits_them(with_runs: list[dict]) -> None:
    outputs = cards.outputs()
    readme, docs = outputs[README], outputs[DOCS]
    assert len(readme.splitlines()) <= README_LINES
    assert time_to_loss_cards.HEADING in readme and "(benchmarks/cards/llama-linux.png)" in readme
    assert "What it costs in accuracy" not in readme and "gpt-stdlib -1.95" in readme
    assert (
        "](../benchmarks/cards/llama-linux.png)" in docs
        and "\n| arm | bar, at equal | figure (p) | seeds | |\n" in docs
    )
    assert (
        "| fp8 + 2:4 | tokens: at most 0.3% above dense bf16 (validation) |" in outputs[store.CARDS / "llama-linux.md"]
    )
    assert "| of the runs |" in docs and time_to_loss_cards.MISSING not in docs
    made_blocks = cards.blocks()
    for name in ("accuracy", "llama-linux", "llama-linux-rates"):
        assert max(len(line) for line in made_blocks[name].splitlines() if line.startswith("|")) <= table.WIDTH + 2


def test_without_runs_readme_keeps_the_small_models_and_the_page_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(time_to_loss_cards, "results", list)
    monkeypatch.setattr(time_to_loss_cards, "tried", list)
    made_blocks = cards.blocks()
    assert made_blocks["accuracy"] == accuracy_cards.section()
    assert made_blocks["llama-linux"] == made_blocks["llama-linux-rates"] == time_to_loss_cards.MISSING
    outputs = cards.outputs()
    assert len(outputs[README].splitlines()) <= README_LINES
    assert store.CARDS / "llama-linux.md" not in outputs
    monkeypatch.setattr(time_to_loss_cards, "CARDS", tmp_path)
    time_to_loss_cards.write([])
    assert not list(tmp_path.iterdir())
    time_to_loss_cards.write(RUNS["partial"])
    assert (tmp_path / "llama-linux.png").read_bytes().startswith(b"\x89PNG")


def test_readme_has_the_ends_on_the_test_set() -> None:
    text = {part: {"nats_per_token": 2.0, "bits_per_byte": 2.0, "bytes": 1} for part in ("validation", "test")}
    further = {**text, "test": {**text["test"], "bits_per_byte": 2.02}}
    found = [made("bf16", 0, **text), made("fp8-24", 0, **further)]
    assert time_to_loss_cards.on_test(found) == "At equal tokens, on the test set: fp8 + 2:4 +1.00 %."
    assert time_to_loss_cards.on_test(found[:1]) == time_to_loss_cards.on_test(found[1:]) == ""


def test_the_pages_have_the_places() -> None:
    for page, names in ((README, ("accuracy",)), (DOCS, ("llama-linux", "llama-linux-rates", "beside-float8"))):
        for name in names:
            text = page.read_text()
            assert blocks.with_blocks(text, cards.blocks() | {name: "filled"}).count("\nfilled\n") == 1


TITLES = {"dense": compare_tables.DENSE, "float8": "torchao float8", "sparse": "fp8 + 2:4", "fp8": "dense fp8"}


def measured(size: int, time: str, gpu: str = "NVIDIA H100", fresh: float | None = None, **ms: float) -> dict:
    """A comparison of layers of this size, with these times in milliseconds."""
    return {
        "mkn": [size] * 3,
        "times_ms": {TITLES[name]: {"median_ms": value} for name, value in ms.items()},
        "fresh_ms": {} if fresh is None else {compare_tables.DENSE: fresh},
        "ratio_to_dense": {TITLES[name]: (fresh or ms["dense"]) / value for name, value in ms.items()},
        "provenance": {"gpu": gpu, "time": time},
    }


def test_float8_is_divided_by_fp8_of_the_same_run_the_newest_first() -> None:
    old = measured(8, "1", dense=9, float8=6, sparse=5, fp8=6)
    new = measured(8, "2", dense=9, float8=8, sparse=4)
    large = measured(9, "1", dense=9, float8=9, sparse=3)
    without = measured(7, "1", dense=9, float8=9)
    found = compare_tables.beside_float8([new, large, without, old])
    share = recipes.fastest().sparse_fraction
    assert found.columns == ("step or layer", "fp8 + 2:4", "dense fp8 after 2:4", "whole run", "GPU")
    whole = 6 / (share * 5 + (1 - share) * 6)
    assert found.rows == (
        ("8 x 8 x 8", "**2.00**", "**1.00**", f"**{whole:.2f}**", "H100"),
        ("9 x 9 x 9", "**3.00**", "", "", "H100"),
    )
    assert compare_tables.with_both_sides([new, large, without, old]) == [large, old, new]


def test_float8_of_a_process_without_sparse_products_comes_before_that_beside_them() -> None:
    beside = measured(8, "3", dense=10, float8=6, sparse=5)
    alone = measured(8, "1", fresh=9, dense=9, float8=6)
    sparse = measured(8, "2", fresh=9.5, dense=10, sparse=5)
    found = compare_tables.beside_float8([beside, sparse, alone])
    assert found.rows == (("8 x 8 x 8", f"**{(9.5 / 5) / (9 / 6):.2f}**", "H100"),)
    assert compare_tables.with_both_sides([beside, sparse, alone]) == [alone, sparse, beside]
    (only,) = compare_tables.beside_float8([beside, sparse]).rows
    assert only == ("8 x 8 x 8", "**1.20**", "H100")  # there is no such run of float8: both of one process
    (row,) = compare_tables.short([beside, sparse, alone]).rows
    assert row == ("8 x 8 x 8", "9.5", "**1.50**", "**1.90**", "H100")


def test_readme_shows_the_gpus_on_which_most_rows_were_measured() -> None:
    def ratios(gpu: str, time: str, **ratios: float) -> dict:
        result = measured(8, time, gpu, dense=9, float8=6, sparse=5)
        return result | {"ratio_to_dense": ratios}

    both = {"torchao float8": 1.5, "fp8 + 2:4": 1.8}
    found = compare_tables.short([ratios("NVIDIA H100", "1", **both), ratios("NVIDIA H200", "2", **{"2:4": 1.2})])
    assert [row[-1] for row in found.rows] == ["H100"]
    equal = compare_tables.short([ratios("NVIDIA H100", "1", **both), ratios("NVIDIA H200", "2", **both)])
    assert [row[-1] for row in equal.rows] == ["H100", "H200"]
