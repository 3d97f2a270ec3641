"""The three runs: what they leave, what is checked first, and checkpoints that reproduce the table in a plain model."""

import json
import math
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from lab.tests.rewriting import described, with_info
from lab.tests.toys import MODEL, TRAIN, kept_per_group, toy_data, write_fashion_mnist
from semisparse.errors import ConfigError, NoLayerMatchedError
from semisparse_lab import pipeline, strict_json
from semisparse_lab.checkpoint import evaluation
from semisparse_lab.errors import CheckpointError, DataError
from semisparse_lab.models.vit import VisionTransformer
from semisparse_lab.output import prepare_output
from semisparse_lab.pipeline import PLOT_FILE, RESULTS_FILE, run_rows
from semisparse_lab.studies import three_runs
from semisparse_lab.studies.three_runs import Preset
from semisparse_lab.tasks.classification import Augmentation, classification_scores
from semisparse_lab.train.loop import Progress

SETTINGS = Preset(MODEL, TRAIN, Augmentation())
SLUGS = ["dense", "sparse-then-dense", "fully-sparse"]
SPARSE = ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]


@contextmanager
def silent(name: str):
    yield lambda progress: None


def train_all(
    folder: Path, settings: Preset = SETTINGS, fraction: float = 0.7, progress_for=silent, keep=lambda path: None
):
    experiment = three_runs.experiment(toy_data(), settings, fraction, out=folder, keep=keep)
    return run_rows(experiment, settings.train.seed, folder, progress_for, keep=keep)


@dataclass(frozen=True)
class Done:
    """The three runs on toy data. reports: run name -> how often its progress was told."""

    folder: Path
    runs: list[dict[str, Any]]
    reports: dict[str, int]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("runs")
    reports: dict[str, int] = {}

    @contextmanager
    def progress_for(name: str):
        def count(progress: Progress) -> None:
            assert progress.name == name
            reports[name] = reports.get(name, 0) + 1

        yield count

    return Done(folder, train_all(folder, progress_for=progress_for), reports)


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
        assert asdict(classification_scores(model, toy_data().test)) == done.runs[place]["run"]["test"]


def test_the_fully_sparse_checkpoint_holds_pruned_weights_and_the_others_do_not(done: Done) -> None:
    for slug in SLUGS:
        weights = plain_model(done.folder / f"{slug}.safetensors").state_dict()
        kept = [
            int(kept_per_group(turned).max())
            for name in SPARSE
            for turned in (weights[f"{name}.weight"], weights[f"{name}.weight"].T)
        ]
        assert kept == [2 if slug == "fully-sparse" else 4] * 4
        assert kept_per_group(weights["blocks.0.attn.qkv.weight"]).max() == 4


def test_results_name_runs_settings_layers_and_checkpoints(done: Done) -> None:
    document = strict_json.read(done.folder / RESULTS_FILE)
    assert document == {"finished": True, "runs": json.loads(json.dumps(done.runs))}
    for slug, weights, run in zip(SLUGS, ("dense", "dense", "masked"), document["runs"], strict=True):
        assert run["settings"]["sparse_layers"] == SPARSE and run["value"] == 100 * run["run"]["test"]["accuracy"]
        assert run["more"] == {
            "checkpoint": f"{slug}.safetensors",
            "weights": weights,
            "sha256": described(done.folder / f"{slug}.safetensors")["sha256"],
        }
    assert (done.folder / PLOT_FILE).read_bytes().startswith(b"\x89PNG")
    titles = ["dense", "sparse then dense (70 %)", "fully sparse"]
    assert [run["row_title"] for run in document["runs"]] == titles
    assert done.reports == dict.fromkeys(titles, done.runs[0]["run"]["steps"] + TRAIN.epochs)


def test_a_checkpoint_is_scored_in_the_precision_it_was_trained_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "load_dataset", lambda name, folder, device: toy_data())
    settings = replace(SETTINGS, train=replace(TRAIN, precision="bf16"))
    for slug, document in zip(SLUGS, train_all(tmp_path, settings), strict=True):
        run = document["run"]
        path = tmp_path / f"{slug}.safetensors"
        found = evaluation.evaluate_checkpoint(path, "toy", device="cpu")
        assert (asdict(found.scores), found.recorded) == (run["test"], run["test"]["accuracy"])
        with torch.inference_mode():
            assert asdict(classification_scores(plain_model(path), toy_data().test)) != run["test"]  # fp32


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


def test_links_planted_under_the_names_of_results_are_replaced_and_never_followed(tmp_path: Path) -> None:
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.write_text("mine")
    out.mkdir()
    for name in three_runs.FILES:
        (out / name).symlink_to(victim)
    prepare_output(out, three_runs.FILES, force=True)
    train_all(out)
    assert victim.read_text() == "mine"
    assert {path.name for path in out.iterdir() if not path.is_symlink()} == set(three_runs.FILES)


def test_after_each_run_the_results_describe_what_is_there(tmp_path: Path) -> None:
    seen = []

    @contextmanager
    def looking(name: str):
        yield lambda progress: None
        path = tmp_path / RESULTS_FILE
        seen.append(json.loads(path.read_text()) if path.exists() else None)

    kept: list[Path] = []
    train_all(tmp_path, progress_for=looking, keep=kept.append)
    assert seen[0] is None
    for count, document in enumerate([*seen[1:], json.loads((tmp_path / RESULTS_FILE).read_text())], start=1):
        assert len(document["runs"]) == count and document["finished"] is (count == 3)
        for run in document["runs"]:
            assert described(tmp_path / run["more"]["checkpoint"])["sha256"] == run["more"]["sha256"]
    assert {path.name for path in kept} == set(three_runs.FILES) and len(kept) == 9


def test_a_run_that_diverges_is_marked_and_written(tmp_path: Path) -> None:
    runs = train_all(tmp_path, replace(SETTINGS, train=replace(TRAIN, lr=1e30)))
    assert [run["value"] for run in runs] == [None] * 3
    assert json.loads((tmp_path / RESULTS_FILE).read_text())["runs"] == json.loads(json.dumps(runs))
    assert described(tmp_path / "dense.safetensors")["info"]["diverged"] is True
    assert {path.name for path in tmp_path.iterdir()} == set(three_runs.FILES)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, math.nan])
def test_the_middle_run_needs_both_phases(fraction: float) -> None:
    with pytest.raises(ConfigError, match="both excluded"):
        three_runs.rows(fraction)


def test_a_fraction_that_leaves_one_phase_without_steps_is_refused_before_training(tmp_path: Path) -> None:
    for fraction, steps in ((1e-9, 0), (1 - 1e-9, 15)):
        with pytest.raises(ConfigError, match=rf"sparse_fraction=.* of 15 steps is {steps} steps"):
            train_all(tmp_path, fraction=fraction)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_at_the_end_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, document: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipeline, "write_document", full)

    with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
        train_all(tmp_path)
    assert {path.stem for path in tmp_path.glob("*.safetensors")} == set(SLUGS)  # the runs are not lost


def test_the_report_needs_no_weights_and_names_what_matches_nothing() -> None:
    assert list(three_runs.swap_report(MODEL, "mlp").swapped) == SPARSE
    with pytest.raises(NoLayerMatchedError, match=r"layers='mpl': .*closest names: 'blocks\.0\.mlp"):
        three_runs.swap_report(MODEL, "mpl")
