"""Cards, pages and the picture are exactly what the stored results generate."""

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import (
    accuracy_cards,
    blocks,
    cards,
    jobs,
    picture,
    schedule_cards,
    store,
    table,
    time_to_loss_cards,
)
from lab.tests.made_timed import made, write

OUTPUTS = cards.outputs()


@pytest.mark.parametrize("path", sorted(OUTPUTS), ids=lambda path: path.name)
def test_generated_text_is_up_to_date(path: Path) -> None:
    assert path.read_text() == OUTPUTS[path], "run `python benchmarks/cards.py`"


@pytest.mark.parametrize("path", sorted(OUTPUTS), ids=lambda path: path.name)
def test_tables_fit_the_page(path: Path) -> None:
    generated = re.findall(r"<!-- generated: .*?<!-- end -->", OUTPUTS[path], re.DOTALL) or [OUTPUTS[path]]
    lines = [line for text in generated for line in text.splitlines() if line.startswith("|") and "tests/" not in line]
    assert max(map(len, lines), default=0) <= table.WIDTH + 2  # and the bars at both ends


def test_the_picture_is_up_to_date() -> None:
    described = re.search(r"<dc:description>(.*?)</dc:description>", picture.TARGET.read_text(), re.DOTALL)
    assert described, "run `python benchmarks/cards.py`"
    drawn = json.loads(described[1].replace("&quot;", '"').replace("&amp;", "&"))
    assert drawn == picture.bars(), "run `python benchmarks/cards.py`"


def test_the_picture_shows_gains_and_losses_from_result_files() -> None:
    bars = picture.bars()
    assert bars[0]["ratio"] > 1 > bars[-1]["ratio"]
    assert all((store.RESULTS / bar["file"]).exists() for bar in bars)


def test_every_card_has_its_result() -> None:
    stems = {path.stem for path in store.RESULTS.glob("*.json")}
    stems |= {kind for kind in ("pack", "metrics") if store.load(kind)} | accuracy_cards.accuracy().keys()
    stems |= {"no-gain"} if store.load("small-linear") else set()
    stems |= {"models"} if store.load("end-to-end") else set()
    stems |= {"compare"} if store.load("compare-linear") or store.load("compare-model") else set()
    stems |= {"plans"} if store.load("plan") else set()
    stems |= {"scaling"} if store.load("scaling") else set()
    stems |= {path.stem for path in schedule_cards.cards()}
    stems |= {time_to_loss_cards.NAME} if time_to_loss_cards.results() else set()
    stems |= {"host-time"} if store.load("host") or store.load("host-parts") else set()
    assert {path.stem for path in cards.CARDS.glob("*.md")} <= stems


@pytest.fixture
def new_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of toy size of every kind of which there may be no stored result yet."""
    monkeypatch.setattr(torch, "compile", lambda model: model)
    made = {job.kind: job for job in [*jobs.hosts(2, True), *jobs.eager_layers([], 2, True), *jobs.packing(2, True)]}
    source = store.provenance()
    found = {
        kind: {"provenance": source, "kind": kind, **job.measure()} for kind, job in made.items() if kind != "pack"
    }
    monkeypatch.setattr(cards, "load", lambda kind: [found[kind]] if kind in found else store.load(kind))


def test_new_kinds_of_results_fill_their_cards_and_places_and_fit_the_page(new_results: None) -> None:
    places = ("eager-linear", "host-time", "pack-together")
    made = [cards.blocks()[name] for name in places] + [cards.host_card(), cards.models_card(), cards.pack_card()]
    for text in made:
        assert "Remake: `python benchmarks/" in text or "Remake: `bash benchmarks/runs/" in text
        assert max(len(line) for line in text.splitlines() if line.startswith("|")) <= table.WIDTH + 2


def test_a_place_without_result_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    without = ("eager-linear", "host", "host-parts", "pack-together")
    monkeypatch.setattr(cards, "load", lambda kind: [] if kind in without else store.load(kind))
    made = cards.blocks()
    for place, option in (("host-time", "--host"), ("pack-together", "--pack")):
        assert made[place] == f"Not measured yet: `{cards.COMMAND} {option} --save`."
    assert made["eager-linear"] == f"Not measured yet: `{cards.FRESH} 'eager-*'`."


def test_a_study_of_schedules_fills_its_card_and_its_place_and_fits_the_page(tmp_path: Path) -> None:
    assert schedule_cards.block(tmp_path / "none") == schedule_cards.MISSING and not schedule_cards.cards(tmp_path)
    settings = {"sparse_fraction": 0.7, "train": {"hold_fraction": 0.67}}
    write(tmp_path, made("bf16", 0, settings=settings), made("fp8-24", 0, settings=settings))
    assert schedule_cards.block(tmp_path) == schedule_cards.MISSING
    write(tmp_path / "study-share-0.85", made("fp8-24", 0, settings={**settings, "sparse_fraction": 0.85}))
    schedule_cards.study.cache_clear()
    for text in (schedule_cards.block(tmp_path), schedule_cards.cards(tmp_path)[schedule_cards.CARD]):
        assert "| share-0.85 | `sparse_fraction` 0.7 → 0.85 |" in text and "one seed (0)" in text
        assert max(len(line) for line in text.splitlines() if line.startswith("|")) <= table.WIDTH + 2


def test_every_experiment_has_its_plot() -> None:
    timed = {time_to_loss_cards.NAME} if time_to_loss_cards.results() else set()
    assert {path.stem for path in cards.CARDS.glob("*.png")} == accuracy_cards.accuracy().keys() | timed


@pytest.mark.parametrize("name", accuracy_cards.ON_PAGE)
def test_beside_each_accuracy_table_stands_whether_the_model_gains_speed(name: str) -> None:
    assert "\n\nSpeed: " in cards.blocks()[name]
    assert "\n\nSpeed: " in (cards.CARDS / f"{name}.md").read_text()


def test_blocks_replace_only_what_lies_between_their_markers() -> None:
    text = "a\n<!-- generated: linear -->\nold\n<!-- end -->\nb"
    assert blocks.with_blocks(text, {"linear": "new"}) == "a\n<!-- generated: linear -->\nnew\n<!-- end -->\nb"


def test_a_place_without_block_and_a_block_without_place_are_errors(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- generated: one -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="no block of this name"):
        blocks.with_blocks(page.read_text(), {})
    with pytest.raises(ValueError, match="no page has a place for \\['two'\\]"):
        blocks.filled([page], {"one": "1", "two": "2"})
