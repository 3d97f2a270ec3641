import gzip
import shutil
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch

from lab.tests.toys import FASHION_FILES as NAMES
from lab.tests.toys import fashion_contents as contents
from lab.tests.toys import idx, toy_data, toy_images, write_fashion_mnist
from semisparse_lab.data.idx import read_idx
from semisparse_lab.data.images import Dataset, load_dataset, make_dataset, stratified
from semisparse_lab.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_fashion_mnist(tmp_path)
    return tmp_path


def rows(data: Dataset) -> set[bytes]:
    splits = (data.train, data.validation, data.test)
    return {image.numpy().tobytes() for split in splits for image in split.images}


def test_digits_are_split_once_and_for_all_by_class():
    data = load_dataset("digits")
    sizes = [len(split) for split in (data.train, data.validation, data.test)]
    assert sum(sizes) == 1797 and data.classes == 10
    for split, share in ((data.test, 0.25), (data.validation, 0.75 / 12)):
        assert len(split) / 1797 == pytest.approx(share, rel=0.05)
        counts = split.labels.bincount(minlength=10).float()
        assert counts.max() - counts.min() <= 0.05 * 1797 * share  # the classes themselves differ by 5 %
    torch.manual_seed(99)
    again = load_dataset("digits")
    assert torch.equal(data.test.images, again.test.images) and torch.equal(data.train.labels, again.train.labels)


def test_splits_are_disjoint_and_complete():
    images, labels = toy_images(96, 0)
    data = make_dataset("toy", (images, labels), toy_images(40, 1))
    assert len(data.train) + len(data.validation) == 96 and len(data.validation) == 8 and len(data.test) == 40
    assert len(rows(data)) == 136


def test_pixels_are_normalised_by_the_training_split():
    data = make_dataset("toy", toy_images(96, 0), toy_images(40, 1))
    std, mean = torch.std_mean(data.train.images)
    torch.testing.assert_close(torch.stack([mean, std]), torch.tensor([0.0, 1.0]))
    raw = data.test.images * data.std + data.mean
    torch.testing.assert_close(raw.squeeze(1), toy_images(40, 1)[0])
    assert data.train.images.dtype == torch.float32 and data.train.labels.dtype == torch.int64
    assert data.train.images.shape[1:] == (1, 8, 8)


def test_stratified_takes_its_share_of_each_class():
    labels = torch.tensor([0] * 10 + [1] * 20 + [2] * 40)
    chosen, rest = stratified(labels, 0.3)
    assert labels[chosen].bincount().tolist() == [3, 6, 12]
    assert torch.cat([chosen, rest]).sort().values.tolist() == list(range(70))


@pytest.mark.parametrize("compressed", [False, True])
def test_idx_files_are_read_whether_compressed_or_not(tmp_path, compressed):
    values = contents("t10k-images-idx3-ubyte")
    path = tmp_path / "any name"
    path.write_bytes(gzip.compress(idx(values)) if compressed else idx(values))
    assert torch.equal(read_idx(path, 3), values)


def test_fashion_mnist_is_read_from_its_four_files(folder):
    data = load_dataset("fashion-mnist", folder)
    assert (len(data.train), len(data.validation), len(data.test)) == (110, 10, 20)
    raw = data.test.images.double() * data.std + data.mean
    assert torch.equal(raw.round().to(torch.uint8).squeeze(1), contents("t10k-images-idx3-ubyte"))
    assert torch.equal(data.test.labels, contents("t10k-labels-idx1-ubyte").long())


def cut_plain(folder: Path) -> str:
    path = folder / NAMES[0]
    path.write_bytes(path.read_bytes()[:-5])
    return rf"train-images.*120 x 28 x 28 = {120 * 784} bytes.*holds {120 * 784 - 5};"


def lengthen(folder: Path) -> str:
    path = folder / NAMES[0]
    path.write_bytes(path.read_bytes() + b"\0\0\0")
    return rf"= {120 * 784} bytes.*at least {120 * 784 + 3}"


def cut_gzip(folder: Path) -> str:
    path = folder / f"{NAMES[1]}.gz"
    path.write_bytes(path.read_bytes()[:-9])
    return r"train-labels-idx1-ubyte\.gz is a damaged gzip file"


def flip_gzip(folder: Path) -> str:
    path = folder / f"{NAMES[1]}.gz"
    data = bytearray(path.read_bytes())
    data[-6] ^= 0xFF  # inside the stored CRC
    path.write_bytes(data)
    return r"is a damaged gzip file \(CRC"


def cut_header(folder: Path) -> str:
    (folder / NAMES[0]).write_bytes(idx(contents(NAMES[0]))[:10])
    return "ends in its header: expected 16 bytes, found 10"


def empty(folder: Path) -> str:
    (folder / NAMES[0]).write_bytes(b"")
    return "not with the idx magic number 0x00000803"


