"""`semisparse-lab evaluate`: a checkpoint scores in a plain nn.Linear model what the table said."""

import json
import re
import shutil
from pathlib import Path

import pytest

from lab.tests.cli.shell import Trained, semisparse_lab
from lab.tests.rewriting import with_info
from lab.tests.toys import write_fashion_mnist
from semisparse_lab.checkpoint import file as checkpoint


@pytest.fixture
def copied(trained: Trained, tmp_path: Path) -> Path:
    """The fully sparse run's checkpoint, to be damaged."""
    shutil.copy(trained.folder / "fully-sparse.safetensors", tmp_path)
    return tmp_path / "fully-sparse.safetensors"


@pytest.mark.parametrize(("place", "slug"), [(0, "dense"), (1, "sparse-then-dense"), (2, "fully-sparse")])
def test_it_reproduces_the_accuracy_of_the_table(place: int, slug: str, trained: Trained) -> None:
    run = json.loads((trained.folder / "results.json").read_text())["runs"][place]["run"]
    accuracy = f"test accuracy {100 * run['test']['accuracy']:.2f} %"
    path = trained.folder / f"{slug}.safetensors"
    outcome = semisparse_lab("evaluate", path, "--device", "cpu")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines() == [
        f"{path}: {accuracy}, loss {run['test']['loss']:.4f}",
        f"recorded after training: {accuracy}",
    ]


def test_what_is_printed_first_is_computed_now(copied: Path) -> None:
    true = semisparse_lab("evaluate", copied).out.splitlines()
    with_info(copied, test_accuracy=0.125)
    assert semisparse_lab("evaluate", copied).out.splitlines() == [
        true[0],
        "recorded after training: test accuracy 12.50 %",
    ]
    assert "12.50" not in true[0]


def test_without_a_recorded_accuracy_only_the_score_is_printed(copied: Path) -> None:
    loaded = checkpoint.load(copied)
    checkpoint.save(copied, loaded.model, {"data": "digits"})
    outcome = semisparse_lab("evaluate", copied)
    assert outcome.code == 0
    assert len(outcome.out.splitlines()) == 1


def damaged(path: Path) -> str:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return r"is damaged or was edited: the sha256 of its contents is [0-9a-f]{64}, it says '[0-9a-f]{64}'"


def cut(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:1000])
    return "not a safetensors file, or cut off in its header"


def removed(path: Path) -> str:
    path.unlink()
    return r"fully-sparse\.safetensors is missing"


def of_another_precision(path: Path) -> str:
    with_info(path, precision="fp8")
    return "names precision 'fp8', not one of fp32, bf16, fp16"


@pytest.mark.parametrize("damage", [damaged, cut, removed, of_another_precision])
def test_a_damaged_checkpoint_ends_with_code_2_and_the_reason(damage, copied: Path) -> None:
    message = damage(copied)
    outcome = semisparse_lab("evaluate", copied)
    assert (outcome.code, outcome.out) == (2, "")
    assert re.fullmatch(f"error: .*{message}.*\n", outcome.err), outcome.err


def test_other_data_than_it_was_trained_on_are_refused(copied: Path, tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    outcome = semisparse_lab("evaluate", copied, "--data", "fashion-mnist", "--data-dir", tmp_path)
    assert (outcome.code, outcome.out) == (2, "")
    assert "was trained on 'digits', not on --data='fashion-mnist'" in outcome.err
