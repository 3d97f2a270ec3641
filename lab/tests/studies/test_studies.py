"""The experiments run as a reader would run them, with --small on a CPU, and say what is wrong with bad input."""

import json
import os
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import typer.main

from lab.tests.cli.shell import semisparse_lab
from lab.tests.toys import write_fashion_mnist
from semisparse_lab.cli.main import build_app
from semisparse_lab.models.vit import ViTConfig
from semisparse_lab.studies import vit_fashion_mnist
from semisparse_lab.train.config import TrainConfig
from tests import fresh, written

ROWS = {
    "vit-fashion-mnist": ["dense", "sparse-070", "greedy"],
    "gpt-stdlib": ["dense", "fst", "step"],
    "gpt-mvue": ["fst", "fst-mvue", "dense"],
    "gpt-fp8": ["fp8", "bf16"],
    "dino-fashion-mnist": ["dense", "sparse-070", "sparse-100"],
}


TEXT = ("gpt-stdlib", "gpt-mvue", "gpt-fp8")
OTHER_SETTING = dict.fromkeys(("gpt-mvue", "gpt-fp8"), ("--training-bytes", "26000"))
"""What makes other runs of an experiment; --epochs 2 of those that are not named."""


def run(name: str, *options: str) -> subprocess.CompletedProcess:
    """`semisparse-lab experiment`, which must write below its --out alone."""
    command = ["semisparse_lab", "experiment", name, "--small", "--device", "cpu", *options]
    with tempfile.TemporaryDirectory() as folder:
        paths = Path(folder, "paths")
        done = fresh.run(written.__file__, paths, *command, env=os.environ | {"MPLBACKEND": "Agg"})
        found = [Path(line) for line in paths.read_text().splitlines()]
    assert not written.elsewhere(found, Path(options[options.index("--out") + 1]))
    return done


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fashion")
    write_fashion_mnist(folder)
    return folder


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    for number in range(80):
        (folder / f"module{number}.py").write_text(f"value = {number}\n" * 40)
    return folder


def test_every_experiment_is_tried() -> None:
    group = typer.main.get_command(build_app()).commands["experiment"]
    assert group.commands.keys() - {"llama-linux"} == ROWS.keys()  # that one has a test of its own


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_an_experiment_runs_skips_what_is_there_and_makes_its_card(name, images, library, tmp_path) -> None:
    data = library if name in TEXT else images
    rows = [word for row in ROWS[name] for word in ("--row", row)]
    options = ["--data-dir", str(data), "--out", str(tmp_path), "--seeds", "1", *rows]
    done = run(name, *options)
    assert done.returncode == 0, done.stderr
    files = {path: path.read_bytes() for path in tmp_path.glob("*.seed0.json")}
    results = {json.loads(content)["row"]: json.loads(content) for content in files.values()}
    assert set(results) == set(ROWS[name])
    for result in results.values():
        kinds = {phase["kind"] for phase in result["run"]["phases"]}
        assert ("sparse" in kinds) is (result["row"] != "dense")
        if name == "dino-fashion-mnist":
            assert result["value"] == pytest.approx(result["more"]["knn_accuracy"])
            assert {"linear_accuracy", "raw_pixel_knn_accuracy"} < result["more"].keys()
        assert result["value"] >= 0 and result["run"]["epochs"]
    (card,) = tmp_path.glob("*.md")
    assert all(result["row_title"] in card.read_text() for result in results.values())
    assert card.with_suffix(".png").stat().st_size > 10_000
    again = run(name, *options)
    assert again.returncode == 0 and again.stdout.count("skipped") == len(rows) // 2
    assert files == {path: path.read_bytes() for path in tmp_path.glob("*.seed0.json")}
    other = run(name, *options, *OTHER_SETTING.get(name, ("--epochs", "2")))
    assert other.returncode == 2 and "was made with" in other.stderr


@pytest.mark.slow
def test_an_experiment_whose_run_diverges_says_so_at_its_end(images: Path, tmp_path: Path, monkeypatch) -> None:
    def hot(*args: object) -> tuple[ViTConfig, TrainConfig]:
        model, train = settings(*args)
        return model, replace(train, lr=1e30, clip=0.0)

    settings = vit_fashion_mnist.settings
    monkeypatch.setattr(vit_fashion_mnist, "settings", hot)
    options = ["--small", "--device", "cpu", "--data-dir", images, "--out", tmp_path, "--seeds", 1, "--row", "dense"]
    done = semisparse_lab("experiment", "vit-fashion-mnist", *options)
    assert done.code == 3, done.err
    assert "vit-fashion-mnist.dense.seed0.json diverged" in done.err
    (card,) = tmp_path.glob("*.md")
    assert "0 diverged" in card.read_text()


@pytest.mark.parametrize("name", ROWS)
def test_wrong_data_and_rows_are_named(name: str, images: Path, library: Path, tmp_path: Path) -> None:
    missing = run(name, "--data-dir", str(tmp_path / "nothing"), "--out", str(tmp_path / "out"))
    assert missing.returncode == 2 and "--data-dir=" in missing.stderr and "Traceback" not in missing.stderr
    data = library if name in TEXT else images
    unknown = run(name, "--data-dir", str(data), "--out", str(tmp_path / "out"), "--row", "third")
    assert unknown.returncode == 2 and "--row='third'" in unknown.stderr
    assert not (tmp_path / "out").exists()
