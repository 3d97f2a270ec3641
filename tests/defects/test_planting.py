import json
from collections import Counter
from pathlib import Path

import pytest

from tests import reliability
from tests.defects import planting
from tests.defects.planting import Defect, DefectError, check, load, planted, turn

DEFECTS = load()
ONE = Defect("n", "a.py", "old", "new", ("t.py::test",), "x")


def test_every_line_is_where_the_list_says_and_every_test_file_is_there() -> None:
    check(DEFECTS)
    assert len(DEFECTS) >= 60 and sum(defect.native for defect in DEFECTS) >= 5


def test_the_list_covers_every_part_of_the_library() -> None:
    parts = Counter(defect.file.split("/")[2] for defect in DEFECTS if not defect.native)
    assert {"kernels", "formats", "gemm", "nn", "schedule", "recipes", "planning", "reference"} <= parts.keys()


@pytest.mark.parametrize("text", ["", "old old", "x\nold\nold\n"])
def test_a_line_that_is_not_there_once_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(text)
    with pytest.raises(DefectError, match="must be there once"):
        check([ONE], tmp_path)


def test_a_test_file_that_is_gone_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("old")
    with pytest.raises(DefectError, match=r"there is no test t\.py"):
        check([ONE], tmp_path)


@pytest.mark.parametrize(
    "text", ['name = "n"', 'name = "n"\nfile = "f"\nold = "a"\nnew = "a"\ntests = ["t"]',
             'name = "n"\nfile = "f"\nold = "a"\nnew = "b"\ntests = []']
)  # fmt: skip
def test_a_damaged_entry_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(f"[[defect]]\n{text}\n")
    with pytest.raises(DefectError):
        load(tmp_path)


def test_a_defect_is_in_the_copy_inside_the_block_alone(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("an old line\n")
    with pytest.raises(KeyError), planted(ONE, tmp_path):
        assert (tmp_path / "a.py").read_text() == "an new line\n"
        raise KeyError
    assert (tmp_path / "a.py").read_text() == "an old line\n"


def test_turns_depend_on_the_key_alone_and_reach_all_defects() -> None:
    assert turn(DEFECTS, "a", 3) == turn(DEFECTS[::-1], "a", 3)
    reached = {defect.name for week in range(300) for defect in turn(DEFECTS, str(week), 3)}
    assert len(reached) == len(DEFECTS)


def test_the_page_shows_the_record() -> None:
    record = json.loads((planting.HERE / "record.json").read_text())
    assert record["killed"] == sum(row["killed"] for row in record["defects"])
    assert reliability.PAGE.read_text() == reliability.page()
