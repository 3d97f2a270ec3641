"""Numerics of the trust suite on the CPU: right layers pass, and what is off is counted and named."""

import pytest
import torch

from tests.trust import numerics
from tests.trust.test_parts import SHAPE, failed, machine, part


def test_long_sums_in_fp8_are_reported_apart(monkeypatch) -> None:
    monkeypatch.setattr(numerics, "LONGEST", 32)
    tried = part()
    numerics.run(machine(), tried, chosen=[SHAPE])  # K is 64
    sizes = {row.what: (row.size, row.rule) for row in tried.rows if row.what.startswith("fp8 + 2:4: largest")}
    # dx sums over 32 and dW over 24 terms, y over 64.
    assert list(sizes.values()) == [("2 results", "at most"), ("1 results", "reported"), ("3 results", "at most")]
    assert not any("more than" in row.what for row in tried.rows if row.what.startswith("2:4"))


def test_numerics_hold_and_a_result_that_is_off_is_named(monkeypatch) -> None:
    tried = part()
    numerics.run(machine(), tried, chosen=[SHAPE, (5, 20, 36)])
    assert not failed(tried) and len(tried.rows) > 6 and tried.cases == 8
    right = numerics.step

    def off(layer, x, dy):
        y, dx, *others = right(layer, x, dy)
        return [y, dx * 1.01, *others]

    monkeypatch.setattr(numerics, "step", off)
    tried = part()
    numerics.run(machine(), tried, chosen=[SHAPE])
    assert any("correct rounding" in row.what for row in failed(tried))
    assert all(fault.startswith("dx at M=24, K=64, N=32") for row in failed(tried) for fault in row.faults)


def test_products_with_fast_accumulation_are_those_of_the_codes(monkeypatch) -> None:
    left, right = (torch.randint(-4, 5, size).double() for size in ((13, 40), (7, 40)))
    assert torch.equal(numerics.fast_product(left, right), (left @ right.mT).float())
    monkeypatch.setattr(numerics, "IN_TURN", ("fp8 + 2:4 + mvue",))
    tried = part()
    numerics.run(machine(), tried, chosen=[SHAPE, (13, 96, 64)])
    assert not failed(tried)
    # y, dx and dW of two shapes, and no dW of a sample; db is no product of codes.
    sizes = {row.what: row.size for row in tried.rows if "fast accumulation" in row.what}
    assert list(sizes.values()) == ["6 results", "4 results"]
    monkeypatch.setattr(numerics, "fast_product", lambda left, right: (left @ right.mT).float() * float("nan"))
    tried = part()
    numerics.run(machine(), tried, chosen=[SHAPE])
    assert {row.what.split(", in units of ")[1] for row in failed(tried)} == {"PyTorch's with fast accumulation"}


def test_fast_products_are_rounded_where_those_of_the_layer_are() -> None:
    """Whole numbers, whose sums are exact: any other bit would come from rounding once more or less."""
    case = numerics.cases(machine(), ["fp8 + 2:4"])[0]
    layer = numerics.make_layer(machine(), case, 64, 32, True, "dense")
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-300, 301, (32, 64)))
        layer.bias.copy_(torch.randn(32) * 1000)
    x, dy = (torch.randint(-300, 301, size).bfloat16() for size in ((48, 64), (48, 32)))
    right = numerics.step(layer, x, dy)
    found = numerics._fast_fp8(case, layer, x, dy)
    assert all(torch.equal(one, other) for one, other in zip(found, right, strict=False))
    once, *_ = numerics._fp8_exact(case, layer, x, dy)
    assert not torch.equal(once.bfloat16(), right[0])


@pytest.mark.parametrize("name", numerics.FALLING_BACK)
def test_layers_that_fall_back_are_right_and_say_so(name: str, monkeypatch) -> None:
    monkeypatch.setattr(numerics, "ALWAYS", ())
    monkeypatch.setattr(numerics, "IN_TURN", (name,))
    tried = part()
    numerics.run(machine(), tried, chosen=[SHAPE, (13, 20, 36)])
    assert not failed(tried) and all(row.what.startswith(name) for row in tried.rows[1:])
    monkeypatch.setattr(
        numerics, "make_layer", lambda *given, **options: torch.nn.Linear(*given[2:5], dtype=given[1].dtype)
    )
    tried = part()
    numerics.run(machine(), tried, chosen=[SHAPE])
    assert sum("differ in a bit" in row.what for row in failed(tried)) == 1
    assert any("do not say why" in row.what for row in failed(tried)) == ("fp8" in name)


def test_products_in_tf32_are_not_taken_for_fp32(monkeypatch) -> None:
    monkeypatch.setattr(numerics, "ALWAYS", ())
    monkeypatch.setattr(numerics, "IN_TURN", ("2:4, fp32",))
    right = numerics.step
    monkeypatch.setattr(numerics, "step", lambda *given: [one.half().float() for one in right(*given)])
    tried = part()
    numerics.run(machine(), tried, chosen=[(64, 64, 32)])
    assert any("summed in fp32" in row.what and row.figure < 80 for row in failed(tried))


def test_a_case_that_raises_is_named_and_the_others_run(monkeypatch) -> None:
    right = numerics.make_layer

    def fails(here, case, *given, **options):
        if case.dtype is torch.float16:
            raise RuntimeError("gone")
        return right(here, case, *given, **options)

    monkeypatch.setattr(numerics, "make_layer", fails)
    tried = part()
    numerics.run(machine(), tried, chosen=[SHAPE])
    assert [row.what for row in failed(tried)] == ["cases that raised"]
    assert failed(tried)[0].faults == [f"2:4, fp16 at {SHAPE}: RuntimeError: gone"]
    assert any("fp8" in row.what for row in tried.rows)


@pytest.mark.parametrize("turn", range(len(numerics.ARRANGEMENTS)))
def test_an_arrangement_holds_the_same_numbers(turn: int) -> None:
    matrix = torch.randn(6, 4).bfloat16()
    arranged = numerics.arranged(matrix, turn)
    assert torch.equal(arranged, matrix)
    seen = arranged.stride(), arranged.storage_offset()
    assert seen == [((4, 1), 0), ((1, 6), 0), ((8, 1), 0), ((4, 1), 1)][turn]


def test_nothing_is_passed_where_the_time_is_over() -> None:
    tried = part(0.0)
    numerics.run(machine(), tried, chosen=[SHAPE])
    assert [row.what for row in failed(tried)] == ["shapes"]
