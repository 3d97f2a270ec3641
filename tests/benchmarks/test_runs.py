"""The benchmarks run from start to end at toy size on the CPU, and what they print and write fits."""

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import benchmark_semi_structured_training as program
from benchmarks import eager_linear, end_to_end, host, host_parts, jobs, launches, linear, models, store, table, tables
from semisparse import PackedWeights, native
from semisparse.gemm.cusparselt import Availability

WEIGHT = linear.WEIGHT


def build(toy: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)).to(torch.bfloat16)


def step(compiled: nn.Module, model: nn.Module, toy: bool) -> Callable[[], object]:
    return lambda: compiled(torch.ones(8, 32, dtype=torch.bfloat16)).sum().backward()


def toy(label: str, **changes: bool) -> models.Card:
    return models.Card(label, "details", build, step, None, **changes)


@pytest.mark.parametrize(
    ("option", "files"),
    [
        (["--linear"], {"linear-32x64x128"}),
        (["--eager"], {"eager-linear-32x64x128"}),
        (["--host"], {"host-time", "host-parts"}),
        (["--no-gain", "--mkn", "32,64,64"], {"small-linear-32x64x64"}),
        (["--large-m"], {"large-m-64x128"}),
        (["--tune"], {"tuned-layers"}),
        (["--pack"], {"pack-64x64", "pack-together"}),
        (["--power"], {"power"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_toy_run_prints_narrow_tables_and_writes_its_result(
    option: list[str],
    files: set[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "compile", lambda model: model)  # takes a while and changes nothing that is tested here
    program.main([*option, "--toy", "--rounds", "2", "--save", str(tmp_path)])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= table.WIDTH
    assert {path.stem for path in tmp_path.glob("*.json")} == files
    for written in tmp_path.glob("*.json"):
        result = json.loads(written.read_text())
        assert result["toy"] and result["provenance"]["commit"]
        assert written.with_suffix(".csv").exists()


def test_a_job_that_fails_is_said_and_the_next_one_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(n: int, k: int, rounds: int) -> dict:
        raise RuntimeError("this one fails")

    monkeypatch.setattr(jobs.pack, "benchmark", fail)
    with pytest.raises(SystemExit, match="failed, as said above: pack-64x64"):
        program.main(["--pack", "--toy", "--rounds", "1", "--save", str(tmp_path)])
    assert "RuntimeError: this one fails" in capsys.readouterr().err
    assert {path.stem for path in tmp_path.glob("*.json")} == {"pack-together"}


def test_toy_results_cannot_be_taken_for_measurements(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.main(["--linear", "--toy", "--save"])
    assert "measures nothing" in capsys.readouterr().err


@pytest.mark.parametrize("known", [True, False], ids=["to dense in the fresh process", "round by round"])
@pytest.mark.parametrize(("job", "sparse"), [(jobs.no_gain, WEIGHT), (jobs.eager_layers, eager_linear.EACH)])
def test_a_ratio_has_its_spread_and_what_it_is_to(
    known: bool, job: Callable[..., Iterator[jobs.Job]], sparse: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not known:
        for module in (linear, eager_linear):
            monkeypatch.setattr(module, "fresh_ms", lambda calls: {})
    shape = [(32, 64, 64)]
    made = next(job([], shape, 3, True) if job is jobs.no_gain else job(shape, 3, True))
    result = made.measure()
    dense, this = (result["times_ms"][name]["blocks_ms"] for name in ("dense", sparse))
    base = [result["fresh_ms"]["dense"]] * 3 if known else dense
    quotients = sorted(one / two for one, two in zip(base, this, strict=True))
    assert result["ratio_to_dense"][sparse] == quotients[1]
    assert quotients[0] <= result["ratio_spread"][sparse]["p20"] <= quotients[1]
    (table,) = made.show(result)
    assert (table.rows[0][1].endswith("†"), bool(table.notes)) == (not known, not known)


def test_a_step_is_timed_in_three_variants_and_both_ratios_stand_in_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.Card, "compile", lambda self, model: model)
    monkeypatch.setitem(models.CARDS, "one", toy("one", optimizes=False))
    result = end_to_end.benchmark("one", 2, True)
    assert list(result["times_ms"]) == ["dense", "sparse", "per step"]
    assert result["launches"] == {"native": native.status().loaded, "reason": native.status().reason}
    (row,) = tables.models([result]).rows
    assert row[0] == "one" and f"**{result['ratio_to_dense']:.3f}**" in row
    assert f"**{result['per_step']['ratio_to_dense']:.3f}**" in row
    fresh = result["fresh_ms"]["dense"]
    assert row[1] == f"{fresh:.1f}" and not tables.models([result]).notes
    assert result["ratio_to_dense"] == statistics.median(fresh / ms for ms in result["times_ms"]["sparse"]["blocks_ms"])


def test_each_variant_of_a_step_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(models.Card, "compile", lambda self, model: compiled.append(model) or model)
    monkeypatch.setitem(models.CARDS, "one", toy("one", optimizes=False))
    end_to_end.benchmark("one", 2, True)
    assert len(compiled) == len(set(map(id, compiled))) == 3


def test_packing_per_step_follows_each_optimizer_step(monkeypatch: pytest.MonkeyPatch) -> None:
    packings: list[str] = []

    def step(compiled: nn.Module, model: nn.Module, toy: bool) -> Callable[[], object]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def train() -> None:
            optimizer.zero_grad()
            compiled(torch.ones(8, 32, dtype=torch.bfloat16)).sum().backward()
            optimizer.step()
            packings.append("step")

        return train

    monkeypatch.setattr(PackedWeights, "pack", lambda self, **options: packings.append("pack"))
    card = models.Card("one", "details", build, step, None, compiled=False)
    model, _ = models.sparsified(card, True)
    whole = end_to_end.packing_after(card.step(model, model, True), model, card)
    packings.clear()
    whole()
    whole()
    assert packings == ["step", "pack"] * 2


def test_results_from_before_packing_per_step_fill_the_table_too() -> None:
    old = {
        "card": "bert-base",
        "label": "BERT-base",
        "times_ms": {"dense": {"median_ms": 21.2}, "sparse": {"median_ms": 37.8}},
        "peak_memory_bytes": {"dense": 2**30, "sparse": 2**31},
        "ratio_to_dense": 0.58,
        "limit": 0.655,
        "limit_method": "measured",
    }
    found = tables.models([old])
    assert found.rows == (("BERT-base, 32x128 tokens, compiled", "21.2†", "**0.580**"),)
    assert found.notes == (f"†: {tables.TIMED_BESIDE}",)
    assert tables.end_to_end([old]).rows == (
        ("BERT-base, 32x128 tokens, compiled", "21.2", "37.8", "0.655", "1.0 / 2.0"),
    )


def test_host_time_is_relative_to_nn_linear_round_by_round() -> None:
    assert asdict(host.relative([2.0, 9.0, 6.0], [1.0, 1.0, 2.0])) == {"median": 3.0, "p20": 2.4, "p80": 6.6}


def test_host_time_has_every_variant_in_all_modes_and_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model: model)
    result = host.benchmark(3, toy=True)
    for passes in (result["us_per_layer"][mode][name] for mode in host.MODES for name in host.PASSES):
        assert {host.DENSE, host.EACH, host.PER_STEP} <= passes.keys()
        assert passes[host.DENSE]["ratio"] == {"median": 1.0, "p20": 1.0, "p80": 1.0}


@pytest.mark.parametrize("bias", [False, True])
def test_the_layers_of_the_stack_have_a_bias_where_the_mode_says_so(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(nn.Sequential, "forward", lambda self, x: seen.append(self) or x)
    host.variants(2, bias=bias)
    assert {layer.bias is not None for model in seen for layer in model} == {bias}


def test_products_in_cpp_are_those_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse, dense = iter([40, 43]), iter([7, 8])
    monkeypatch.setattr("benchmarks.launches.native.started", lambda: next(sparse))
    monkeypatch.setattr("benchmarks.launches.native.started_dense", lambda: next(dense))
    assert launches.started_natively(lambda: None) == (3, 1)


def test_the_parts_of_host_time_add_up_to_the_whole() -> None:
    result = host_parts.benchmark(3, toy=True)
    assert result["parts"].keys() == host_parts.EXPLAINED.keys()
    assert sum(result["parts"].values()) == pytest.approx(result["timed"][host_parts.WHOLE]["median"])


def test_limits_of_old_results_are_marked_as_estimates() -> None:
    assert tables.limit({"limit": 1.25}) == "~1.250"
    new = {"limit_method": "measured", "limit": {WEIGHT: 1.5}, "limit_estimated": {"other": 1.25}}
    assert [tables.limit(new, name) for name in (WEIGHT, "other", "neither")] == ["1.500", "~1.250", ""]


def test_an_error_is_a_wrapped_note_and_not_a_wide_label() -> None:
    wide = table.Table(("name", "ms"), (("**dense**", "1.0"),), ("torchao does not run: " + "word " * 60,))
    lines = wide.text().splitlines()
    assert lines[:2] == ["name    ms", "dense  1.0"]
    assert len(lines) > 4 and max(map(len, lines)) <= table.WIDTH


def test_without_a_sparse_engine_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(program, "available", lambda: Availability(False, "nvmath-python cannot be imported"))
    with pytest.raises(SystemExit):
        program.main(["--no-gain"])
    assert "no sparse engine, so nothing sparse would be measured: nvmath-python" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(store.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_stored_result_was_measured_with_the_sparse_engine(path: Path) -> None:
    content = json.loads(path.read_text())
    if content["kind"] == "bench":  # a self-check has no provenance but its own
        named = {name: way for name, way, _ in content["capabilities"]}
    else:
        named = {one["name"]: one["path"] for one in content["provenance"]["environment"]["capabilities"]}
    product = named["sparse GEMM"]
    assert product.startswith("cuSPARSELt")
