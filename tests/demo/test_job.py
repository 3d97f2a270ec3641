"""The main job: its output folder, what it checks first, and checkpoints that reproduce its table in a plain model."""

import json
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from semisparse.demo import evaluation, job
from semisparse.demo.model import VisionTransformer
from semisparse.demo.presets import Preset
from semisparse.demo.results import RunResult
from semisparse.demo.task import Augmentation, classification_scores
from semisparse.demo.training import Progress
from semisparse.errors import CheckpointError, ConfigError, DataError, NoLayerMatched, OutputExists
from tests.demo.toys import MODEL, TRAIN, kept_per_group, toy_data, write_fashion_mnist

SETTINGS = Preset(MODEL, TRAIN, Augmentation())
SLUGS = ["dense", "sparse-then-dense", "fully-sparse"]
SPARSE = ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]


@dataclass(frozen=True)
class Done:
    """A finished job on toy data. reports: run name -> how often its progress was told."""

    folder: Path
    results: tuple[RunResult, ...]
    reports: dict[str, int]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("job")
    reports: dict[str, int] = {}

    @contextmanager
    def progress_for(name: str):
        def count(progress: Progress) -> None:
            assert progress.name == name
            reports[name] = reports.get(name, 0) + 1

        yield count

    return Done(folder, job.run_job(toy_data(), SETTINGS, folder, progress_for), reports)


@contextmanager
def silent(name: str):
    yield lambda progress: None


def plain_model(path: Path) -> VisionTransformer:
    """The checkpoint in a model of plain nn.Linear, loaded by safetensors and torch alone."""
    model = VisionTransformer(MODEL)
    assert {type(module) for module in model.modules() if isinstance(module, nn.Linear)} == {nn.Linear}
    model.load_state_dict(safetensors.torch.load_file(path), strict=True)
    return model.eval()


@pytest.mark.parametrize("place", range(3), ids=SLUGS)
def test_a_checkpoint_in_a_plain_model_scores_exactly_what_the_run_did(place: int, done: Done) -> None:
    model = plain_model(done.folder / f"{SLUGS[place]}.safetensors")
    with torch.inference_mode():
        assert classification_scores(model, toy_data().test) == done.results[place].test


def test_the_fully_sparse_checkpoint_holds_pruned_weights_and_the_others_do_not(done: Done) -> None:
    for slug in SLUGS:
        weights = plain_model(done.folder / f"{slug}.safetensors").state_dict()
        kept = [int(kept_per_group(turned).max()) for name in SPARSE
                for turned in (weights[f"{name}.weight"], weights[f"{name}.weight"].T)]  # fmt: skip
        assert kept == [2 if slug == "fully-sparse" else 4] * 4
        assert kept_per_group(weights["blocks.0.attn.qkv.weight"]).max() == 4


def test_results_name_runs_settings_layers_and_checkpoints(done: Done) -> None:
    document = json.loads((done.folder / job.RESULTS_FILE).read_text())
    assert [run["test"]["accuracy"] for run in document["runs"]] == [run.test.accuracy for run in done.results]
    assert document["settings"]["sparse_layers"] == SPARSE
    weights = {name: entry["weights"] for name, entry in document["settings"]["checkpoints"].items()}
    assert weights == {"dense": "dense", "sparse then dense (70 %)": "dense", "fully sparse": "masked"}
    for entry in document["settings"]["checkpoints"].values():
        assert (done.folder / entry["file"]).exists()
    assert (done.folder / job.PLOT_FILE).read_bytes().startswith(b"\x89PNG")
    steps_and_epochs = done.results[0].steps + TRAIN.epochs
    assert done.reports == {run.name: steps_and_epochs for run in done.results}


def test_a_checkpoint_is_scored_in_the_precision_it_was_trained_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "load_dataset", lambda name, folder, device: toy_data())
    settings = replace(SETTINGS, train=replace(TRAIN, precision="bf16"))
    results = job.run_job(toy_data(), settings, tmp_path, silent)
    for slug, run in zip(SLUGS, results, strict=True):
        path = tmp_path / f"{slug}.safetensors"
        found = evaluation.evaluate_checkpoint(path, "toy", device="cpu")
        assert (found.scores, found.recorded) == (run.test, run.test.accuracy)
        with torch.inference_mode():
            assert classification_scores(plain_model(path), toy_data().test) != run.test  # fp32


def test_a_checkpoint_of_other_data_or_another_precision_is_refused(done: Done, tmp_path: Path) -> None:
    path = done.folder / "dense.safetensors"
    with pytest.raises(CheckpointError, match="was trained on 'toy', not on data='digits'"):
        evaluation.evaluate_checkpoint(path, "digits")
    write_fashion_mnist(tmp_path)
    sidecar = path.with_suffix(".json")
    description = json.loads(sidecar.read_text())
    for name, value in {"data": "digits", "precision": "fp8"}.items():
        description["info"][name] = value
    for ending in (".safetensors", ".json"):
        (tmp_path / f"edited{ending}").write_bytes(path.with_suffix(ending).read_bytes())
    (tmp_path / "edited.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="precision 'fp8', not one of fp32, bf16, fp16"):
        evaluation.evaluate_checkpoint(tmp_path / "edited.safetensors", "digits")
    with pytest.raises(DataError, match="leave data_dir out"):
        description["info"]["precision"] = "fp32"
        (tmp_path / "edited.json").write_text(json.dumps(description))
        evaluation.evaluate_checkpoint(tmp_path / "edited.safetensors", "digits", tmp_path)


def test_a_folder_with_anything_in_it_is_refused_unless_forced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputExists, match="--force"):
        job.prepare_output(tmp_path, force=False)
    (tmp_path / job.RESULTS_FILE).write_text("{}")
    with pytest.raises(OutputExists, match="--force"):
        job.prepare_output(tmp_path, force=False)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", job.RESULTS_FILE}
    job.prepare_output(tmp_path, force=True)
    # The old results would describe checkpoints that are about to be replaced.
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt"}


def test_an_empty_folder_or_none_is_ready(tmp_path: Path) -> None:
    job.prepare_output(tmp_path, force=False)
    job.prepare_output(tmp_path / "a" / "b", force=False)
    assert (tmp_path / "a" / "b").is_dir()


def test_a_folder_that_cannot_be_made_or_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputExists, match="is a file"):
        job.prepare_output(tmp_path / "file", force=True)
    with pytest.raises(ConfigError, match=r"out='.*below' cannot be written: Not a directory"):
        job.prepare_output(tmp_path / "file" / "below", force=False)
    monkeypatch.setattr(job.os, "access", lambda path, mode: False)  # the tests may run as root, who may write anywhere
    with pytest.raises(ConfigError, match="no permission to write there"):
        job.prepare_output(tmp_path / "new", force=False)


def test_a_disk_that_is_full_at_the_end_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, document: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(job, "write_results", full)

    with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
        job.run_job(toy_data(), SETTINGS, tmp_path, silent)
    assert {path.stem for path in tmp_path.glob("*.safetensors")} == set(SLUGS)  # the runs are not lost


def test_the_report_needs_no_weights_and_names_what_matches_nothing() -> None:
    assert list(job.swap_report(MODEL, "mlp").swapped) == SPARSE
    with pytest.raises(NoLayerMatched, match=r"layers='mpl': .*closest names: 'blocks\.0\.mlp"):
        job.swap_report(MODEL, "mpl")
