"""The benchmarks of fp8 at toy size on the CPU: what they measure and what their tables show."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from benchmarks import (
    compare,
    compare_tables,
    float8,
    fp8_kernels,
    fp8_tables,
    models,
    neighbours,
    noise,
    step_profile,
    tables,
)

MKN = (32, 64, 128)


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "forget_compiled", lambda: None)  # settings of the process, which others share
    for module in (neighbours, step_profile):
        monkeypatch.setattr(module, "forget_compiled", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)


@pytest.fixture
def torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that computes as nn.Linear does."""
    monkeypatch.setattr(float8, "converted", lambda model, names: model)
    monkeypatch.setattr(float8, "checked_version", lambda: "0.18.0")


def test_the_neighbours_are_taken_off_every_row(torchao: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, neighbours.Timing]:
        for call in calls.values():
            call()
        took = {neighbours.ALONE: 1.0, "dense bf16": 9.0, "fp8 + 2:4": 5.0, "torchao float8": 3.0}
        return {name: neighbours.Timing(took[name], took[name], took[name], 1, (took[name],)) for name in calls}

    monkeypatch.setattr(neighbours, "interleaved", timed)
    monkeypatch.setattr(neighbours, "fresh_ms", lambda calls: {})
    found = neighbours.benchmark(*MKN, ["float8", "fp8-2:4"], 1)
    assert found["ratio_to_dense"] == {"dense bf16": 1.0, "fp8 + 2:4": 2.0, "torchao float8": 4.0}
    old = fp8_tables.neighbours([found])
    assert old.rows[0][2] == "8.000†" and old.notes[0] == f"†: {tables.TIMED_BESIDE}"
    assert [row[3] for row in old.rows] == ["", "2.000†", "4.000‡"]
    alone = fp8_tables.neighbours([neighbours.benchmark(*MKN, ["float8"], 1)])
    assert [row[3] for row in alone.rows] == ["", "4.000"]
    monkeypatch.setattr(neighbours, "fresh_ms", lambda calls: dict(zip(calls, (1.5, 7.5), strict=True)))
    found = neighbours.benchmark(*MKN, ["float8", "fp8-2:4"], 1)
    assert found["ratio_to_dense"] == {"dense bf16": 1.0, "fp8 + 2:4": 1.5, "torchao float8": 4.0}
    rows = fp8_tables.neighbours([found]).rows
    assert fp8_tables.neighbours([found]).notes == (compare_tables.SLOWED_NOTE,)
    assert [row[1:4] for row in rows] == [
        ("dense bf16", "6.000", ""),
        ("fp8 + 2:4", "4.000", "1.500"),
        ("torchao float8", "2.000", "4.000‡"),  # to dense beside it
    ]


def test_noise_is_that_of_the_bits_that_are_left(torchao: None) -> None:
    found = noise.benchmark(*MKN)["decibels"]
    for rows in found.values():
        assert rows[noise.OURS]["dx"] == pytest.approx(rows[noise.PAIR]["dx"], abs=0.3)
        lost = rows[noise.PAIR]["dx"] - rows[noise.OTHER_PAIR]["dx"]
        assert 4 < lost < 8  # a bit is 6 decibels
        assert rows[noise.TORCHAO]["y"] > rows[noise.OURS]["y"] + 10  # bf16 in place of torchao here
    assert len(fp8_tables.noise([noise.benchmark(*MKN)]).rows) == 2 * 4


def test_a_pass_is_its_op_less_the_one_for_the_largest_magnitude(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, neighbours.Timing]:
        for call in calls.values():
            call()
        took = {"copy": 8e-3, fp8_kernels.LARGEST: 4e-3}  # of four matrices each, in ms
        return {name: neighbours.Timing(took.get(name, 12e-3), 0, 0, 1) for name in calls}

    monkeypatch.setattr(fp8_kernels, "interleaved", timed)
    found = fp8_kernels.benchmark(64, 64, 1)
    assert found["second_pass_microseconds"] == pytest.approx(dict.fromkeys(fp8_kernels.PASSES, 2.0))
    assert found["rate_of_copy"]["round to both layouts"] == pytest.approx(1)  # as many bytes in as many microseconds
    assert found["rate_of_copy"][fp8_kernels.LARGEST] == pytest.approx(1)
    assert len(fp8_tables.kernels([found]).rows) == 1 + len(fp8_kernels.PASSES)


