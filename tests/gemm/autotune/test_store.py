"""Choices as documents and on disk: round trips, foreign keys, damaged files, and many writers at once."""

import json
import logging
import multiprocessing
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from semisparse.gemm import problem as problems
from semisparse.gemm.autotune.algorithm import Choice, from_record
from semisparse.gemm.autotune.store import (
    Store,
    default_folder,
    find_near,
    find_shipped,
    from_document,
    shipped,
    to_document,
)
from semisparse.gemm.weight_gradient import WeightGradient
from tests.gemm.autotune.test_algorithm import CHOICE, DENSE
from tests.gemm.tuning import FORWARD, call, shipped_entry

KEY = {
    "gpu": "NVIDIA H200", "sm_count": 132, "capability": "9.0", "driver": "580.65.06", "cuda": "13.0",
    "torch": "2.11.0+cu130", "triton": "3.6.0", "cusparselt": 800, "dtype": "bfloat16", "b_order": "column",
    "d_order": "column", "bias": True, "token_axis": "columns", "rows": 4096, "reduction": 1024, "columns": 14336,
}  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "semisparse")


def saved(store: Store, choice: Choice = CHOICE) -> Path:
    """The file that holds the choice for KEY."""
    store.save(KEY, choice)
    return store._path(KEY)


def as_read(choice: Choice) -> Choice:
    return from_record(choice.to_record(), "disk")


@pytest.mark.parametrize("choice", [CHOICE, DENSE, Choice(None, None, None, None, "tuned", (), "no plan")])
def test_a_choice_comes_back_as_it_was_saved(store, choice):
    saved(store, choice)
    assert Store(store._folder).load(KEY) == as_read(choice)


def test_nothing_saved_is_no_choice_and_makes_no_folder(store, caplog):
    assert store.load(KEY) is None
    assert not store._folder.exists()
    assert not caplog.records


def test_a_later_choice_replaces_an_earlier_one_and_nothing_else_is_left(store):
    saved(store)
    path = saved(store, DENSE)
    assert store.load(KEY) == as_read(DENSE)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", KEY)
def test_a_key_that_differs_in_one_component_is_another_problem(store, name):
    saved(store)
    value = KEY[name]
    other = (not value) if isinstance(value, bool) else value + 1 if isinstance(value, int) else value + "x"
    assert store.load(KEY | {name: other}) is None
    assert store.load({field: value for field, value in KEY.items() if field != name}) is None
    assert store.load(KEY) == as_read(CHOICE)


def test_the_folder_follows_the_environment_at_each_use(tmp_path, monkeypatch):
    store = Store()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a"))
    store.save(KEY, CHOICE)
    assert (tmp_path / "a" / "semisparse").is_dir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert store.load(KEY) is None
    for unusable in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert default_folder() == tmp_path / "home" / ".cache" / "semisparse"


# ---- damaged and foreign files


def planted(path: tuple, text: str) -> str:
    """A saved document with JSON text, which json need not be able to write, in one place."""
    content = to_document([(dict(KEY), CHOICE)])
    *way, last = path
    inner = content
    for name in way:
        inner = inner[name]
    inner[last] = "PLANTED"
    return json.dumps(content).replace('"PLANTED"', text)


