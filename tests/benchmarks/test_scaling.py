"""The benchmark of several GPUs: exposed communication, the model of more GPUs, the card and the picture."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import cards, exposed, scaling, scaling_model, scaling_tables, table
from benchmarks.ranks import TOY
from tests.benchmarks import scaled
from tests.benchmarks.scaled import COMPUTE, LAYERS, RATE, WHOLE


def variant(result: dict[str, Any], precision: str, layout: str) -> dict[str, Any]:
    found = scaling_tables.found(result, precision, layout)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("collectives", "others", "expected"),
    [
        ([(0, 10)], [], 10),
        ([(0, 10)], [(2, 4), (3, 6)], 6),
        ([(0, 4), (2, 10)], [(8, 20)], 8),
        ([(0, 4)], [(0, 4)], 0),
        ([], [(0, 4)], 0),
    ],
)
def test_exposed_is_what_collectives_cover_alone(collectives: Any, others: Any, expected: float) -> None:
    assert exposed.exposed(collectives, others) == expected


def test_kernels_of_collectives_are_told_from_others_and_the_host() -> None:
    def event(name: str, begin: float, end: float, on: str = "CUDA", annotation: bool = False) -> SimpleNamespace:
        kind = getattr(torch.autograd.DeviceType, on)
        span = SimpleNamespace(start=begin, end=end)
        return SimpleNamespace(name=name, device_type=kind, time_range=span, is_user_annotation=annotation)

    events = [
        event("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 0, 5),
        event("nvjet_sm90_tst_192x192", 3, 9),
        event("aten::mm", 0, 100, on="CPU"),
        event("nccl:all_gather", 0, 100, annotation=True),
    ]
    assert exposed.spans_of(events) == ([(0, 5)], [(3, 9)])


def test_a_step_that_hides_all_communication_takes_its_compute_and_the_two_ends() -> None:
    result = scaled.result()
    one = variant(result, "bf16", "FSDP2")
    gather = reduction = WHOLE / LAYERS * 7 / 8 / RATE  # 7 ms, and a layer computes for 10 and for 20
    assert scaling_model.formula_ms(result, one, 8) == pytest.approx(COMPUTE["bf16"] + gather + reduction)
    ddp = variant(result, "bf16", "DDP")
    assert scaling_model.formula_ms(result, ddp, 8) == pytest.approx(COMPUTE["bf16"] + 2 * reduction)


def test_slow_links_between_hosts_show_and_compressed_gathers_wait_less() -> None:
    result, between = scaled.result(), 25.0  # GB/s: a quarter of the rate inside a host
    layer = WHOLE / LAYERS * 15 / 16 / (between * 1e6)
    assert layer == pytest.approx(30)
    compute = COMPUTE["fp8 + 2:4"]  # 5 ms per layer forward, 10 backward
    for layout, share in (("FSDP2", 1.0), ("FSDP2, compressed", 5 / 16)):
        waits = (LAYERS - 1) * (layer * share - 5 + layer * share + layer - 10)
        expected = compute + layer * share + waits + layer
        one = variant(result, "fp8 + 2:4", layout)
        assert scaling_model.formula_ms(result, one, 16, between) == pytest.approx(expected)
    ddp = variant(result, "fp8 + 2:4", "DDP")
    expected = compute + 2 * LAYERS * layer - 2 * compute / 3 * (LAYERS - 1) / LAYERS
    assert scaling_model.formula_ms(result, ddp, 16, between) == pytest.approx(expected)


def test_more_gpus_are_never_faster_than_one_and_one_waits_for_nobody() -> None:
    result = scaled.result()
    for one in result["variants"]:
        times = [scaling_model.formula_ms(result, one, ranks) for ranks in (1, 2, *scaling_model.RANKS)]
        assert times == sorted(times)
        assert times[0] == COMPUTE[one["precision"]]


def test_what_was_measured_beyond_the_formulas_stays_at_every_number_of_gpus() -> None:
    result = scaled.result()
    one, here = variant(result, "bf16", "FSDP2"), result["ranks"]
    beyond = one["median_ms"] - scaling_model.formula_ms(result, one, here)
    assert beyond > 0
    assert scaling_model.predicted_ms(result, one, here) == one["median_ms"]
    assert scaling_model.predicted_ms(result, one, 64) == scaling_model.formula_ms(result, one, 64) + beyond
    one["exposed_ms"] = 0.0  # then the formulas give a longer step than the measured one
    assert scaling_model.predicted_ms(result, one, 64) == scaling_model.formula_ms(result, one, 64)


def test_the_card_says_what_is_measured_what_is_modelled_and_fits_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = [scaled.result(2), scaled.result(1)]
    stored[0]["variants"][3]["losses"] = [10.0, 9.009]
    monkeypatch.setattr(scaling_tables, "load", lambda kind: stored)
    (text,) = scaling_tables.cards().values()
    assert text.index("| bf16 | one GPU | 1 |") < text.index("| bf16 | DDP | 2 |")
    assert "| bf16 | DDP | 2 | 330.0 | 49.6 | 0.909 | 90.0 | 30.0 | 60.0 |  |" in text
    assert re.search(r"\| 2:4 \| one GPU \| 2 \| 240.0 \|.*\|  \|\n", text)
    assert "A model, not a measurement" in text and "10 layers, 16,384 tokens per GPU" in text
    assert max(len(line) for line in text.splitlines() if line.startswith("|")) <= table.WIDTH + 2
    assert scaling_tables.table(stored).text()
    assert cards.blocks()["scaling"].endswith(text.split("\n\n", 1)[1].strip())


@pytest.mark.parametrize(("total", "expected"), [(100, 8), (9, 1), (1000, scaling.MOST_LAYERS)])
def test_layers_are_as_many_as_fit_for_the_hungriest_precision(
    monkeypatch: pytest.MonkeyPatch, total: int, expected: int
) -> None:
    per_layer, tried = {"bf16": 8, "2:4": 10, "fp8 + 2:4": 9}, []

    def built(precision: str, layout: str, config: Any, compiled: bool) -> None:
        tried.append(7 + per_layer[precision] * config.depth)

    monkeypatch.setattr(scaling, "device", lambda: "cuda")
    monkeypatch.setattr(scaling, "forget", lambda: None)
    monkeypatch.setattr(scaling, "built", built)
    monkeypatch.setattr(scaling, "step_of", lambda *given: lambda: None)
    monkeypatch.setattr(scaling, "peak", lambda step: tried[-1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(total_memory=total))
    assert scaling.depth_that_fits(TOY, 1) == expected
    assert expected in (1, scaling.MOST_LAYERS) or 7 + 10 * expected <= scaling.SPARE * total < 7 + 10 * (expected + 1)


def test_results_over_slow_links_have_a_table_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    direct, slow = scaled.result(2), scaled.result(2)
    slow["nccl"][scaling_tables.SLOW] = "1"
    variant(slow, "2:4", "FSDP2")["median_ms"] = 999.0
    monkeypatch.setattr(scaling_tables, "load", lambda kind: [slow, direct])
    before, after = scaling_tables.block().split(scaling_tables.THROUGH_HOST)
    assert "999.0" not in before and "| 2:4 | FSDP2 | 2 | 999.0 |" in after
    assert len(scaling_tables.by_ranks()) == len(scaling_tables.by_ranks(slow=True)) == 1


def test_differing_losses_show() -> None:
    result = scaled.result()
    variant(result, "2:4", "FSDP2")["losses"] = [10.0, 9.009]
    rows = {row[:2]: row[-1] for row in scaling_tables.table([result]).rows}
    assert rows["2:4", "FSDP2"] == "1.0e-03"
    assert rows["2:4", "FSDP2, compressed"] == "0.0e+00"
    assert rows["2:4", "DDP"] == rows["2:4", "one GPU"] == ""


def test_the_picture_tells_measured_from_modelled(tmp_path: Path) -> None:
    results = [scaled.result(1), scaled.result(2)]
    scaling_tables.write(results, tmp_path / "scaling.svg")
    described = re.search(r"<dc:description>(.*?)</dc:description>", (tmp_path / "scaling.svg").read_text(), re.DOTALL)
    assert described
    drawn = json.loads(described[1].replace("&quot;", '"'))
    assert drawn == scaling_tables.points(results)
    measured = [point for point in drawn if "modelled" not in point]
    assert {(point["ranks"], point["file"]) for point in measured} == {(1, "scaling-1.json"), (2, "scaling-2.json")}
    assert all((point["ranks"] == 1) == point["label"].endswith("one GPU") for point in measured)
    assert {point["ranks"] for point in drawn if "modelled" in point} == set(scaling_model.RANKS)


def test_the_readme_says_what_each_precision_is_worth_on_most_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    results = [scaled.result(2), scaled.result(4)]
    variant(results[1], "2:4", "DDP")["median_ms"] = 220.0
    monkeypatch.setattr(scaling_tables, "load", lambda kind: results)
    text = scaling_tables.short()
    assert text.startswith("On 4 ") and "DDP: 2:4 **1.50**, fp8 + 2:4 **1.83**; FSDP2: 2:4 **1.22**, " in text
    monkeypatch.setattr(scaling_tables, "load", lambda kind: [scaled.result(1)])
    assert scaling_tables.short() == scaling_tables.MISSING


def test_without_results_there_is_no_card_and_the_page_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling_tables, "load", lambda kind: [])
    assert scaling_tables.cards() == {}
    assert "torchrun --nproc-per-node RANKS -m benchmarks.scaling" in scaling_tables.block()
