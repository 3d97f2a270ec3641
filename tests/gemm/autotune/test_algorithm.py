"""Choices as JSON values and as text."""

import pytest

from semisparse.gemm.autotune.algorithm import Choice, clipped, from_record, one_line

CHOICE = Choice(17, 17, 141.5, 190.25, "tuned", ((3, "wrong: other bits in run 2"), (20, "EngineError: refused")))
DENSE = Choice(None, 4, 20.0, 19.0, "tuned")
CUT = Choice(4, 4, 100.0, 150.0, "tuned", chunk=16384, whole_us=190.0)
NOT_AN_ID = [-1, 2**40, 10**400, 10**5000, 17.0, "17", True, [17], float("nan")]
NOT_A_TIME = [0, -1.0, "141", True, [1], float("nan"), float("inf"), 10**400]


@pytest.mark.parametrize("choice", [CHOICE, DENSE, CUT, Choice(None, None, None, None, "tuned", (), "no plan")])
def test_a_record_gives_the_choice_back(choice):
    found = from_record(choice.to_record(), choice.source)
    assert found == choice


@pytest.mark.parametrize("value", NOT_AN_ID, ids=range(len(NOT_AN_ID)))
@pytest.mark.parametrize("name", ["algorithm", "sparse_algorithm"])
def test_what_is_not_an_id_is_refused(name, value):
    with pytest.raises(ValueError, match=r"not the id|neither null nor|limit"):
        from_record(CHOICE.to_record() | {name: value}, "disk")


def test_auto_runs_the_fastest_right_algorithm_or_none():
    with pytest.raises(ValueError, match="algorithm=16 is neither null nor sparse_algorithm=17"):
        from_record(CHOICE.to_record() | {"algorithm": 16}, "disk")


@pytest.mark.parametrize("value", NOT_A_TIME, ids=range(len(NOT_A_TIME)))
@pytest.mark.parametrize("name", ["sparse_us", "dense_us", "whole_us"])
def test_a_time_that_is_not_one_is_refused(name, value):
    with pytest.raises((ValueError, OverflowError)):
        from_record(CUT.to_record() | {name: value}, "disk")


@pytest.mark.parametrize(
    "value", [0, -16, 8, 24, 2**31, 10**400, 16384.0, "16384", True, [16384], float("nan")], ids=str
)
def test_a_chunk_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match=r"is not a number of tokens|limit"):
        from_record(CUT.to_record() | {"chunk": value}, "disk")


def test_chunks_need_a_sparse_algorithm():
    with pytest.raises(ValueError, match="chunk=16384"):
        from_record(CUT.to_record() | {"algorithm": None, "sparse_algorithm": None}, "disk")


def test_a_record_of_an_earlier_version_is_of_a_whole_product():
    record = CHOICE.to_record()
    assert not {"chunk", "whole_us"} & record.keys()
    assert from_record(record, "disk").chunk is None


def test_texts_are_cut_and_made_printable():
    found = from_record(CHOICE.to_record() | {"note": "\x1b[31mred", "rejected": {"3": "a\n" * 500}}, "disk")
    assert found.note == "?[31mred"
    assert found.rejected == ((3, "a?" * 100),)


def test_errors_become_short_printable_lines():
    assert one_line(ValueError("first\nsecond")) == "ValueError: first"
    assert one_line(RuntimeError("tab\there")) == "RuntimeError: tab?here"
    assert clipped("y" * 500) == "y" * 200


def test_a_choice_says_what_was_picked_and_why():
    assert str(CHOICE) == "cuSPARSELt algorithm 17 (141.5 us sparse, 190.2 us dense, tuned)"
    assert str(DENSE) == "masked dense (20.0 us sparse, 19.0 us dense, tuned)"
    assert str(CUT) == (
        "cuSPARSELt algorithm 4 in chunks of 16384 tokens, 1.90x faster than whole "
        "(100.0 us sparse, 150.0 us dense, tuned)"
    )
    assert Choice(4, 4, None, None, "shipped", chunk=16384).way == "in chunks of 16384 tokens"
    assert "no sparse algorithm works" in str(Choice(None, None, None, None, "tuned"))
