"""The source of a kernel as text, tokens and a bundle."""

from pathlib import Path

import numpy as np
import pytest

from lab.tests.toy_kernel import source_files, write_archive, write_toy_tokens
from semisparse_lab.data import bundle, linux
from semisparse_lab.data.byte_pairs import trained_tokenizer
from semisparse_lab.data.linux import PARTS, fetched_archive, part_of, read_source
from semisparse_lab.data.tokens import load_tokens, prepare, read_manifest, write_manifest
from semisparse_lab.errors import DataError, OutputExistsError

FILES = source_files(120)


@pytest.fixture(autouse=True)
def a_fifth_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux, "HELD_OUT", 0.1)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_archive(tmp_path / "source.tar.xz", FILES)


def texts(files: dict[str, bytes], share: float, folder: Path) -> dict[str, list[bytes]]:
    source = read_source(write_archive(folder / "made.tar.xz", files), share)
    return {part: bytes(text).split(b"\0")[:-1] for part, text in source.texts.items()}


def test_each_file_is_whole_in_one_set_by_its_path_and_nothing_else_is_read(tmp_path: Path) -> None:
    others = {
        "drivers/gpu/drm/amd/include/asic_reg/dce.h": b"generated",
        "drivers/misc/habanalabs/include/gaudi/asic_reg/x.h": b"generated",
        "scripts/run.py": b"not C",
        "lib/latin.c": "\u00e9".encode("latin-1"),
        "lib/binary.c": b"a\0b",
        "zz/copy.c": FILES["drivers/x0/f0.c"],
    }
    found = texts(FILES | others, 1.0, tmp_path)
    for part in PARTS:
        assert found[part] == [content for path, content in FILES.items() if part_of(path, 1.0) == part]
    assert sum(map(len, found.values())) == len(FILES)


def test_a_smaller_share_takes_fewer_files_for_training_and_holds_out_the_same(tmp_path: Path) -> None:
    whole, half = texts(FILES, 1.0, tmp_path), texts(FILES, 0.5, tmp_path)
    assert whole["validation"] == half["validation"] and whole["test"] == half["test"]
    assert set(half["train"]) < set(whole["train"])


def test_a_set_without_files_and_a_damaged_archive_are_refused(tmp_path: Path, archive: Path) -> None:
    with pytest.raises(DataError, match="no file for"):
        read_source(write_archive(tmp_path / "few.tar.xz", dict(list(FILES.items())[:1])), 1.0)
    archive.write_bytes(archive.read_bytes()[:500])
    with pytest.raises(DataError, match="cannot be read"):
        read_source(archive, 1.0)


def test_a_machine_without_apt_is_told_to_pass_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DataError, match="pass archive="):
        fetched_archive(tmp_path)


def test_tokens_stand_for_the_text_and_a_second_call_only_checks(tmp_path: Path, archive: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    folder, said = tmp_path / "made", list[str]()
    manifest = prepare(folder, archive, share=1.0, vocabulary=300)
    decoder = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for part in PARTS:
        tokens = np.load(folder / f"{part}.npy")
        files = [decoder.decode(list(file)) for file in np.split(tokens, np.flatnonzero(tokens == 0) + 1)[:-1]]
        assert [file.encode() for file in files] == (folder / f"{part}.txt").read_bytes().split(b"\0")[:-1]
        assert np.array(manifest["token_bytes"])[tokens].sum() == (folder / f"{part}.txt").stat().st_size

    archive.unlink()
    assert prepare(folder, archive, share=1.0, vocabulary=300, say=said.append) == manifest
    assert len(said) == 3 and all("checksums are right" in line for line in said)
    (folder / "tokenizer.json").write_text("{}")  # it and what is made with it are made anew
    assert prepare(folder, archive, share=1.0, vocabulary=300, say=said.append) == manifest
    assert ["being made" in line for line in said[3:]] == [False, True, True]
    with pytest.raises(OutputExistsError, match="vocabulary"):
        prepare(folder, archive, share=1.0, vocabulary=301)


def test_the_tokenizer_depends_on_its_text_alone() -> None:
    pytest.importorskip("tokenizers")
    text = b"\0".join([*FILES.values(), b""])
    assert trained_tokenizer(text, 300) == trained_tokenizer(text, 300)
    with pytest.raises(DataError, match="vocabulary=10"):
        trained_tokenizer(text, 10)


@pytest.mark.parametrize("token_bytes", [None, 5, [], [1, "2"], [1, -1], [1, True]])
def test_tokens_whose_lengths_are_not_known_are_refused(tmp_path: Path, token_bytes: object) -> None:
    folder = write_toy_tokens(tmp_path)
    manifest = {**read_manifest(folder), "token_bytes": token_bytes}
    if token_bytes is None:
        del manifest["token_bytes"]
    write_manifest(folder, manifest)
    with pytest.raises(DataError, match="prepare the data again"):
        load_tokens(folder)


def test_a_bundle_gives_the_tokens_back_and_says_what_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bundle._FILTERS[0], "dict_size", 1 << 20)
    folder, packed, there = write_toy_tokens(tmp_path / "a"), tmp_path / "b", tmp_path / "c"
    size = bundle.pack(folder, packed)
    assert size == sum(path.stat().st_size for path in packed.iterdir())
    bundle.unpack(packed, there)
    assert load_tokens(there).sha256 == load_tokens(folder).sha256
    said: list[str] = []
    bundle.pack(folder, packed, say=said.append)
    bundle.unpack(packed, there, said.append)
    assert len(said) == 6 and all("right" in line for line in said)

    (there / "test.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"test\.npy is missing or damaged"):
        load_tokens(there)
    (packed / "test.u16.xz").write_bytes(b"")
    with pytest.raises(DataError, match=r"test\.u16\.xz is missing or damaged"):
        bundle.unpack(packed, there)
    bundle.pack(folder, folder)  # whose manifest is that of tokens
    assert (folder / "test.u16.xz").exists()
    monkeypatch.setattr(bundle, "LIMIT", size - 1)
    with pytest.raises(DataError, match="smaller share"):
        bundle.pack(folder, packed)
