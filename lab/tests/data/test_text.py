"""The corpus of the standard library, the task on it, and the GPT."""

import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from semisparse.errors import ConfigError, ShapeError
from semisparse_lab.data.text import Corpus, packages, standard_library
from semisparse_lab.errors import DataError
from semisparse_lab.models.gpt import GPT, GPTConfig, build_gpt
from semisparse_lab.tasks.next_byte import NextByte, NextByteOnce, bits_per_byte

TINY = GPTConfig(context=8, width=16, depth=2, heads=2)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for number in range(80):
        folder = tmp_path / f"package{number % 4}"
        folder.mkdir(exist_ok=True)
        (folder / f"module{number}.py").write_text(f"value = {number}\n")
    for left_out in ("site-packages", "test"):
        (tmp_path / left_out).mkdir()
        (tmp_path / left_out / "secret.py").write_text("secret\n")
    (tmp_path / "notes.txt").write_text("secret\n")
    return tmp_path


def test_whole_files_go_to_one_set_each_and_nothing_else_is_read(library: Path) -> None:
    corpus = standard_library(library)
    texts = {part: bytes(getattr(corpus, part).tolist()).split(b"\0")[:-1] for part in ("train", "validation", "test")}
    every = [text for part in texts.values() for text in part]
    assert sorted(every) == sorted(f"value = {number}\n".encode() for number in range(80))
    assert corpus.files == 80 and len(texts["train"]) > 60
    same = standard_library(library)
    assert same.sha256 == corpus.sha256 and torch.equal(same.train, corpus.train)
    (library / "package0" / "module0.py").rename(library / "package0" / "other0.py")  # its name decides its set
    renamed = standard_library(library)
    assert renamed.sha256 != corpus.sha256
    (library / "package0" / "other0.py").write_text("value = -1\n")
    assert standard_library(library).sha256 != renamed.sha256


def test_this_interpreters_library_is_large_enough() -> None:
    corpus = standard_library()
    assert len(corpus.train) > 5_000_000 and min(len(corpus.validation), len(corpus.test)) > 100_000


def test_a_folder_without_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has 0 \.py files"):
        standard_library(tmp_path)
    with pytest.raises(DataError, match=r"0 \.py files"):
        standard_library(tmp_path / "missing")


def test_packages_are_read_once_each_whatever_their_bytes_and_names(library: Path) -> None:
    plain = standard_library(library)
    (library / "zcopy.py").write_bytes((library / "package0" / "module0.py").read_bytes())
    (library / "zlink.py").symlink_to(library / "package0" / "module4.py")
    (library / "znowhere.py").symlink_to(library / "missing.py")
    (library / "zfolder").symlink_to(library / "package0", target_is_directory=True)
    (library / "zround").symlink_to(library, target_is_directory=True)
    same = packages(library, most=10_000)
    assert (same.sha256, same.files) == (plain.sha256, plain.files)
    (library / "zlatin.py").write_bytes(b"name = 'caf\xe9\xff'\n")
    (library / os.fsdecode(b"z\xff.py")).write_text("value = 'odd'\n")
    more = packages(library, most=10_000)
    text = b"".join(bytes(part.tolist()) for part in (more.train, more.validation, more.test))
    assert b"caf\xe9\xff" in text and b"'odd'" in text and more.files == plain.files + 2


def test_packages_beside_torch_are_large_enough_and_end_at_a_limit() -> None:
    corpus, same = packages(most=3_000_000), packages(most=3_000_001)
    assert len(corpus.train) == 3_000_000 and min(len(corpus.validation), len(corpus.test)) >= 60_000
    assert torch.equal(corpus.train, same.train[:-1])
    assert len(standard_library().train) > 3_000_000  # which has no limit


def corpus(train: int = 100) -> Corpus:
    data = torch.arange(train) % 251
    return Corpus(data.to(torch.uint8), data[:30].to(torch.uint8), data[:40].to(torch.uint8), 1, "")


def test_batches_are_windows_and_what_follows_them() -> None:
    task = NextByte(corpus(), 8)
    assert task.steps_per_epoch(3) == 4
    batches = list(task.batches(3, torch.Generator().manual_seed(1)))
    assert len(batches) == 4
    for x, y in batches:
        assert x.shape == y.shape == (3, 8) and torch.equal(x[:, 1:], y[:, :-1])
        assert bool(((y - x) % 251 == 1).all())
    other = list(task.batches(3, torch.Generator().manual_seed(1)))
    assert all(
        torch.equal(a, b) for one, two in zip(batches, other, strict=True) for a, b in zip(one, two, strict=True)
    )


