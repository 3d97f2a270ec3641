"""Choices on disk: round trips, foreign keys, damaged and untrusted files, and many writers at once."""

import json
import multiprocessing
import os
import stat
import time
import warnings
from pathlib import Path

import pytest

from semisparse.gemm import tuning_cache
from semisparse.gemm.choice import Choice, clipped, from_record, one_line
from semisparse.gemm.tuning_cache import TuningCache, default_folder

KEY = {
    "gpu": "NVIDIA H200", "sm_count": 132, "capability": "9.0", "driver": "580.65.06", "cuda": "13.0",
    "torch": "2.11.0+cu130", "triton": "3.6.0", "cusparselt": 800, "dtype": "bfloat16", "b_order": "column",
    "d_order": "column", "bias": True, "token_axis": "columns", "rows": 4096, "reduction": 1024, "columns": 14336,
}  # fmt: skip
CHOICE = Choice(17, 17, 141.5, 190.25, "tuned", ((3, "wrong: other bits in run 2"), (20, "EngineError: refused")))
DENSE = Choice(None, 4, 20.0, 19.0, "tuned")


@pytest.fixture
def cache(tmp_path: Path) -> TuningCache:
    return TuningCache(tmp_path / "semisparse")


def stored(cache: TuningCache, choice: Choice = CHOICE) -> Path:
    """The file that holds the choice for KEY."""
    cache.store(KEY, choice)
    return cache._path(KEY)


def as_read(choice: Choice) -> Choice:
    return from_record(choice.to_record(), "disk")


def ignored(cache: TuningCache, reason: str) -> None:
    """The stored file counts as absent, with one warning only, and the next store repairs it where it can."""
    with pytest.warns(RuntimeWarning, match=reason) as caught:
        assert cache.load(KEY) is None
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.load(KEY) is None


@pytest.mark.parametrize("choice", [CHOICE, DENSE, Choice(None, None, None, None, "tuned", (), "no plan")])
def test_a_choice_comes_back_as_it_was_stored(cache, choice):
    stored(cache, choice)
    found = TuningCache(cache._folder).load(KEY)
    assert found == as_read(choice)
    assert found.source == "disk"


def test_nothing_stored_is_no_choice_and_makes_no_folder(cache):
    assert cache.load(KEY) is None
    assert not cache._folder.exists()


def test_modes_are_private_whatever_the_umask(cache):
    old = os.umask(0)
    try:
        path = stored(cache)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_later_choice_replaces_an_earlier_one(cache):
    stored(cache)
    stored(cache, DENSE)
    assert cache.load(KEY) == as_read(DENSE)


@pytest.mark.parametrize("name", KEY)
def test_a_key_that_differs_in_one_component_is_another_problem(cache, name):
    stored(cache)
    value = KEY[name]
    other = (not value) if isinstance(value, bool) else value + 1 if isinstance(value, int) else value + "x"
    assert cache.load(KEY | {name: other}) is None
    without = {field: value for field, value in KEY.items() if field != name}
    assert cache.load(without) is None
    assert cache.load(KEY) == as_read(CHOICE)


def test_the_folder_follows_the_environment_at_each_use(tmp_path, monkeypatch):
    cache = TuningCache()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a"))
    cache.store(KEY, CHOICE)
    assert (tmp_path / "a" / "semisparse").is_dir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache.load(KEY) is None
    for unusable in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert default_folder() == tmp_path / "home" / ".cache" / "semisparse"


# ---- files that must not be believed


def rewritten(path: Path, change) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


