"""Cards and README figures are exactly what the stored results generate."""

import pytest

from benchmarks import cards


@pytest.mark.parametrize("path", sorted(cards.outputs()), ids=lambda path: path.name)
def test_generated_text_is_up_to_date(path):
    assert path.read_text() == cards.outputs()[path], "run `python benchmarks/cards.py`"


def test_every_card_has_its_result():
    stems = {path.stem for path in cards.RESULTS.glob("*.json")}
    stems |= {kind for kind in ("pack", "metrics") if cards.load(kind)} | cards.accuracy().keys()
    assert {path.stem for path in cards.CARDS.glob("*.md")} <= stems


def test_every_experiment_has_its_plot():
    assert {path.stem for path in cards.CARDS.glob("*.png")} == cards.accuracy().keys()


def test_blocks_replace_only_what_lies_between_their_markers():
    text = "a\n<!-- generated: linear -->\nold\n<!-- end -->\nb"
    assert cards.with_blocks(text, {"linear": "new"}) == "a\n<!-- generated: linear -->\nnew\n<!-- end -->\nb"
