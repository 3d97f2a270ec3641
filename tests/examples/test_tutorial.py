"""docs/tutorial.md is a notebook that jupytext reads; its cells run, and print what the page shows.

The cells run in a plain process and not in a Jupyter kernel: ipykernel and nbclient would bring IPython and ZeroMQ for
code that uses nothing of them.
"""

import os
import re
from pathlib import Path

import pytest

from tests import fresh
from tests.arch.source import ROOT
from tests.arch.test_docs_examples import BLOCK, script

PAGE = ROOT / "docs" / "tutorial.md"
SHOWN = re.compile(r"^```python\n.*?^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
END = "end of a cell"


def marked(text: str) -> str:
    """The cells of a page at their lines; each prints END where its closing fence is."""
    code = script(text).splitlines(keepends=True)
    for block in BLOCK.finditer(text):
        code[text[: block.end(1)].count("\n")] = f"print({END!r})\n"
    return "".join(code)


def test_the_end_of_a_cell_is_printed_at_its_fence() -> None:
    page = "# Title\n```python\na = 1\n```\n```text\n```\n```python\nprint(a)\n```\n"
    assert marked(page).splitlines() == ["", "", "a = 1", f"print({END!r})", "", "", "", "print(a)", f"print({END!r})"]


def test_jupytext_finds_the_cells_of_the_page() -> None:
    jupytext = pytest.importorskip("jupytext", reason="make test installs it")
    notebook = jupytext.read(PAGE)
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert cells == [block.strip("\n") for block in BLOCK.findall(PAGE.read_text())]
    assert notebook.metadata.kernelspec.language == "python"


def test_the_cells_run_and_print_what_the_page_shows(tmp_path: Path) -> None:
    text = PAGE.read_text()
    file = tmp_path / "tutorial.py"
    file.write_text(marked(text))
    # The page shows what a machine without a GPU prints.
    result = fresh.run(file, cwd=tmp_path, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, trains=True)
    assert result.returncode == 0, result.stderr
    printed = [line.rstrip() for line in result.stdout.splitlines()]  # Markdown has no spaces at ends of lines
    shown = "".join(f"{output}{END}\n" for output in SHOWN.findall(text))
    assert printed == shown.splitlines()
