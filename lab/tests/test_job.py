"""The main job: its output folder, what it checks first, and checkpoints that reproduce its table in a plain model."""

import json
import os
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from lab.tests.rewriting import described, with_info
from lab.tests.toys import MODEL, TRAIN, kept_per_group, toy_data, write_fashion_mnist
from semisparse.errors import ConfigError, NoLayerMatchedError
from semisparse_lab import job
from semisparse_lab.checkpoint import evaluation
from semisparse_lab.errors import CheckpointError, DataError, OutputExistsError
from semisparse_lab.models.vit import VisionTransformer
from semisparse_lab.presets import Preset
from semisparse_lab.tasks.classification import Augmentation, classification_scores
from semisparse_lab.train.loop import Progress
from semisparse_lab.train.results import RunResult

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
    edited = tmp_path / "edited.safetensors"
    edited.write_bytes(path.read_bytes())
    with_info(edited, data="digits", precision="fp8")
    with pytest.raises(CheckpointError, match="precision 'fp8', not one of fp32, bf16, fp16"):
        evaluation.evaluate_checkpoint(edited, "digits")
    with_info(edited, precision="fp32")
    with pytest.raises(DataError, match="leave data_dir out"):
        evaluation.evaluate_checkpoint(edited, "digits", tmp_path)
    with pytest.raises(CheckpointError, match=r"tells 4 classes apart, data='digits' has 1 x 8 x 8 and 10"):
        evaluation.evaluate_checkpoint(edited, "digits")
    with_info(edited, data="fashion-mnist")
    with pytest.raises(CheckpointError, match=r"takes 1 x 8 x 8 pixels .* data='fashion-mnist' has 1 x 28 x 28"):
        evaluation.evaluate_checkpoint(edited, "fashion-mnist", tmp_path)


@pytest.mark.parametrize(
    "info",
    [{"test_accuracy": "0.5"}, {"test_accuracy": [1]}, {"test_accuracy": 10**400}, {"test_accuracy": True},
     {"test_accuracy": -0.1}, {"precision": ["fp32"]}, {"precision": {}}, {"data": 7}, {"data": "x" * 10**6}],
    ids=str,
)  # fmt: skip
def test_what_a_checkpoint_says_of_its_run_is_checked(done: Done, tmp_path: Path, info: dict) -> None:
    edited = tmp_path / "edited.safetensors"
    edited.write_bytes((done.folder / "dense.safetensors").read_bytes())
    with_info(edited, **{"data": "digits", **info})
    with pytest.raises(CheckpointError, match=r"edited\.safetensors") as found:
        evaluation.evaluate_checkpoint(edited, "digits")
    assert len(str(found.value)) < 600


def test_a_folder_with_anything_in_it_is_refused_unless_forced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="--force"):
        job.prepare_output(tmp_path, force=False)
    (tmp_path / job.RESULTS_FILE).write_text("{}")
    with pytest.raises(OutputExistsError, match="--force"):
        job.prepare_output(tmp_path, force=False)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", job.RESULTS_FILE}
    job.prepare_output(tmp_path, force=True)
    # Nothing is deleted before there is something to put in its place.
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", job.RESULTS_FILE}


@pytest.mark.parametrize("name", job.FILES)
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_name_that_no_file_can_take_is_refused_before_training(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(ConfigError, match=rf"out=.* cannot be written: {name} is there and not a file"):
        job.prepare_output(tmp_path, force=True)
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_as_output_folder_is_followed_and_one_to_nothing_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    job.prepare_output(tmp_path / "link", force=False)
    for name in ("nowhere", "itself"):
        (tmp_path / name).symlink_to(tmp_path / {"nowhere": "missing", "itself": "itself"}[name])
        with pytest.raises(OutputExistsError, match="is a link to nothing"):
            job.prepare_output(tmp_path / name, force=True)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "to a file").symlink_to(tmp_path / "file")
    with pytest.raises(OutputExistsError, match="is a file, not a folder"):
        job.prepare_output(tmp_path / "to a file", force=True)
    with pytest.raises(ConfigError, match="cannot be written: File name too long"):
        job.prepare_output(tmp_path / ("x" * 300), force=True)


def test_links_planted_under_the_names_of_results_are_replaced_and_never_followed(tmp_path: Path) -> None:
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.write_text("mine")
    out.mkdir()
    for name in job.FILES:
        (out / name).symlink_to(victim)
    job.prepare_output(out, force=True)
    job.run_job(toy_data(), SETTINGS, out, silent)
    assert victim.read_text() == "mine"
    assert {path.name for path in out.iterdir() if not path.is_symlink()} == set(job.FILES)


def test_after_each_run_the_results_describe_what_is_there(tmp_path: Path) -> None:
    seen = []

    @contextmanager
    def looking(name: str):
        yield lambda progress: None
        path = tmp_path / job.RESULTS_FILE
        seen.append(json.loads(path.read_text()) if path.exists() else None)

    kept: list[Path] = []
    job.run_job(toy_data(), SETTINGS, tmp_path, looking, keep=kept.append)
    assert seen[0] is None
    for count, document in enumerate([*seen[1:], json.loads((tmp_path / job.RESULTS_FILE).read_text())], start=1):
        assert len(document["runs"]) == len(document["settings"]["checkpoints"]) == count
        assert document["finished"] is (count == 3)
        for entry in document["settings"]["checkpoints"].values():
            assert described(tmp_path / entry["file"])["sha256"] == entry["sha256"]
    assert {path.name for path in kept} == set(job.FILES) and len(kept) == 9


def test_a_run_that_diverges_is_marked_and_written(tmp_path: Path) -> None:
    results = job.run_job(toy_data(), replace(SETTINGS, train=replace(TRAIN, lr=1e30)), tmp_path, silent)
    assert all(result.diverged for result in results)
    document = json.loads((tmp_path / job.RESULTS_FILE).read_text())
    assert [run["diverged"] for run in document["runs"]] == [True] * 3
    assert described(tmp_path / "dense.safetensors")["info"]["diverged"] is True
    assert {path.name for path in tmp_path.iterdir()} == set(job.FILES)


def test_a_fraction_that_leaves_one_phase_without_steps_is_refused_before_training(tmp_path: Path) -> None:
    for fraction, steps in ((1e-9, 0), (1 - 1e-9, 15)):
        settings = replace(SETTINGS, train=replace(TRAIN, sparse_fraction=fraction))
        with pytest.raises(ConfigError, match=rf"sparse_fraction=.* of 15 steps is {steps} steps"):
            job.run_job(toy_data(), settings, tmp_path, silent)
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_or_none_is_ready(tmp_path: Path) -> None:
    job.prepare_output(tmp_path, force=False)
    job.prepare_output(tmp_path / "a" / "b", force=False)
    assert (tmp_path / "a" / "b").is_dir()


def test_a_folder_that_cannot_be_made_or_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputExistsError, match="is a file"):
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
    with pytest.raises(NoLayerMatchedError, match=r"layers='mpl': .*closest names: 'blocks\.0\.mlp"):
        job.swap_report(MODEL, "mpl")
