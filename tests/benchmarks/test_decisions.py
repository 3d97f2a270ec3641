"""The tables that are made of plans' results."""

from typing import Any

import pytest

from benchmarks import cards, decisions, store, table, tables

SAVED = {"dense": {}, "2:4": {}}


def result(label: str, planned: float, everything: float, choices: list[str]) -> dict[str, Any]:
    whys = {"dense": "it is slower"}
    rows = [{"choice": one, "times": SAVED, "why": whys.get(one, "")} for one in choices]
    head = {"choice": "dense", "times": {}, "why": "output head"}
    return {
        "label": label,
        "times_ms": {
            "dense": {"median_ms": 10.0},
            "planned": {"median_ms": 10.0 / planned, "p20_ms": 7.0, "p80_ms": 11.0},
        },
        "fresh_ms": {"dense": 10.0},
        "predicted_ms": 9.5,
        "error": 9.5 * planned / 10 - 1,
        "host_loop_ms": [[2.0, 3.0], [2.5]],
        "ratio_to_dense": {"dense": 1.0, "planned": planned, "all 2:4": everything},
        "plan": {"rows": [*rows, head]},
        "provenance": store.provenance() | {"gpu": "NVIDIA H100 80GB HBM3"},
    }


RESULTS = [
    result("small", 1.0, 0.8, ["dense", "dense"]),
    result("large", 1.4, 1.2, ["fp8 + 2:4", "fp8 + 2:4", "2:4", "dense"]),
]


def test_every_model_is_shown_with_what_was_swapped_the_one_that_gains_most_first() -> None:
    assert [row[0] for row in decisions.decided(RESULTS).rows] == ["large", "small"]
    assert decisions.decided(RESULTS).rows[0][1:] == (
        "10.0", "**1.40**", "**1.20**", "", "2 fp8+2:4, 1 2:4 of 4",
    )  # fmt: skip
    assert decisions.decided(RESULTS).rows[1][2:] == ("dense (1.00)", "**0.80**", "", "none of 2")
    other = RESULTS[0] | {"provenance": store.provenance() | {"gpu": "NVIDIA H200"}}
    assert [row[-1] for row in decisions.decided([*RESULTS, other]).rows] == ["H100", "H100", "H200"]
    assert decisions.reasons(RESULTS).splitlines() == ["- large: 1x it is slower.", "- small: 2x it is slower."]


def test_models_that_stay_dense_are_named_with_what_swapping_everything_would_be() -> None:
    text = decisions.left_dense(RESULTS)
    assert "small, compiled (0.80). Plans gained most on large (1.40). Measured on one NVIDIA H100" in text
    assert decisions.left_dense(RESULTS[1:]).startswith("Plans gained most on large (1.40).")
    assert decisions.left_dense([]) == ""


def test_dense_that_was_timed_beside_sparse_steps_is_marked() -> None:
    old = [{name: one for name, one in result.items() if name != "fresh_ms"} for result in RESULTS]
    for made in (decisions.decided, decisions.avoided):
        assert {row[1] for row in made(old).rows} == {"10.0†"} and not made(RESULTS).notes
        assert made(old).notes == (f"†: {tables.TIMED_BESIDE}",)
    assert tables.TIMED_BESIDE in decisions.left_dense(old)
    assert tables.TIMED_BESIDE not in decisions.left_dense(RESULTS)


def test_setups_of_one_model_are_named_together_by_what_they_differ_in() -> None:
    labels = ("net, 5x9 tokens, eager", "net, 5x9 tokens", "other, eager", "net, 2x9 tokens, eager")
    dense = [RESULTS[0] | {"label": label} for label in labels]
    told = decisions.left_dense(dense)
    assert "net, 5x9 tokens, eager (0.80), compiled (0.80), 2x9 tokens, eager (0.80); other, eager (0.80)." in told


def test_predictions_stand_beside_what_was_measured_and_how_steady_the_host_was() -> None:
    assert decisions.exactness(RESULTS).rows[0] == (
        "large", "9.5", "7.1", "7.0 to 11.0", "+33.0 %", "2.0 / 2.5 / 3.0 ms",
    )  # fmt: skip


def test_plans_stand_as_they_print_below_what_was_predicted_and_measured() -> None:
    timed = {"times_ms": {"dense": {"median_ms": 10.0}, "planned": {"median_ms": 8.0}}, "predicted_ms": 8.2}
    plan = {"rows": [], "step": {"ms": 9.5}}
    made = [{**one, **timed, "plan": plan, "printed": f"the plan of {one['label']}"} for one in RESULTS]
    large, small = decisions.printed(made).split("## ")[1:]
    assert large.startswith("large") and "```text\nthe plan of large\n```" in large and "the plan of small" in small
    assert "| 8.20 | +2.5 % |" in large and "| 9.50 | -5.0 % |" in large


def test_only_models_that_lose_stand_where_it_does_not_help(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [row[0] for row in decisions.avoided(RESULTS).rows] == ["small"]
    monkeypatch.setattr(cards, "load", lambda kind: RESULTS if kind == "plan" else store.load(kind))
    made = cards.blocks()
    assert "| small | 10.0 |" in made["no-gain"] and "| large |" not in made["no-gain"]
    assert "| large | 10.0 |" in made["decisions"] and cards.PLANS in made["decisions"]
    assert max(len(line) for line in made["decisions"].splitlines() if line.startswith("|")) <= table.WIDTH + 2


def test_without_plans_the_page_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "load", lambda kind: [] if kind == "plan" else store.load(kind))
    assert cards.blocks()["decisions"] == f"Not measured yet: `{cards.PLANS}`."
