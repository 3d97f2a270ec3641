"""Dense, torchao float8, 2:4 and 2:4 with a sampled gradient beside each other, at toy size on the CPU."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import benchmark_semi_structured_training as program
from benchmarks import cards, compare, compare_tables, float8, fresh, jobs, models, sampling, store, table, tables
from semisparse import SemiSparseLinear, recipes
from semisparse.surgery.layers import semi_sparse_layers

MKN = (32, 64, 128)
EVERY = tuple(compare.ROWS)
TITLE = compare.ROWS["float8"].title


def build(toy: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)).to(torch.bfloat16)


def training(compiled: nn.Module, model: nn.Module, toy: bool) -> Callable[[], object]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        compiled(torch.ones(8, 32, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()

    return step


class Float8Linear(nn.Linear):
    """In place of torchao's."""


@pytest.fixture
def torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torchao.float8 that converts into a class which computes as nn.Linear."""

    def convert(model: nn.Module, config: Any, module_filter_fn: Callable[[nn.Module, str], bool]) -> nn.Module:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and module_filter_fn(module, name):
                module.__class__ = Float8Linear
        return model

    made = SimpleNamespace(
        Float8LinearConfig=SimpleNamespace(from_recipe_name=lambda name: table.Table((name,), ())),
        convert_to_float8_training=convert,
    )
    monkeypatch.setattr(float8, "_training", lambda: made)
    monkeypatch.setattr(float8, "version", lambda name: "0.18.0")
    monkeypatch.setattr(float8.lab, "_module", lambda name: made)
    monkeypatch.setattr(float8.lab, "replace", lambda config, emulate: config)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model: model)  # takes a while and changes nothing that is tested here
    monkeypatch.setattr(compare, "forget_compiled", lambda: None)  # settings of the process, which others share
    monkeypatch.setattr(models.Card, "compile", lambda self, model: model)
    monkeypatch.setitem(models.CARDS, "llama", models.Card("one", "details", build, training, None))


def measured(rows: tuple[str, ...] = EVERY) -> dict[str, dict[str, Any]]:
    """Kind -> one result of each, as it is stored."""
    made = {job.kind: job for job in jobs.compared(["llama"], [MKN], rows, 2, True)}
    source = store.provenance()
    return {kind: {"provenance": source, "kind": kind, **job.measure()} for kind, job in made.items()}


def test_every_row_of_a_layer_and_of_a_model_is_timed_beside_dense(torchao: None) -> None:
    titles = [compare.DENSE, *(row.title for row in compare.ROWS.values())]
    found = measured()
    for result in found.values():
        assert set(titles) <= result["times_ms"].keys()
        assert result["ratio_to_dense"].keys() == result["times_ms"].keys()
        assert not result["errors"] and not result["left_out"] and result["torchao"] == "0.18.0"
    layer, model = found["compare-linear"], found["compare-model"]
    assert {f"graph: {title}" for title in titles} <= layer["times_ms"].keys()
    assert model["times_ms"].keys() == set(titles) and model["swapped"] == 2


def test_a_ratio_is_to_dense_called_in_the_same_way(torchao: None) -> None:
    result = compare.linear(*MKN, ("float8", "mvue"), 1)
    for way in ("", "graph: "):
        beside, sampled, peer = (
            result["times_ms"][f"{way}{row}"]["median_ms"] for row in (compare.DENSE, "2:4 + mvue", "torchao float8")
        )
        before = result["fresh_ms"][f"{way}{compare.DENSE}"]
        assert result["ratio_to_dense"][f"{way}2:4 + mvue"] == pytest.approx(before / sampled)
        assert result["ratio_to_dense"][f"{way}torchao float8"] == pytest.approx(beside / peer)


def test_a_process_that_ran_a_sparse_product_knows_no_fresh_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh, "ran_sparse", lambda: True)
    result = compare.linear(*MKN, ("2:4",), 1)
    beside, sparse = (result["times_ms"][row]["median_ms"] for row in (compare.DENSE, "2:4"))
    assert result["fresh_ms"] == {} and result["ratio_to_dense"]["2:4"] == pytest.approx(beside / sparse)
    assert f"†: {tables.TIMED_BESIDE}" in compare_tables.linears([result | {"parts": {}}]).notes


def test_torchao_converts_exactly_the_layers_that_are_2_to_4(torchao: None, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[nn.Module] = []
    card = models.Card("one", "details", lambda toy: built.append(build(toy)) or built[-1], training, "1")
    monkeypatch.setitem(models.CARDS, "llama", card)
    compare.model("llama", ("2:4", "float8"), 1, True)
    converted = [[name for name, one in model.named_modules() if isinstance(one, Float8Linear)] for model in built]
    sparse = [list(semi_sparse_layers(model)) for model in built]
    assert [names for names in converted if names] == [["1"]]
    assert [names for names in sparse if names] == [["1"]] * 2  # to find the names, and the row


def test_other_layers_than_were_named_are_an_error(torchao: None) -> None:
    with pytest.raises(RuntimeError, match=r"torchao converted \[\] instead of \['2'\]"):
        float8.converted(build(True), ["2"])


def test_an_asked_for_row_without_torchao_is_an_error_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> str:
        raise float8.PackageNotFoundError(name)

    monkeypatch.setattr(float8, "version", missing)
    with pytest.raises(SystemExit):
        program.main(["--compare", "--toy", "--rows", "mvue", "float8"])
    assert "pip install torchao==0.18.0" in capsys.readouterr().err
    with pytest.raises(float8.MissingPeerError, match="or leave the row out"):
        compare.linear(*MKN, ("float8",), 1)


def test_a_row_that_is_left_out_is_named_below_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    program.main(["--compare", "--toy", "--rounds", "1", "--mkn", "32,64,128"])
    printed = capsys.readouterr().out
    assert "left out: torchao float8 (--rows names it; it needs `pip install torchao==0.18.0`)" in printed
    assert max(map(len, printed.splitlines())) <= table.WIDTH


def test_rows_without_the_comparison_are_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.main(["--linear", "--toy", "--rows", "mvue"])
    assert "--rows chooses rows of --compare" in capsys.readouterr().err


def test_torchao_that_fails_is_a_note_and_a_failing_row_of_this_package_is_not(
    torchao: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no such product\nsecond line")

    monkeypatch.setattr(Float8Linear, "forward", fail, raising=False)
    result = compare.linear(*MKN, ("float8", "2:4"), 1)
    assert result["errors"] == {TITLE: "ValueError: no such product"} and TITLE not in result["times_ms"]
    assert compare_tables.remarks([result])[-1].endswith("torchao float8 does not run: ValueError: no such product")
    monkeypatch.setattr(SemiSparseLinear, "forward", fail)
    with pytest.raises(ValueError, match="no such product"):
        compare.linear(*MKN, ("2:4",), 1)


def test_seeds_of_a_model_advance_with_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[list[int]] = []

    def noting(compiled: nn.Module, model: nn.Module, toy: bool) -> Callable[[], object]:
        step = training(compiled, model, toy)

        def noted() -> None:
            keys = [layer.held_seed for layer in semi_sparse_layers(model).values()]
            seeds.append([int(key) for key in keys if key is not None])
            step()

        return noted

    monkeypatch.setitem(models.CARDS, "llama", models.Card("one", "details", build, noting, None))
    compare.model("llama", ("mvue",), 1, True)
    drawn = [keys for keys in seeds if keys]  # the others are dense steps
    assert {len(keys) for keys in drawn} == {2}
    assert len(set(map(tuple, drawn))) == len(drawn) > 2


def test_a_model_without_optimizer_step_is_not_compared() -> None:
    with pytest.raises(ValueError, match="has no optimizer step"):
        compare.model("sam-vit-l", ("mvue",), 1, True)


def test_memory_is_what_is_held_and_what_a_call_adds_relative_to_dense() -> None:
    def one(ms: float) -> dict[str, float]:
        return {"median_ms": ms}

    result = {
        "mkn": [1, 2, 3],
        "times_ms": {compare.DENSE: one(2.0), "2:4": one(1.0)},
        "ratio_to_dense": {"2:4": 2.0},
        "memory_bytes": {compare.DENSE: {"held": 2**20, "beyond": 2**20}, "2:4": {"held": 2**20, "beyond": 2**21}},
        "left_out": [],
        "errors": {},
    }
    rows = compare_tables.linears([result]).rows
    assert [row[-2:] for row in rows] == [("2", "1.000"), ("3", "1.500")]


def result_of(time: int, fresh: float | None, left_out: list[str], **ms: float) -> dict[str, Any]:
    """A result as compare.py writes it: sparse rows to fresh dense where that is known, the others to dense beside."""
    sparse, dense = {row.title for row in compare.ROWS.values() if row.sparse}, ms["dense bf16"]
    bases = {title: fresh if fresh and title in sparse else dense for title in ms}
    return {
        "mkn": [1, 2, 3],
        "times_ms": {title: {"median_ms": one} for title, one in ms.items()},
        "fresh_ms": {"dense bf16": fresh} if fresh else {},
        "ratio_to_dense": {title: bases[title] / one for title, one in ms.items()},
        "memory_bytes": {title: {"held": 1, "beyond": 1} for title in ms},
        "left_out": left_out,
        "errors": {},
        "provenance": {"time": str(time), "gpu": "NVIDIA H100 80GB HBM3"},
    }


BESIDE = result_of(4, None, ["float8"], **{"dense bf16": 2.0, "2:4": 1.5, "dense fp8": 1.6, "mvue, repacked": 1.0})
FRESH = [
    result_of(time, 1.9, ["float8"], **{"dense bf16": 2.0, "2:4": ms, "dense fp8": 1.25})
    for time, ms in ((1, 1.2), (3, 1.0), (2, 1.1))
]
ALONE = result_of(1, 1.8, ["2:4"], **{"dense bf16": 1.8, "torchao float8": 1.2})


def test_each_row_is_of_the_newest_run_that_knows_fresh_dense_and_other_bases_are_marked() -> None:
    found = compare_tables.linears([*FRESH, ALONE, BESIDE])
    assert [row[1:4] for row in found.rows] == [
        ("dense bf16", "1.900", ""),
        ("torchao float8", "1.200", "**1.500**"),
        ("2:4", "1.000", "**1.900**"),
        ("mvue, repacked", "1.000", "**2.000**†"),
        ("dense fp8", "1.250", "**1.600**‡"),
    ]
    assert found.notes == (f"†: {tables.TIMED_BESIDE}", compare_tables.SLOWED_NOTE)
    assert "1 x 2 x 3: left out: torchao float8" in compare_tables.linears([*FRESH, BESIDE]).notes[-1]


def test_a_row_without_sparse_products_is_best_taken_from_a_run_without_any() -> None:
    alone = result_of(0, 1.8, [], **{"dense bf16": 1.8, "dense fp8": 1.0})
    rows = {row[1]: row[2:4] for row in compare_tables.linears([*FRESH, alone, ALONE]).rows}
    assert rows["dense fp8"] == ("1.000", "**1.800**") and rows["dense bf16"] == ("1.900", "")


def test_the_short_table_takes_the_runs_and_the_marks_of_the_long_one() -> None:
    later = result_of(9, 1.7, [], **{"dense bf16": 2.0, "2:4": 1.0, "torchao float8": 1.0})
    (row,) = compare_tables.short([*FRESH, ALONE, later]).rows
    assert row == ("1 x 2 x 3", "1.7", "**1.50**", "**1.70**", "H100")  # float8 of the run without sparse products
    old = result_of(1, None, [], **{"dense bf16": 2.0, "2:4 + mvue": 1.0, "torchao float8": 1.0})
    found = compare_tables.short([*FRESH, old])
    assert found.rows == (("1 x 2 x 3", "1.9", "**2.00**‡", "**1.90**", "**2.00**†", "H100"),)
    assert found.notes == (f"†: {tables.TIMED_BESIDE}", compare_tables.SLOWED_NOTE)
    (gain,) = compare_tables.beside_float8(
        [later | {"ratio_to_dense": later["ratio_to_dense"] | {"fp8 + 2:4": 3.0},
                  "times_ms": later["times_ms"] | {"fp8 + 2:4": {"median_ms": 1.7 / 3}}}, ALONE]
    ).rows  # fmt: skip
    assert gain[1] == "**2.00**"


def test_the_dense_part_of_a_run_in_fp8_is_that_of_a_process_that_ran_2_to_4() -> None:
    fresh = result_of(3, 1.9, [], **{"dense bf16": 2.0, "fp8 + 2:4": 1.0, "dense fp8": 1.25})
    found = compare_tables.beside_float8([fresh, ALONE])
    assert found.columns == ("step or layer", "fp8 + 2:4", "dense fp8 after 2:4", "whole run", "GPU")
    share = recipes.fastest().sparse_fraction
    whole = 1 / (share / 1.9 + (1 - share) / (1.9 / 1.25)) / 1.5
    assert found.rows[0][1:4] == (f"**{1.9 / 1.5:.2f}**", f"**{1.9 / 1.25 / 1.5:.2f}**", f"**{whole:.2f}**")


def test_the_parts_of_sampling_are_compared_with_a_copy_of_as_many_bytes() -> None:
    x, grad_output = torch.randn(32, 16).bfloat16(), torch.randn(32, 64).bfloat16()
    found = sampling.benchmark(x, grad_output, 1)
    assert found["bytes_moved"] == 2 * 32 * 64 + 2 * 32 * 64 * 9 // 16  # read as bf16, written as values and metadata
    assert found["faster"][sampling.SAMPLE]["median"] == pytest.approx(
        found["ms"][sampling.COPY] / found["ms"][sampling.SAMPLE]
    )


def test_results_fill_the_card_and_the_pages_and_fit_them(torchao: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured()
    monkeypatch.setattr(cards, "load", lambda kind: [found[kind]] if kind in found else store.load(kind))
    made = cards.blocks()
    for text in (made["compare"], cards.compare_card()):
        assert "Remake: `bash benchmarks/runs/fresh.sh OUT 'compare-*' 'float8-*'`" in text
        assert all(row.title in text for row in compare.ROWS.values())
    assert "| training step | dense ms |" in made["speed"]
    for text in (made["compare"], made["speed"]):
        assert max(len(line) for line in text.splitlines() if line.startswith("|")) <= table.WIDTH + 2
    assert cards.CARDS / "compare.md" in cards.outputs()


def test_without_results_the_pages_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "load", lambda kind: [] if kind.startswith("compare") else store.load(kind))
    made = cards.blocks()
    assert made["compare"] == f"Not measured yet: `{cards.FRESH} 'compare-*' 'float8-*'`."
    assert "training step" not in made["speed"]
    assert cards.CARDS / "compare.md" not in cards.outputs()
