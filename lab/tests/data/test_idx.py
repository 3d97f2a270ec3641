"""How much of an idx file is read: never more than its header announces, plus one chunk."""

import gzip
import io
from pathlib import Path

import pytest
import torch

from semisparse_lab.data import idx
from semisparse_lab.errors import DataError

MIB = 1 << 20
HEADER = bytes.fromhex("00000803" + "00000001" + "0000000a" + "0000000a")
ANNOUNCED = 100


@pytest.fixture
def read(monkeypatch):
    """Numbers of uncompressed bytes that reads of the file gave, whether it is compressed or not."""
    counts = []

    class Counting:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def read(self, size=-1):
            found = self.file.read(size)
            counts.append(len(found))
            return found

    path_open, gzip_open = io.open, gzip.open
    monkeypatch.setattr(Path, "open", lambda path, mode="r": Counting(path_open(path, mode)))
    monkeypatch.setattr(idx.gzip, "open", lambda path: Counting(gzip_open(str(path))))
    return counts


def bomb(path, compressed, size):
    """A file of that many zeros behind a header that announces 100 of them."""
    if compressed:
        with gzip.open(path, "wb", compresslevel=1) as file:
            file.write(HEADER)
            for _ in range(size // MIB):
                file.write(bytes(MIB))
    else:
        with path.open("wb") as file:
            file.write(HEADER)
            file.truncate(len(HEADER) + size)
    return path


@pytest.mark.parametrize("compressed", [False, True])
def test_a_file_far_larger_than_its_header_announces_is_not_read_whole(tmp_path, request, compressed):
    path = bomb(tmp_path / "images", compressed, 64 * MIB)
    assert path.stat().st_size < MIB or not compressed
    counts = request.getfixturevalue("read")
    with pytest.raises(DataError, match="1 x 10 x 10 = 100 bytes of data but holds at least"):
        idx.read_idx(path, 3)
    assert sum(counts) <= 2 + len(HEADER) + ANNOUNCED + MIB


@pytest.mark.parametrize("compressed", [False, True])
def test_a_file_that_holds_what_it_announces_is_read_to_its_end(tmp_path, request, compressed):
    path = bomb(tmp_path / "images", compressed, 0)
    content = HEADER + bytes(range(ANNOUNCED))
    path.write_bytes(gzip.compress(content) if compressed else content)
    counts = request.getfixturevalue("read")
    assert torch.equal(idx.read_idx(path, 3).flatten(), torch.arange(ANNOUNCED, dtype=torch.uint8))
    assert sum(counts) == 2 + len(HEADER) + ANNOUNCED
