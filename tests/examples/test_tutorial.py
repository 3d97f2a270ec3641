"""docs/tutorial.md is a notebook that jupytext reads; its cells run, and print what the page shows.

The cells run in this process and not through a Jupyter kernel: ipykernel and nbclient would bring IPython and ZeroMQ
for code that uses nothing of them.
"""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

from tests.arch.source import ROOT
from tests.arch.test_docs_examples import BLOCK

PAGE = ROOT / "docs" / "tutorial.md"
SHOWN = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def without_trailing_spaces(text: str) -> list[str]:
    """The lines as an editor leaves them in a Markdown file."""
    return [line.rstrip() for line in text.splitlines()]


def test_jupytext_finds_the_cells_of_the_page() -> None:
    jupytext = pytest.importorskip("jupytext", reason="make test installs it")
    notebook = jupytext.read(PAGE)
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert cells == [block.strip("\n") for block in BLOCK.findall(PAGE.read_text())]
    assert notebook.metadata.kernelspec.language == "python"


def test_the_cells_run_and_print_what_the_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the page shows what the CPU prints
    text = PAGE.read_text()
    session: dict[str, object] = {"__name__": "tutorial"}
    for cell in SHOWN.finditer(text):
        code = "\n" * text[: cell.start("code")].count("\n") + cell["code"]  # line numbers are those of the page
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, str(PAGE), "exec"), session)
        assert without_trailing_spaces(printed.getvalue()) == (cell["output"] or "").splitlines()