DAMAGE = {
    "empty": ("", "Expecting value"),
    "truncated": (lambda text: text[: len(text) // 2], ""),
    "no object": ("[1, 2]", "exactly the fields"),
    "too deep": ("[" * 30_000, ""),
    "too large": (lambda text: text + " " * 70_000, "more than 65536 bytes"),
    "not text": (b"\xff\xfe\x00", "codec"),
    "not a number": (lambda text: text.replace("141.5", "NaN"), "no time"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file_is_ignored_once_warned_of_and_repaired(cache, how):
    path = stored(cache)
    content, reason = DAMAGE[how]
    content = content(path.read_text()) if callable(content) else content
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    ignored(cache, reason)
    cache.store(KEY, CHOICE)
    assert cache.load(KEY) == as_read(CHOICE)


BAD_FIELDS = {
    "algorithm": [-1, 1024, 17.0, "17", True, 16],
    "sparse_algorithm": [-1, 2**40, [17], False, 18],
    "sparse_us": [0, -1.0, "141", True],
    "dense_us": [0.0, [1]],
    "rejected": [[], {"x": "reason"}, {"-1": "reason"}, {"2000": "reason"}, {"3": 5}, {"3": "a" * 201}, {"3": "a\nb"}],
    "note": [None, 3, "a" * 201, "\x1b[31mred"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD_FIELDS.items() for value in values])
def test_a_field_outside_its_range_is_ignored(cache, name, value):
    path = stored(cache)
    rewritten(path, lambda record: record["choice"].update({name: value}))
    ignored(cache, "")


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(schema=2),
        lambda record: record.update(schema=True),
        lambda record: record.pop("schema"),
        lambda record: record.update(more=1),
        lambda record: record["choice"].pop("note"),
        lambda record: record["choice"].update(command="x"),
        lambda record: record["key"].update(gpu="NVIDIA H100"),
        lambda record: record.update(key=None),
    ],
)
def test_a_file_of_another_shape_or_for_another_key_is_ignored(cache, change):
    path = stored(cache)
    rewritten(path, change)
    ignored(cache, "")


def test_every_single_flipped_byte_is_ignored_or_harmless(cache):
    """A flip may leave a legal choice (another time, another id below the limit), but never an error or an odd type."""
    path = stored(cache)
    content = path.read_bytes()
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = TuningCache(cache._folder).load(KEY)
        assert found is None or found.sparse_algorithm is None or 0 <= found.sparse_algorithm < 1024


def test_a_symlink_is_not_followed(cache, tmp_path):
    path = stored(cache)
    elsewhere = tmp_path / "elsewhere.json"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    ignored(cache, "symbolic link|Too many levels")
    cache.store(KEY, DENSE)
    assert not path.is_symlink()
    assert json.loads(elsewhere.read_text())["choice"]["algorithm"] == 17


def test_a_folder_that_is_a_symlink_is_not_used(cache, tmp_path):
    stored(cache)
    cache._folder.rename(tmp_path / "elsewhere")
    cache._folder.symlink_to(tmp_path / "elsewhere")
    ignored(cache, "link or a file")


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_is_ignored(cache, mode):
    path = stored(cache)
    path.chmod(mode)
    ignored(cache, "can be written by other users")


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_may_write_is_neither_read_nor_written(cache, mode):
    path = stored(cache)
    path.parent.chmod(mode)
    ignored(cache, "can be written by other users")
    before = path.read_bytes()
    cache.store(KEY, DENSE)
    assert path.read_bytes() == before


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_belongs_to_another_user_is_ignored(cache, what, monkeypatch):
    path = stored(cache)
    mine = os.geteuid()
    if mine == 0:
        os.chown(path if what == "file" else path.parent, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    ignored(cache, "belongs to user")


def test_a_pipe_in_place_of_the_file_does_not_hang(cache):
    path = stored(cache)
    path.unlink()
    os.mkfifo(path, 0o600)
    begin = time.monotonic()
    ignored(cache, "no regular file")
    assert time.monotonic() - begin < 5


def test_a_file_in_place_of_the_folder_is_a_warning(tmp_path):
    (tmp_path / "semisparse").write_text("")
    cache = TuningCache(tmp_path / "semisparse")
    with pytest.warns(RuntimeWarning, match="could not write the tuning cache") as caught:
        cache.store(KEY, CHOICE)
        cache.store(KEY, CHOICE)
    assert len(caught) == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")])
def test_a_failing_disk_is_a_warning_and_leaves_no_litter(cache, monkeypatch, error):
    stored(cache)

    def fail(*_):
        raise error

    monkeypatch.setattr(os, "replace", fail)
    with pytest.warns(RuntimeWarning, match=error.strerror):
        cache.store(KEY, DENSE)
    assert cache.load(KEY) == as_read(CHOICE)
    assert len(list(cache._folder.iterdir())) == 1


def test_a_missing_home_is_a_warning(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.warns(RuntimeWarning, match="home directory"):
        assert TuningCache().load(KEY) is None


def test_what_a_killed_writer_left_is_swept_once_it_is_old(cache):
    path = stored(cache)
    old, young = path.parent / "old.tmp", path.parent / "young.tmp"
    for file in (old, young):
        file.write_text("{")
    past = time.time() - 2 * tuning_cache._ABANDONED_S
    os.utime(old, (past, past))
    TuningCache(cache._folder).store(KEY, CHOICE)
    assert (old.exists(), young.exists()) == (False, True)


# ---- many processes


ROUNDS, PROCESSES = 20, 8


def write_and_read(folder: Path, number: int, problems: list) -> None:
    warnings.simplefilter("error")
    try:
        for step in range(ROUNDS):
            cache = TuningCache(folder)
            for columns in (8, 16, 24):  # shared by all processes
                cache.store(KEY | {"columns": columns}, Choice(number, number, 1.0 + step, None, "tuned"))
                found = cache.load(KEY | {"columns": columns})
                # Whole and from one writer: its number and its own round time go together.
                assert found is not None and 0 <= found.algorithm < PROCESSES and 1.0 <= found.sparse_us <= ROUNDS
            own = KEY | {"columns": 1000 + number * ROUNDS + step}
            cache.store(own, Choice(number, number, 2.0, 3.0, "tuned"))
            assert cache.load(own) == Choice(number, number, 2.0, 3.0, "disk")
    except BaseException as error:
        problems.append(f"{number}: {error!r}")


def test_many_processes_write_at_once(cache):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["semisparse.gemm.tuning_cache"])
    with context.Manager() as manager:
        problems = manager.list()
        arguments = [(cache._folder, number, problems) for number in range(PROCESSES)]
        workers = [context.Process(target=write_and_read, args=argument) for argument in arguments]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        assert [worker.exitcode for worker in workers] == [0] * PROCESSES
        assert list(problems) == []
    files = list(cache._folder.iterdir())
    assert len(files) == 3 + PROCESSES * ROUNDS
    for number in range(PROCESSES):
        for step in range(ROUNDS):
            found = cache.load(KEY | {"columns": 1000 + number * ROUNDS + step})
            assert found is not None and found.algorithm == number


# ---- texts of choices


def test_errors_become_short_printable_lines():
    assert one_line(ValueError("first\nsecond")) == "ValueError: first"
    assert one_line(RuntimeError("tab\there")) == "RuntimeError: tab?here"
    long = Choice(None, None, None, None, "tuned", ((1, one_line(ValueError("x" * 500))),), clipped("y" * 500))
    assert as_read(long).rejected[0][1].startswith("ValueError: x")


def test_a_choice_says_what_was_picked_and_why():
    assert str(CHOICE) == "cuSPARSELt algorithm 17 (141.5 us sparse, 190.2 us dense, tuned)"
    assert str(as_read(DENSE)) == "masked dense (20.0 us sparse, 19.0 us dense, disk)"
    assert "no sparse algorithm works" in str(Choice(None, None, None, None, "tuned"))