def swap_kinds(folder: Path) -> str:
    shutil.copy(folder / f"{NAMES[1]}.gz", folder / NAMES[0])
    return "starts with 0x00000801, not with the idx magic number 0x00000803"


def remove(folder: Path) -> str:
    (folder / NAMES[2]).unlink()
    return r"has neither t10k-images-idx3-ubyte nor t10k-images-idx3-ubyte\.gz"


def mismatch(folder: Path) -> str:
    (folder / NAMES[2]).write_bytes(idx(torch.zeros(19, 28, 28, dtype=torch.uint8)))
    return "holds 19 images but .* 20 labels"


def other_side(folder: Path) -> str:
    (folder / NAMES[2]).write_bytes(idx(torch.zeros(20, 8, 8, dtype=torch.uint8)))
    return "images of 8 x 8, expected 28 x 28"


def other_labels(folder: Path) -> str:
    (folder / f"{NAMES[3]}.gz").write_bytes(idx(torch.full((20,), 77, dtype=torch.uint8)))
    return "holds label 77, expected 0 to 9"


def header(*sizes: int) -> bytes:
    return struct.pack(f">I{len(sizes)}I", 0x0800 | len(sizes), *sizes)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2**32 - 1,), "4294967295 bytes, more than the 1073741824"),
        ((2**32 - 1, 28, 28), "more than the 1073741824"),
        ((2**32 - 1, 2**32 - 1, 2**32 - 1), "more than the 1073741824"),
        ((0, 2**32 - 1, 2**32 - 1), "= 0 bytes, no data"),
        ((2**32 - 1, 0, 2**32 - 1), "= 0 bytes, no data"),
        ((0, 28, 28), "= 0 bytes, no data"),
        ((2**30 // 784, 28, 28), "holds 100;"),
    ],
)
def test_an_announcement_costs_no_memory(tmp_path, sizes, message, compressed, monkeypatch):
    content = header(*sizes) + bytes(100)
    path = tmp_path / "any name"
    path.write_bytes(gzip.compress(content) if compressed else content)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("allocated"))
    with pytest.raises(DataError, match=message):
        read_idx(path, len(sizes))


def test_a_gzip_file_is_not_unpacked_beyond_what_it_announces(tmp_path):
    path = tmp_path / "bomb"
    path.write_bytes(gzip.compress(header(10, 28, 28) + bytes(1 << 28)))
    tracemalloc.start()
    with pytest.raises(DataError, match="= 7840 bytes of data but holds at least"):
        read_idx(path, 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 24


def test_images_without_contrast_are_refused():
    labels = toy_images(96, 0)[1]
    for value in (3.0, float("nan")):
        with pytest.raises(DataError, match="toy: all training pixels are equal or not numbers"):
            make_dataset("toy", (torch.full((96, 8, 8), value), labels), toy_images(40, 1))


def test_a_path_that_cannot_be_looked_up_is_named():
    with pytest.raises(DataError, match=r"data_dir=.* cannot be read: File name too long"):
        load_dataset("fashion-mnist", Path("x" * 5000))


@pytest.mark.parametrize(
    "damage",
    [cut_plain, lengthen, cut_gzip, flip_gzip, cut_header, empty, swap_kinds, remove, mismatch, other_side,
     other_labels],
)  # fmt: skip
def test_damaged_or_foreign_files_are_named(folder, damage):
    message = damage(folder)
    with pytest.raises(DataError, match=message):
        load_dataset("fashion-mnist", folder)


@pytest.mark.parametrize(
    ("name", "data_dir", "message"),
    [
        ("fashion-mnist", None, "needs data_dir"),
        ("fashion-mnist", Path("no/such/folder"), "'no/such/folder' is not a folder"),
        ("digits", Path("somewhere"), "leave data_dir out"),
        ("cifar", None, "data='cifar' is not one of 'digits', 'fashion-mnist'"),
    ],
)
def test_impossible_choices_are_refused(name, data_dir, message):
    with pytest.raises(DataError, match=message):
        load_dataset(name, data_dir)


def test_too_few_images_are_refused():
    with pytest.raises(DataError, match="too few for three splits"):
        make_dataset("toy", toy_images(4, 0), toy_images(4, 1))
    with pytest.raises(DataError, match="4 images but 3 labels"):
        make_dataset("toy", toy_images(96, 0), (toy_images(4, 1)[0], torch.zeros(3)))


def test_a_sample_is_always_the_same_and_keeps_images_with_their_labels():
    split = toy_data().train
    images = {image.numpy().tobytes(): label for image, label in zip(split.images, split.labels.tolist(), strict=True)}
    sample = split.sample(5)
    assert len(sample) == len({image.numpy().tobytes() for image in sample.images}) == 5
    assert [images[image.numpy().tobytes()] for image in sample.images] == sample.labels.tolist()
    assert torch.equal(sample.images, split.sample(5).images) and len(split.sample(10**6)) == len(split)