def windows(task: NextByteOnce, batch_size: int, seed: int) -> list[bytes]:
    """All windows of a run, inputs and the byte that follows."""
    order = torch.Generator().manual_seed(seed)
    batches = [batch for _ in range(task.parts) for batch in task.batches(batch_size, order)]
    return [bytes([*x, y[-1]]) for xs, ys in batches for x, y in zip(xs.tolist(), ys.tolist(), strict=True)]


def test_a_pass_has_each_byte_at_most_once_in_the_order_of_its_seed() -> None:
    task = NextByteOnce(corpus(251), 8, parts=3)  # 27 windows of 9 bytes
    assert task.steps_per_epoch(2) == 4
    seen = windows(task, 2, seed=1)
    assert len(seen) == 24 and len(set(b"".join(seen))) == 24 * 9
    assert all(window == bytes(range(window[0], window[0] + 9)) and window[0] % 9 == 0 for window in seen)
    assert seen == windows(NextByteOnce(corpus(251), 8, parts=3), 2, seed=1)
    assert seen != windows(NextByteOnce(corpus(251), 8, parts=3), 2, seed=2)
    assert set(windows(NextByteOnce(corpus(251), 8, parts=9), 3, seed=1)) > set(seen)


def test_a_second_pass_is_refused() -> None:
    task, order = NextByteOnce(corpus(), 8, parts=1), torch.Generator()
    list(task.batches(3, order))
    with pytest.raises(ConfigError, match="parts=1 of the text have all been seen"):
        next(task.batches(3, order))


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="parts=0"):
        NextByteOnce(corpus(), 8, parts=0)
    with pytest.raises(ConfigError, match="exceed one of 4 parts of the 100 bytes"):
        NextByteOnce(corpus(), 8, parts=4).steps_per_epoch(3)


def test_scores_are_means_over_all_full_windows() -> None:
    # The guess has logit 128, all others at most 31, whose exp vanishes beside it: losses are exact integers.
    logits = torch.randint(32, (256, 256), generator=torch.Generator().manual_seed(0)).float()
    guesses = [byte + 1 if byte % 3 else 0 for byte in range(256)]
    for byte, guess in enumerate(guesses):
        logits[byte, guess % 256] = 128
    task = NextByte(corpus(), 8)
    scores = task.test(lambda x: logits[x])
    pairs = list(zip(range(32), range(1, 33), strict=True))  # 4 windows of 8 bytes in 40; the rest fills none
    assert scores.loss == sum(128 - logits[x, y].item() for x, y in pairs) / 32
    assert scores.accuracy == sum(guesses[x] == y for x, y in pairs) / 32
    assert bits_per_byte(math.log(2)) == 1


def test_a_context_or_batch_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="30 bytes for validation"):
        NextByte(corpus(), 30)
    with pytest.raises(ConfigError, match="batch_size=100"):
        NextByte(corpus(), 8).steps_per_epoch(100)


def test_a_token_depends_on_those_before_it_and_on_no_later_one() -> None:
    model = build_gpt(TINY, 0).eval()
    x = torch.randint(256, (2, 8))
    changed = x.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 256
    before, after = model(x), model(changed)
    assert torch.equal(before[:, :5], after[:, :5]) and not torch.equal(before[:, 5:], after[:, 5:])
    assert before.shape == (2, 8, 256)


def test_weights_follow_the_seed_and_an_untrained_model_guesses() -> None:
    one, same, other = build_gpt(TINY, 0), build_gpt(TINY, 0), build_gpt(TINY, 1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.head.weight, other.head.weight)
    loss = F.cross_entropy(one(torch.randint(256, (64, 8))).flatten(0, 1), torch.randint(256, (512,)))
    assert loss.item() == pytest.approx(math.log(256), abs=0.1)


@pytest.mark.parametrize("settings", [{"width": 10, "heads": 3}, {"depth": 0}, {"context": 1.5}, {"heads": True}])
def test_sizes_that_do_not_fit_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        GPTConfig(**settings)


def test_longer_inputs_than_the_context_are_refused() -> None:
    with pytest.raises(ShapeError, match="8 bytes at most"):
        GPT(TINY)(torch.zeros(1, 9, dtype=torch.long))
