"""`semisparse-lab train`: what it prints, what it leaves, and what it refuses before it trains."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from lab.tests.cli.shell import TINY, Trained, semisparse_lab
from lab.tests.toys import write_fashion_mnist
from tests import fresh

FILES = {"results.json", "curves.png"} | {
    f"{run}.safetensors" for run in ("dense", "sparse-then-dense", "fully-sparse")
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_it_ends_well_and_leaves_its_files(trained: Trained) -> None:
    assert trained.outcome.code == 0
    assert set(contents(trained.folder)) == FILES
    assert str(trained.folder) in trained.outcome.out


def test_the_table_says_what_the_results_file_says(trained: Trained) -> None:
    runs = json.loads((trained.folder / "results.json").read_text())["runs"]
    assert [run["row_title"] for run in runs] == ["dense", "sparse then dense (70 %)", "fully sparse"]
    rows = [line.split("│")[1:-1] for line in trained.outcome.out.splitlines() if line.startswith("│")]
    assert [row[0].strip() for row in rows] == [run["row_title"] for run in runs]
    for row, run in zip(rows, runs, strict=True):
        accuracy = 100 * run["run"]["test"]["accuracy"]
        assert row[1].strip() == f"{accuracy:.2f} %"
        difference = accuracy - 100 * runs[0]["run"]["test"]["accuracy"]
        assert row[2].strip() == ("" if run is runs[0] else f"{difference:+.2f} points")
        assert row[3].strip() == f"{run['run']['seconds_per_step']:.4f}"
        assert row[4].strip() == f"{run['run']['peak_memory']['bytes'] / 2**20:.0f} MiB"


def test_the_layers_and_the_path_they_take_are_printed(trained: Trained) -> None:
    lines = trained.outcome.out.splitlines()
    swapped = {line.split()[0] for line in lines if " swapped " in line and line.startswith("blocks")}
    assert swapped == {f"blocks.{block}.mlp.{layer}" for block in (0, 1) for layer in ("fc1", "fc2")}
    first = json.loads((trained.folder / "results.json").read_text())["runs"][0]
    assert set(first["settings"]["sparse_layers"]) == swapped
    assert "sparse layers computed by: masked dense (reference) (CPU)" in lines


def test_progress_is_lines_in_a_pipe(trained: Trained) -> None:
    assert trained.outcome.err == ""
    lines = [line for line in trained.outcome.out.splitlines() if ": step " in line]
    assert [line.partition(":")[0] for line in lines] == [
        name
        for name in ("dense", "sparse then dense (70 %)", "fully sparse")
        for _ in range(2)  # epochs
    ]
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", trained.outcome.out)  # no carriage return, no colour


def test_options_arrive_in_the_run(tmp_path: Path) -> None:
    options = ["--sparse-fraction", "0.25", "--layers", "blocks.1.*", "--seed", "5", "--lr", "0.001",
               "--precision", "bf16"]  # fmt: skip
    outcome = semisparse_lab("train", *TINY, *options, "--out", tmp_path / "out")
    assert outcome.code == 0
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    expected = {
        "epochs": 2,
        "batch_size": 128,
        "layers": "blocks.1.*",
        "lr": 0.001,
        "precision": "bf16",
        "device": "cpu",
    }
    middle = document["runs"][1]
    assert expected.items() <= middle["settings"]["train"].items()
    assert (middle["seed"], middle["recipe"]["sparse_fraction"]) == (5, 0.25)
    assert {name.split(".")[1] for name in middle["settings"]["sparse_layers"]} == {"1"}
    assert middle["row_title"] == "sparse then dense (25 %)"
    spans = [(phase["kind"], phase["start"], phase["end"]) for phase in middle["run"]["phases"]]
    steps = middle["run"]["steps"]
    assert spans == [("sparse", 0, round(steps / 4)), ("dense", round(steps / 4), steps)]


def test_fashion_mnist_trains_from_its_folder(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    options = ["--data", "fashion-mnist", "--data-dir", tmp_path, "--epochs", "1", "--batch-size", "32"]
    outcome = semisparse_lab("train", *options, "--device", "cpu", "--out", tmp_path / "out")
    assert outcome.code == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["runs"][0]["settings"]["data"] == "fashion-mnist"


def test_results_are_never_overwritten_unasked(trained: Trained) -> None:
    before = contents(trained.folder)
    outcome = semisparse_lab("train", *TINY, "--out", trained.folder)
    assert outcome.code == 2
    assert outcome.out == ""
    assert re.fullmatch(
        r"error: --out='.*' is not empty; choose another folder or overwrite it with --force\n", outcome.err
    )
    assert contents(trained.folder) == before


def test_force_replaces_results_and_leaves_other_files_alone(trained: Trained, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(trained.folder, folder)
    (folder / "notes.txt").write_text("mine")
    before = contents(folder)
    assert semisparse_lab("train", *TINY, "--seed", "1", "--out", folder, "--force").code == 0
    after = contents(folder)
    assert set(after) == FILES | {"notes.txt"}
    assert {name for name in after if after[name] == before[name]} == {"notes.txt"}


REFUSED = {
    "layers": (["--layers", "mpl"], r"--layers='mpl'.*closest names: 'blocks\.0\.mlp\.fc1'"),
    "layers that stay dense": (["--layers", "head"], r"--layers='head'.*no layer of model would change"),
    "sparse fraction": (["--sparse-fraction", "1"], "--sparse-fraction=1.0 must lie between 0 and 1, both excluded"),
    "epochs": (["--epochs", "0"], "--epochs=0 must be a whole number, 1 or more"),
    "batch size": (["--batch-size", "5000"], "--batch-size=5000 exceeds the [0-9]+ training images"),
    "learning rate": (["--lr", "-1"], "--lr=-1.0 must be a positive number"),
    "seed": (["--seed", "-1"], "--seed=-1 must be a whole number, 0 or more"),
    "data without folder": (["--data", "fashion-mnist"], "needs --data-dir"),
    "folder for digits": (["--data-dir", "somewhere"], "--data-dir='somewhere': digits come with scikit-learn"),
    "device": (["--device", "cuda"], "--device='cuda': torch sees 0 CUDA devices; use 'cpu'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_ends_with_code_2_and_one_line_before_anything_is_written(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    options, message = REFUSED[case]
    outcome = semisparse_lab("train", *TINY, "--out", tmp_path / "out", *options)
    assert outcome.code == 2
    assert outcome.out == ""
    assert re.fullmatch(f"error: .*{message}.*\n", outcome.err), outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("option", "value"), [("--precision", "fp8"), ("--data", "cifar"), ("--epochs", "many")])
def test_values_outside_an_options_choices_are_refused_by_name(option: str, value: str, tmp_path: Path) -> None:
    outcome = semisparse_lab("train", "--out", tmp_path / "out", option, value)
    assert outcome.code == 2
    assert option in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_damaged_data_file_is_named_with_its_sizes(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-5])
    outcome = semisparse_lab("train", "--data", "fashion-mnist", "--data-dir", tmp_path, "--out", tmp_path / "out")
    assert outcome.code == 2
    size = 120 * 28 * 28
    assert re.search(rf"error: .*train-images-idx3-ubyte.*{size} bytes.*holds {size - 5}", outcome.err)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    outcome = semisparse_lab("train", *TINY, "--out", tmp_path / "out", "--force")
    assert outcome.code == 2
    assert "is a file, not a folder" in outcome.err
    assert (tmp_path / "out").read_text() == "mine"


def test_the_module_runs_as_a_program() -> None:
    result = fresh.run("-m", "semisparse_lab", "train", "--epochs", 0)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: --epochs=0 must be a whole number, 1 or more\n"


def test_help_lists_the_commands() -> None:
    outcome = semisparse_lab("--help")
    assert outcome.code == 0
    assert all(f" {command} " in outcome.out for command in ("train", "evaluate", "experiment"))
