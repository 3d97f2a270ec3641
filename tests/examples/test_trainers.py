"""The examples with other packages' trainers run at toy size, all in this process, because imports take seconds."""

import runpy
import sys
from pathlib import Path

import pytest

from tests.arch.source import ROOT
from tests.arch.test_lab_imports import PUBLIC
from tests.examples.test_examples import LONGEST, used_names

EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples" / "trainers").glob("*.py"))}
NEEDS = {
    "accelerate_loop": "accelerate",
    "huggingface": "transformers",
    "lightning_module": "lightning",
    "torchtitan_config": "torchtitan",
}
pytestmark = pytest.mark.filterwarnings("ignore")  # the hosts' own, which change with their versions


def test_every_example_is_tried() -> None:
    assert EXAMPLES.keys() == NEEDS.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_and_uses_public_names_only(name: str) -> None:
    assert len(EXAMPLES[name].read_text().splitlines()) <= LONGEST
    assert used_names(EXAMPLES[name]) <= PUBLIC


def run(name: str, monkeypatch: pytest.MonkeyPatch, *options: object) -> None:
    pytest.importorskip(NEEDS[name], reason="make test installs it")
    monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
    runpy.run_path(str(EXAMPLES[name]), run_name="__main__")


def test_the_hugging_face_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    toy = ("--device", "cpu", "--steps", 10, "--save-steps", 5, "--width", 32, "--depth", 1, "--context", 16)
    run("huggingface", monkeypatch, "--out", tmp_path, *toy)
    out = capfd.readouterr().out
    assert "10 applied, now dense" in out
    assert "loaded without semisparse: loss" in out


def test_the_lightning_example_runs_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    toy = ("--out", tmp_path, "--device", "cpu", "--steps", 10, "--width", 32)
    run("lightning_module", monkeypatch, *toy)
    assert "10 applied, now dense" in capfd.readouterr().out
    run("lightning_module", monkeypatch, *toy, "--resume", tmp_path / "step=6.ckpt")
    out = capfd.readouterr().out
    assert "10 applied, now dense" in out
    assert "layers of the model: ['Autoencoder', 'GELU', 'Linear', 'Sequential']" in out


def test_a_resumed_accelerate_loop_ends_where_the_whole_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy = ("--out", tmp_path, "--device", "cpu", "--steps", 10, "--width", 32)
    run("accelerate_loop", monkeypatch, *toy)
    whole = capsys.readouterr().out
    assert "10 applied, now dense" in whole
    run("accelerate_loop", monkeypatch, *toy, "--resume")
    assert capsys.readouterr().out == f"goes on after step 5\n{whole}"


def test_the_torchtitan_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("torchtitan_config", monkeypatch, "--steps", 10, "--device", "cpu")
    out = capsys.readouterr().out
    assert "18 layers of the debug model are 2:4 sparse" in out
    assert "10 applied, now dense" in out