WHOLE = json.dumps(to_document([(KEY, CHOICE)]))
IN_CHOICE, IN_KEY = ("choices", 0, "choice"), ("choices", 0, "key")
DAMAGE = {
    "empty": "",
    "truncated": WHOLE[: len(WHOLE) // 2],
    "a list": "[1, 2]",
    "too deep": "[" * 30_000,
    "not text": b"\xff\xfe\x00",
    "another schema": planted(("schema",), "2"),
    "schema true": planted(("schema",), "true"),
    "no choices": planted(("choices",), "5"),
    "two choices": json.dumps(to_document([(KEY, CHOICE), (KEY, CHOICE)])),
    "another key": planted((*IN_KEY, "gpu"), '"NVIDIA H100"'),
    "no key": planted(IN_KEY, "null"),
    "no choice": planted(IN_CHOICE, "{}"),
    "a negative id": planted((*IN_CHOICE, "sparse_algorithm"), "-1"),
    "a huge time": planted((*IN_CHOICE, "sparse_us"), str(10**400)),
    "more digits than Python converts": planted((*IN_CHOICE, "sparse_us"), "9" * 5000),
    "NaN": planted((*IN_CHOICE, "sparse_us"), "NaN"),
    "infinity": planted((*IN_CHOICE, "dense_us"), "1e999"),
    "NaN in the key": planted((*IN_KEY, "rows"), "NaN"),
    "rejected without ids": planted((*IN_CHOICE, "rejected"), '{"x": "reason"}'),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_file_that_cannot_be_used_is_ignored_logged_and_replaced(store, caplog, how):
    path = saved(store)
    content = DAMAGE[how]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert store.load(KEY) is None
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("semisparse.gemm.autotune.store", logging.WARNING)
    assert f"ignored the stored tuning result {path}" in record.getMessage()
    saved(store)
    assert store.load(KEY) == as_read(CHOICE)


PLACES = [
    *[(*IN_CHOICE, name) for name in CHOICE.to_record()],
    *[(*IN_KEY, name) for name in ("sm_count", "rows", "gpu")],
    (*IN_CHOICE, "rejected", "3"),
    ("schema",),
    ("choices",),
    IN_CHOICE,
    IN_KEY,
]
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([10**400, -(10**400), 2**63]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(place=st.sampled_from(PLACES), value=ANY)
def test_whatever_json_holds_it_is_refused_or_a_sound_choice(place, value):
    try:
        entries = from_document(json.loads(planted(place, json.dumps(value))), "disk")
    except ValueError:
        return
    for _, choice in entries:
        assert choice.sparse_algorithm is None or 0 <= choice.sparse_algorithm < 2**31
        assert choice.algorithm in (None, choice.sparse_algorithm)
        assert str(choice) and from_record(choice.to_record(), "disk") == choice


# ---- failing disks


def test_a_pipe_in_place_of_a_file_is_not_waited_for(store, caplog):
    path = saved(store)
    path.unlink()
    os.mkfifo(path)
    assert store.load(KEY) is None
    assert "not a regular file" in caplog.text
    saved(store)
    assert store.load(KEY) == as_read(CHOICE)


@pytest.mark.parametrize(
    ("what", "mode", "said"),
    [("file", 0o660, "others may write to it"), ("file", 0o602, "others may write to it"),
     ("folder", 0o770, "others may write to its folder"), ("folder", 0o777, "others may write to its folder")],
)  # fmt: skip
def test_what_others_can_write_is_ignored_and_logged_until_it_is_saved_again(store, caplog, what, mode, said):
    path = saved(store)
    (path if what == "file" else path.parent).chmod(mode)
    assert store.load(KEY) is None
    assert said in caplog.text
    saved(store)
    assert store.load(KEY) == as_read(CHOICE)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_belongs_to_another_user_is_ignored_and_logged(store, caplog, monkeypatch, what):
    path = saved(store)
    if what == "file":
        real = os.fstat
        monkeypatch.setattr(os, "fstat", lambda number: SimpleNamespace(
            st_mode=real(number).st_mode, st_size=real(number).st_size, st_uid=os.geteuid() + 1))  # fmt: skip
    else:
        monkeypatch.setattr(type(path), "stat", lambda self: SimpleNamespace(st_mode=0o700, st_uid=os.geteuid() + 1))
    assert store.load(KEY) is None
    assert "belongs to another user" in caplog.text


def test_a_link_in_place_of_a_file_is_not_followed(store, caplog, tmp_path):
    path = saved(store)
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    assert store.load(KEY) is None
    assert "ignored the stored tuning result" in caplog.text


def test_a_file_that_is_too_large_is_not_read(store, caplog):
    path = saved(store)
    path.write_bytes(path.read_bytes() + b" " * 2**20)
    assert store.load(KEY) is None
    assert "more than 1048576 bytes" in caplog.text


def test_a_file_in_place_of_the_folder_is_a_warning_once(tmp_path):
    (tmp_path / "semisparse").write_text("")
    store = Store(tmp_path / "semisparse")
    with pytest.warns(RuntimeWarning, match="tuning results cannot be stored") as caught:
        store.save(KEY, CHOICE)
        store.save(KEY, CHOICE)
    assert len(caught) == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")])
def test_a_failing_disk_is_a_warning_and_leaves_no_litter(store, monkeypatch, error):
    saved(store)

    def fail(*_):
        raise error

    monkeypatch.setattr(os, "replace", fail)
    with pytest.warns(RuntimeWarning, match=error.strerror):
        store.save(KEY, DENSE)
    assert store.load(KEY) == as_read(CHOICE)
    assert len(list(store._folder.iterdir())) == 1


def test_without_a_home_nothing_is_stored(monkeypatch, caplog):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert Store().load(KEY) is None
    assert "home directory" in caplog.text
    with pytest.warns(RuntimeWarning, match="home directory"):
        Store().save(KEY, CHOICE)


# ---- many processes

ROUNDS, PROCESSES = 20, 4


def write_and_read(folder: Path, number: int, problems: list) -> None:
    warnings.simplefilter("error")
    try:
        for step in range(ROUNDS):
            store = Store(folder)
            for columns in (8, 16):  # shared by all processes
                store.save(KEY | {"columns": columns}, Choice(number, number, 1.0 + step, None, "tuned"))
                found = store.load(KEY | {"columns": columns})
                # Whole and from one writer: its number and its own round time go together.
                assert found is not None and 0 <= found.algorithm < PROCESSES and 1.0 <= found.sparse_us <= ROUNDS
    except BaseException as error:
        problems.append(f"{number}: {error!r}")


def test_many_processes_write_at_once(store):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["semisparse.gemm.autotune.store"])
    with context.Manager() as manager:
        problems = manager.list()
        workers = [
            context.Process(target=write_and_read, args=(store._folder, number, problems))
            for number in range(PROCESSES)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        assert [worker.exitcode for worker in workers] == [0] * PROCESSES
        assert list(problems) == []
    assert len(list(store._folder.iterdir())) == 2


# ---- the choices that ship


def test_what_ships_can_be_read_and_names_its_conditions():
    assert shipped()
    every = {"gpu", "cusparselt"}
    for conditions, choice in shipped():
        if "way" in conditions:
            asked = WeightGradient(16, 32, 32, torch.bfloat16, torch.bfloat16).key()
        else:
            fp8 = conditions["dtype"] == "float8_e4m3fn"
            asked = (problems.fp8_forward(24, 32, 96, torch.bfloat16) if fp8 else FORWARD).key()
        assert conditions.keys() == asked.keys() | every
        assert choice.source == "shipped"
        assert (choice.decides == "sampling") == ("way" in conditions)


def test_the_first_choice_whose_conditions_hold_is_taken(make_tuner):
    key = make_tuner()[0].key(FORWARD, -1)
    entries = [shipped_entry(columns=999), shipped_entry(None, 2), shipped_entry(2)]
    found = find_shipped(entries, key)
    assert (found.algorithm, found.sparse_algorithm) == (None, 2)
    for name, value in shipped_entry()[0].items():
        other = 1 - value if isinstance(value, bool) else 3 * value if isinstance(value, int) else "another"
        if name != "token_axis":
            assert find_shipped([shipped_entry(**{name: other})], key) is None, name


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_shipped_choice_for_e4m3_applies_to_what_it_writes(make_tuner, out_dtype):
    key = make_tuner()[0].key(problems.fp8_forward(24, 32, 96, out_dtype), -1)
    entry = shipped_entry(dtype="float8_e4m3fn", out_dtype="bfloat16", reduction=96, columns=32)
    assert (find_shipped([entry], key) is not None) == (out_dtype is torch.bfloat16)


@pytest.mark.parametrize(("tokens", "applies"), [(11, False), (12, True), (24, True), (48, True), (49, False)])
def test_a_shipped_choice_is_near_from_half_to_twice_its_tokens(make_tuner, tokens, applies):
    key = make_tuner()[0].key(FORWARD, -1)
    assert key["columns"] == 24
    assert (find_near([shipped_entry(columns=tokens)], key) is not None) == applies
    assert (find_shipped([shipped_entry(columns=tokens)], key) is not None) == (tokens == 24)


def test_the_nearest_shipped_choice_is_taken(make_tuner):
    key = make_tuner()[0].key(FORWARD, -1)
    entries = [shipped_entry(1, 1, columns=40), shipped_entry(2, 2, columns=20), shipped_entry(3, 3, rows=64)]
    assert find_near(entries, key) == entries[1][1]


def test_a_problem_in_the_shipped_table_is_not_measured_at_its_first_call(make_tuner, timed):
    tuner, library, _ = make_tuner(shipped=[shipped_entry()])
    choice = call(tuner)
    assert (choice.algorithm, choice.source, timed.made, library.products) == (2, "shipped", 0, [])
    assert tuner.known(FORWARD, -1) is tuner.find(FORWARD, -1) is choice  # final, unlike what stands in for tuning
    assert (tuner.choices(), tuner._store._folder.exists()) == ([], False)
    assert tuner.used() == [(tuner.key(FORWARD, -1), choice)]


def test_with_all_the_shipped_table_does_not_replace_tuning(make_tuner, monkeypatch):
    monkeypatch.setenv("SEMISPARSE_TUNE", "all")
    assert call(make_tuner(shipped=[shipped_entry()])[0]).source == "tuned"


def test_what_was_measured_goes_before_what_is_shipped(make_tuner):
    call(make_tuner()[0])
    assert call(make_tuner(shipped=[shipped_entry()])[0]).source == "disk"


def test_a_shipped_choice_that_is_only_near_or_not_offered_does_not_replace_tuning(make_tuner):
    for entry in (shipped_entry(columns=20), shipped_entry(77, 77)):
        tuner = make_tuner(shipped=[entry], stored=False)[0]
        assert tuner.find(FORWARD, -1) is None
        assert call(tuner).source == "tuned"
