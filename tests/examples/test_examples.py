"""The examples run as a reader runs them, at toy size, are short, and use public names only."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import fresh
from tests.arch.source import ROOT
from tests.arch.test_lab_imports import PUBLIC

EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}
TOY = {
    "image_model": ("--steps", 40, "--width", 32, "--depth", 1),
    "language_model": ("--steps", 40, "--width", 32, "--depth", 1, "--context", 32),
    "self_supervised_student": ("--steps", 40, "--width", 32),
    "resume": ("--steps", 60, "--stop-at", 47, "--width", 32),  # between two refreshes of the masks
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LONGEST = 120


def start(name: str, *options: object, device: str = "cpu") -> subprocess.CompletedProcess[str]:
    """The example from start to end, however it ends."""
    return fresh.run(EXAMPLES[name], "--device", device, *options, trains=True)


def run(name: str, *options: object, device: str = "cpu") -> str:
    """What the example prints."""
    done = start(name, *options, device=device)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tried() -> None:
    assert EXAMPLES.keys() == TOY.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short(name: str) -> None:
    assert len(EXAMPLES[name].read_text().splitlines()) <= LONGEST


def used_names(path: Path) -> set[str]:
    """Every name of semisparse that a file imports or reads from a module, dotted."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("semisparse.")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0].startswith("semisparse"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if re.fullmatch(r"(semisparse|recipes)\.\w+", name):
                found.add(name.replace("recipes.", "semisparse.recipes.") if name.startswith("recipes") else name)
    return found


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_uses_public_names_only(name: str) -> None:
    assert used_names(EXAMPLES[name]) <= PUBLIC


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_needs_torch_and_numpy_alone(name: str) -> None:
    imported = set()
    for node in ast.walk(ast.parse(EXAMPLES[name].read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert imported <= {"semisparse", "torch", "numpy", *sys.stdlib_module_names}


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name: str, device: str) -> None:
    out = run(name, *TOY[name], device=device)
    expected = {
        "image_model": r"step 40: dense next.*accuracy on 400 held-out images: \d+\.\d%",
        "language_model": r"step 40: dense next.*held-out text: \d\.\d+ bits per byte",
        "self_supervised_student": r"step 40: dense next.*teacher: nearest-neighbour accuracy \d+\.\d%",
        "resume": r"stopped after step 47, goes on sparse.*all weights are equal, bit for bit",
    }
    assert re.search(expected[name], out, flags=re.DOTALL), out


@pytest.mark.slow
def test_the_image_model_learns_from_a_file(tmp_path: Path) -> None:
    labels = np.arange(400) % 10
    shapes = np.random.default_rng(0).standard_normal((10, 8, 8))
    np.savez(tmp_path / "images.npz", images=shapes[labels], labels=labels)
    out = run("image_model", "--data", tmp_path / "images.npz", "--steps", 60, "--depth", 1)
    assert "accuracy on 40 held-out images: 100.0%" in out


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["sr_ste", "fst", "s_ste"])
def test_the_language_model_learns_a_file_with_each_recipe(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("two of four, " * 400)
    options = ("--text", tmp_path / "text", "--recipe", recipe, "--steps", 60, "--context", 16, "--depth", 1)
    bits = re.search(r"held-out text: (\d\.\d+)", run("language_model", *options))
    assert bits and float(bits[1]) < 2  # an untrained model needs 8


def test_the_images_are_cut_into_patches_row_by_row() -> None:
    namespace: dict[str, object] = {"__name__": "image_model"}
    exec(compile(EXAMPLES["image_model"].read_text(), "image_model.py", "exec"), namespace)
    model = namespace["ViT"](8, 4, 1)
    seen = []
    model.patch_embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = torch.arange(64.0).view(1, 8, 8)
    model(images)
    assert torch.equal(seen[0][0, 1], images[0, :4, 4:].flatten())


@pytest.mark.parametrize("options", [("--steps", 30), ("--stop-at", 0), ("--steps", 30, "--stop-at", 30)])
def test_a_stop_outside_of_the_training_is_refused(options: tuple[object, ...]) -> None:
    done = start("resume", *options)
    assert done.returncode == 2 and "must lie between 0 and --steps" in done.stderr
