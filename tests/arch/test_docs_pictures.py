"""The pictures of docs/how_it_works.md are what is drawn, and what is drawn is what the library and the results say."""

import re

import pytest
import torch

from benchmarks import step_profile
from docs import draw
from docs.drawings import packed, products, step, tiles
from semisparse.pattern import GROUP, KEPT, TRANSPOSABLE_TILES
from semisparse.reference import masks
from semisparse.reference.packing import unpack
from tests.arch.source import ROOT


@pytest.mark.parametrize("name", draw.PICTURES)
def test_a_picture_is_up_to_date(name: str) -> None:
    assert (draw.FOLDER / f"{name}.svg").read_text() == draw.PICTURES[name](), "run `python docs/draw.py`"


def test_the_page_shows_each_picture() -> None:
    page = (ROOT / "docs" / "how_it_works.md").read_text()
    assert re.findall(r"!\[[^\]]+\]\(img/(\w+)\.svg\)", page) == list(draw.PICTURES)


@pytest.mark.parametrize("name", products.SETTINGS)
def test_a_sparse_product_has_exactly_one_pruned_operand(name: str) -> None:
    config = products.SETTINGS[name]
    for product, (_, operands) in products.PRODUCTS.items():
        pruned = [operand for operand in operands if products.pruned_as(config, operand)]
        assert len(pruned) == 1 or not config.products[product].startswith("sparse")


def test_the_settings_show_every_way_to_compute_a_product() -> None:
    shown = {how for config in products.SETTINGS.values() for how in config.products.values()}
    assert shown == {"sparse", "dense", "sparse fp8", "dense fp8"}


def test_the_highlighted_tile_is_the_best_of_all() -> None:
    sums = {code: float(tiles.EXAMPLE[torch.tensor(tiles.tile(code))].sum()) for code in TRANSPOSABLE_TILES}
    best = [code for code, kept in sums.items() if kept == max(sums.values())]
    assert best == [tiles.chosen()]


def test_the_largest_of_each_row_would_keep_three_of_the_first_column_as_the_page_says() -> None:
    assert int(masks.row(tiles.EXAMPLE).sum(0)[0]) == KEPT + 1


def test_values_and_metadata_are_those_of_the_matrix_that_is_drawn() -> None:
    matrix = packed.example()
    assert torch.equal(unpack(packed.packed()), torch.where(masks.transposable(matrix), matrix, 0))
    assert packed.share() == packed.Fraction(1, 2) + packed.Fraction(4, GROUP * 16)  # 4 bits per group of 16-bit values


def test_a_profile_that_says_when_kernels_ran_is_drawn_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    timeline = step_profile.timeline(
        [(1000.0, 3000.0, "gemm"), (3010.0, 5000.0, "nvjet"), (6000.0, 7000.0, "flash"), (7100.0, 9000.0, "gemm")]
    )
    assert timeline == [(0.0, 4.0, "dense products"), (5.0, 6.0, "attention"), (6.1, 8.0, "dense products")]
    whole = step.profile()
    ordered = {**whole, "rows": {"dense bf16": {"total_ms": 6.9, "longest": [], "timeline": timeline}}}
    assert step.segments(ordered["rows"]["dense bf16"])[1] == (5.0, 6.0, "attention")
    monkeypatch.setattr(step, "profile", lambda: ordered)
    assert "kernels as they ran" in step.draw() and ">8.0<" in step.draw()
    summed = {name: {key: row[key] for key in ("total_ms", "longest")} for name, row in whole["rows"].items()}
    assert step.in_order(whole) and not step.in_order({"rows": summed})
    monkeypatch.setattr(step, "profile", lambda: {**whole, "rows": summed})
    assert "kernels added up by kind" in step.draw()


def test_the_step_is_drawn_in_full_length() -> None:
    for row in step.profile()["rows"].values():
        assert sum(step.spent(row).values()) == pytest.approx(row["total_ms"])
