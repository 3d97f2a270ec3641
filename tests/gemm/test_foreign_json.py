"""Choices are read from files and from other ranks: whatever JSON can hold, nothing but our own errors comes of it."""

import io
import json
import os
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semisparse.errors import ConfigError
from semisparse.gemm import tuning_cache
from semisparse.gemm.choice import Choice, from_record
from semisparse.gemm.tuning_cache import TuningCache
from tests.gemm.test_tuning_cache import CHOICE, KEY, ignored, stored
from tests.gemm.tuning import call

HUGE = 10**400  # larger than any float, and less than infinity
ODD = {
    "a huge integer": str(HUGE),
    "a huge negative integer": str(-HUGE),
    "an integer with more digits than Python converts": "9" * 5000,
    "1e999": "1e999",
    "-1e999": "-1e999",
    "NaN": "NaN",
    "Infinity": "Infinity",
    "negative": "-1",
    "true": "true",
    "deep": "[" * 20_000 + "]" * 20_000,
    "a deep object": '{"a":' * 20_000 + "1" + "}" * 20_000,
    "a lone surrogate": '"\\ud800"',
}
PLACES = [
    *[("choice", name) for name in CHOICE.to_record()],
    *[("key", name) for name in ("sm_count", "cusparselt", "rows", "columns", "gpu")],
    ("choice", "rejected", "3"),
    ("schema",),
    ("choice",),
    ("key",),
    ("more",),
]


def planted(record, place, text):
    """record as JSON with text, which json need not be able to write, at a place."""
    *path, last = place
    inner = record
    for name in path:
        inner = inner[name]
    inner[last] = "PLANTED"
    return json.dumps(record).replace('"PLANTED"', text)


def record():
    return {"schema": 1, "key": dict(KEY), "choice": CHOICE.to_record()}


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("odd", ODD)
def test_a_file_with_such_a_value_anywhere_is_ignored(tmp_path, odd, place):
    cache = TuningCache(tmp_path / "semisparse")
    stored(cache).write_text(planted(record(), place, ODD[odd]))
    ignored(cache, "could not read the tuning cache")


ODD_VALUES = [HUGE, -HUGE, 10**5000, float("inf"), float("nan"), -1, True, [], "17\n"]


def test_a_file_of_any_size_costs_no_more_memory_than_the_largest_that_is_believed(tmp_path, monkeypatch):
    cache, sizes = TuningCache(tmp_path / "semisparse"), []
    os.truncate(stored(cache), 2**30)

    class Counting(io.FileIO):
        def read(self, size=-1):
            sizes.append(size)
            return super().read(min(size, 2**20))

    monkeypatch.setattr(tuning_cache, "open", lambda descriptor, mode: Counting(descriptor, "r"), raising=False)
    ignored(cache, f"more than {tuning_cache.LARGEST_FILE} bytes")
    assert set(sizes) == {tuning_cache.LARGEST_FILE + 1}


@pytest.mark.parametrize("place", CHOICE.to_record())
@pytest.mark.parametrize("value", ODD_VALUES, ids=range(len(ODD_VALUES)))
def test_a_record_with_such_a_value_is_a_value_error(value, place):
    with pytest.raises(ValueError, match=r"no |limit"):
        from_record(CHOICE.to_record() | {place: value}, "disk")


@pytest.mark.parametrize("name", ["03", "+3", " 3", "3.0", "1024", "³", "9" * 5000, ""])
def test_an_algorithm_has_one_name_only(name):
    with pytest.raises(ValueError, match="rejected has the algorithm"):
        from_record(CHOICE.to_record() | {"rejected": {name: "reason"}}, "disk")


def deep(levels=20_000):
    value = {}
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    "change",
    [
        {"choice": CHOICE.to_record() | {"sparse_us": HUGE}},
        {"choice": CHOICE.to_record() | {"dense_us": 10**5000}},
        {"choice": CHOICE.to_record() | {"algorithm": HUGE}},
        {"key": {"gpu": float("inf")}},
        {"key": {"gpu": 10**5000}},
        {"key": {"gpu": deep()}},
        {"choice": CHOICE.to_record() | {"algorithm": deep()}},
        {"choice": CHOICE.to_record() | {"note": deep()}},
    ],
    ids=range(8),
)
def test_a_state_with_such_a_value_is_refused_whole(make_tuner, change):
    tuner, _, _ = make_tuner(cached=False)
    good = {"key": {"gpu": "x"}, "choice": CHOICE.to_record()}
    with pytest.raises(ConfigError, match=r"make it with Tuner\.state"):
        tuner.load_state({"schema": 1, "choices": [good, {"key": {"gpu": "y"}, "choice": CHOICE.to_record()} | change]})
    assert list(tuner.choices()) == []


@pytest.mark.parametrize("schema", [True, 1.0, "1", None, HUGE])
def test_a_state_of_another_schema_is_refused(make_tuner, schema):
    with pytest.raises(ConfigError, match=r"schema .*this version reads 1"):
        make_tuner(cached=False)[0].load_state({"schema": schema, "choices": []})


def test_a_huge_time_in_the_cache_costs_one_warning_and_a_tuning_run(make_tuner, timed, tmp_path):
    call(make_tuner()[0])
    for path in (tmp_path / "semisparse").iterdir():
        path.write_text(path.read_text().replace('"sparse_us": 10.0', f'"sparse_us": {HUGE}'))
    with pytest.warns(RuntimeWarning, match="tuning cache"):
        assert call(make_tuner()[0]).source == "tuned"
    assert (call(make_tuner()[0]).source, timed.made) == ("disk", 2)


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([HUGE, -HUGE, 2**63]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(place=st.sampled_from(PLACES), value=ANY)
def test_any_json_value_anywhere_is_ignored_or_a_legal_choice(tmp_path, place, value):
    cache = TuningCache(tmp_path / "semisparse")
    stored(cache).write_text(planted(record(), place, json.dumps(value)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = cache.load(KEY)
    assert found is None or (isinstance(found, Choice) and from_record(found.to_record(), "disk") == found)
