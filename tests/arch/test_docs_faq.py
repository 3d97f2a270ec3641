"""The messages of semisparse that docs/faq.md explains are messages that it has."""

import re

import pytest

from tests.arch.source import PACKAGE, ROOT

ROW = re.compile(r"^\| `([^`]+)` \| (semisparse|torch) \|", re.MULTILINE)
EXPLAINED = ROW.findall((ROOT / "docs" / "faq.md").read_text())
SOURCE = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))


def test_messages_of_both_are_explained() -> None:
    assert {origin for _, origin in EXPLAINED} == {"semisparse", "torch"}


@pytest.mark.parametrize("part", [part for part, origin in EXPLAINED if origin == "semisparse"])
def test_the_part_of_a_message_is_in_the_source(part: str) -> None:
    assert part in SOURCE
