"""A document that carries a checksum comes back as it was, or is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from semisparse.documents import CHECKSUM, with_checksum, without_checksum
from semisparse.planning.store import PlanStore
from tests.faults.kinds import KINDS, MEASURED, PLAN_KEY, Kind

DOCUMENT: dict[str, Any] = {"b": [1, 2.5, None, True], "a": {"text": "\u00e9", "deep": [{"x": -0.125}]}}


def test_it_comes_back_in_any_order_and_spacing() -> None:
    sealed = with_checksum(DOCUMENT)
    assert without_checksum(sealed) == DOCUMENT
    assert without_checksum(json.loads(json.dumps(sealed, sort_keys=True, indent=3))) == DOCUMENT


@pytest.mark.parametrize("old", ['"b"', "2.5", "true", "-0.125", "deep", "null"])
def test_any_change_is_refused_and_the_way_out_is_named(old: str) -> None:
    new = {"true": "false", "null": "0"}.get(old, old.replace("5", "4").replace("b", "c").replace("p", "q"))
    text = json.dumps(with_checksum(DOCUMENT))
    assert text.count(old) == 1 and old != new
    with pytest.raises(ValueError, match=r"damaged or edited.*remove that field"):
        without_checksum(json.loads(text.replace(old, new)))


@pytest.mark.parametrize("content", [{}, {"a": 1}, [1], None, "text"])
def test_what_has_no_checksum_is_returned_as_it_is(content: Any) -> None:
    assert without_checksum(content) == content


@pytest.mark.parametrize("checksum", [None, 5, "", "0" * 64, []])
def test_what_is_no_checksum_is_refused(checksum: Any) -> None:
    with pytest.raises(ValueError, match="damaged"):
        without_checksum({**DOCUMENT, CHECKSUM: checksum})


def test_a_number_that_is_not_finite_has_none() -> None:
    with pytest.raises(ValueError, match="JSON"):
        with_checksum({"a": math.nan})


JSON_FILES = [kind for kind in KINDS if kind.file.endswith(".json") and kind.guard == "checksum"]


@pytest.mark.parametrize("kind", JSON_FILES, ids=lambda kind: kind.name)
def test_a_digit_that_changed_in_a_file_is_no_value(kind: Kind, tmp_path: Path) -> None:
    kind.make(tmp_path)
    path = tmp_path / kind.file
    text = path.read_text()
    place = next(place for place in range(len(text)) if text[place : place + 2] in ("1.", "2.", "0.", "10", "14"))
    path.write_text(text[:place] + "3" + text[place + 1 :])
    json.loads(path.read_text())
    try:
        found = kind.read(tmp_path)
    except Exception as error:
        assert "damaged or edited" in str(error)
    else:
        assert found is None, "a cache is measured again"


def test_times_from_before_there_were_checksums_are_read(tmp_path: Path) -> None:
    store = PlanStore(tmp_path)
    store.save(PLAN_KEY, MEASURED[0])
    (path,) = tmp_path.iterdir()
    path.write_text(json.dumps(without_checksum(json.loads(path.read_text()))))
    path.chmod(0o600)
    assert store.load(PLAN_KEY) == MEASURED[0]
