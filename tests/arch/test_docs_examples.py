"""Every python block of the README and the docs runs, as a reader would paste it: in order, in one session per file."""

import os
import re
from pathlib import Path

import pytest

from tests import fresh
from tests.arch.source import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# tests/integrations/test_page.py runs the first, in a process that has imported the trainers already, and
# tests/examples/test_tutorial.py the second, whose outputs it compares, too.
ELSEWHERE = {"trainers.md", "tutorial.md"}
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def script(text: str) -> str:
    """The python blocks of a page with everything else as empty lines, so that line numbers are the page's."""
    code = ["\n"] * len(text.splitlines())
    for block in BLOCK.finditer(text):
        first = text[: block.start(1)].count("\n")
        lines = block.group(1).splitlines(keepends=True)
        code[first : first + len(lines)] = lines
    return "".join(code)


def test_blocks_are_found_at_their_lines() -> None:
    page = "# Title\n\n```python\na = 1\n```\n\n```bash\nrm x\n```\ntext\n```python\nassert a == 1\n```\n"
    assert script(page).splitlines() == ["", "", "", "a = 1", *[""] * 7, "assert a == 1", ""]


def test_the_readme_has_an_example() -> None:
    assert BLOCK.search((ROOT / "README.md").read_text()), "README.md has no ```python block"


RUN = [page for page in PAGES if BLOCK.search(page.read_text()) and page.name not in ELSEWHERE]


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_the_examples_of_a_page_run(page: Path, tmp_path: Path) -> None:
    file = tmp_path / f"{page.stem}.py"
    file.write_text(script(page.read_text()))
    result = fresh.run(file, cwd=tmp_path, env=os.environ | {"MPLBACKEND": "Agg"}, trains=True)
    assert result.returncode == 0, result.stderr