def test_kernels_are_told_apart_by_their_names() -> None:
    kinds = {
        "sm90_xmma_sparse_gemm_e4m3bf16_e4m3f32_f32_tn_n": "sparse products",
        "nvjet_sm90_qqtst_128x160_128x5_2x1_v_bz_coopA_algo2_TNT": "dense fp8 products",
        "nvjet_sm90_qrtst_128x160_128x5": "dense fp8 products",
        "nvjet_sm90_tst_192x192_64x3_1x2_h_bz_coopB_NTN": "dense products",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16": "attention",
        "quantise": "rounding to e4m3",
        "triton_red_fused__to_copy_add_max_mean_mul_pow_quantise_rsqrt_view_10": "fused pointwise and reductions",
        "Memset (Device)": step_profile.OTHER,
    }
    assert {name: step_profile.kind_of(name) for name in kinds} == kinds


def test_a_profile_says_how_far_its_fastest_fp8_row_is_from_its_floors_and_what_is_left() -> None:
    def row(**ms: float) -> dict[str, object]:
        return {"total_ms": sum(ms.values()), "longest": list(ms.items())}

    floors = {"two fp8 products with 2:4": 2.0, "three bf16 products": 10.0}
    rows = {
        "dense bf16": row(gemm=17.0),
        "a": row(gemm=5.0, amax=0.25, sparse=4.0, nvjet_x_q=2.0, quantise=1.5),
        "b": row(gemm=5.0, amax=0.25, sparse=4.5, quantise=0.25, sample_pack8=0.5),
    }
    for names, said in (
        (["a"], ("2.00 times", "1.8 ms (", "(1.8 ms)")),
        (["a", "b"], ("1.50 times", "1.0 ms (", "(1.0 ms)")),
    ):
        result = {"rows": {name: rows[name] for name in ["dense bf16", *names]}, "floors_ms": floors}
        text = " ".join(fp8_tables.remaining(result))
        assert all(part in text for part in (*said, "dense bf16 take 1.20 times")) and names[-1] in text
    assert fp8_tables.remaining({"rows": {"dense bf16": rows["dense bf16"]}, "floors_ms": floors}) == []


def test_a_profile_has_a_column_per_row_and_floors(torchao: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(toy: bool) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64)).to(torch.bfloat16)

    def training(compiled: nn.Module, model: nn.Module, toy: bool) -> Callable[[], object]:
        return lambda: compiled(torch.ones(8, 64, dtype=torch.bfloat16)).sum().backward()

    card = models.Card("toy", "", build, training, "*")
    monkeypatch.setitem(models.CARDS, "toy", card)
    found = step_profile.benchmark("toy", ["float8", "fp8-2:4"], True)
    assert (found["layers"], found["tokens"]) == (2, 8)
    flops = 2 * 2 * 8 * 64 * 96
    assert found["floors_ms"]["three bf16 products"] == pytest.approx(3 * flops / 989e9)
    assert fp8_tables.profile(found).columns[1:] == ("dense bf16", "fp8 + 2:4", "torchao float8")
    row = {"total_ms": 10.0, "longest": [["quantise", 4.0], ["nvjet_sm90_tst", 5.0], ["amax", 0.5]]}
    wanted = {"rounding to e4m3": 4.0, "dense products": 5.0, "largest magnitudes": 0.5, step_profile.OTHER: 0.5}
    assert step_profile.by_kind(row) == pytest.approx(wanted)
