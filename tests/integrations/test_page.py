"""The code of docs/trainers.md runs as a reader would paste it, in this process, because imports take seconds."""

import runpy
from pathlib import Path

import pytest

from tests.arch.source import ROOT
from tests.arch.test_docs_examples import script


@pytest.mark.filterwarnings("ignore")  # the hosts' own, which change with their versions
def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("transformers", "lightning", "torchtitan", "accelerate"):
        pytest.importorskip(package, reason="make test installs it")
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "trainers.md"
    file = tmp_path / "trainers.py"
    file.write_text(script(page.read_text()))
    runpy.run_path(str(file))
