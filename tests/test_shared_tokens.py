"""Layers that read the same input round it once, in eager code too, and never something else than the input."""

import gc
import threading
from collections.abc import Iterator
from weakref import ref

import pytest
import torch
from torch import Tensor

from semisparse import ops, shared_tokens
from semisparse.testing import assert_bit_equal
from tests.functional.counting import CountOps
from tests.nn.fp8 import assert_results_equal, by_equations, fp8_inputs, fp8_layer, run

LAYERS = [fp8_layer(), fp8_layer("row"), fp8_layer(None)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """The shape of each matrix that was rounded. (A dispatch mode would switch sharing off.)"""
    shapes: list[tuple[int, ...]] = []
    original = ops.quantise

    def counting(x: Tensor, rows: bool, columns: bool) -> tuple[Tensor, Tensor, Tensor]:
        shapes.append(tuple(x.shape))
        return original(x, rows, columns)

    monkeypatch.setattr(ops, "quantise", counting)
    shared_tokens._here.last = None
    yield shapes
    shared_tokens._here.last = None


def trainable(x: Tensor) -> Tensor:
    """x, as it comes from a layer that trains."""
    return x.requires_grad_().view_as(x)


def tokens(shapes: list[tuple[int, ...]]) -> int:
    """How often x was rounded; weights have other shapes."""
    return sum(shape[0] == 13 for shape in shapes)


def test_an_input_is_rounded_once_for_all_layers_and_anew_in_the_next_pass(calls) -> None:
    x, dy = fp8_inputs(13)
    x = trainable(x)
    for step in range(1, 4):
        for layer in LAYERS:
            found = layer(x)
            assert_bit_equal(found.detach(), by_equations(layer, x.detach(), dy).output)
        assert tokens(calls) == step


def test_the_gradients_are_those_of_layers_alone(calls) -> None:
    x, dy = fp8_inputs(13)
    expected = [by_equations(layer, x, dy) for layer in LAYERS]
    x = trainable(x)
    outputs = [layer(x) for layer in LAYERS]
    assert tokens(calls) == 1
    for layer, y, wanted in zip(LAYERS, outputs, expected, strict=True):
        layer.zero_grad()
        (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        y.backward(dy)
        assert_bit_equal(dx + 0.0, wanted.grad_input + 0.0)
        assert_bit_equal(layer.weight.grad + 0.0, wanted.grad_weight + 0.0)


def test_a_changed_input_is_rounded_again(calls) -> None:
    x, dy = fp8_inputs(13)
    first, second, third = LAYERS
    first(x)
    x.mul_(3)
    assert_bit_equal(second(x).detach(), by_equations(second, x, dy).output)
    x.data = -x.data.flip(0)  # another address, and no version
    assert_bit_equal(third(x).detach(), by_equations(third, x, dy).output)
    x.data.add_(1)  # no trace, but each layer begins a new pass
    for layer in LAYERS[::-1]:
        assert_bit_equal(layer(x).detach(), by_equations(layer, x, dy).output)


def test_a_transpose_that_was_not_wanted_before_is_made(calls) -> None:
    x, dy = fp8_inputs(13)
    with torch.no_grad():
        LAYERS[0](x)
    assert_results_equal(run(LAYERS[1], x, dy), by_equations(LAYERS[1], x, dy))
    x = trainable(x)
    with torch.no_grad():
        LAYERS[0](x)
    calls.clear()
    LAYERS[1](x)
    assert tokens(calls) == 1


def test_an_input_that_is_read_in_another_dtype_is_rounded_again(calls) -> None:
    x, dy = fp8_inputs(13)
    LAYERS[0](x)
    x.data = x.data.view(torch.float16)
    layer = fp8_layer(dtype=torch.float16)
    assert_bit_equal(layer(x).detach(), by_equations(layer, x, dy.half()).output)


def test_what_an_optimizer_may_write_to_is_rounded_by_each_layer(calls) -> None:
    x = torch.nn.Parameter(fp8_inputs(13, dtype=torch.float32)[0])
    first, second = fp8_layer(dtype=torch.float32), fp8_layer("row", dtype=torch.float32)
    optimizer, version = torch.optim.SGD([x], lr=1.0, fused=True), x._version
    first(x).sum().backward()
    optimizer.step()
    if x._version == version:  # as in torch 2.11 to 2.13
        assert_bit_equal(second(x).detach(), second(x.detach().clone()).detach())
    assert tokens(calls) >= 2


def test_what_inference_mode_rounded_serves_no_backward(calls) -> None:
    x, dy = fp8_inputs(13)
    x, layer = trainable(x), LAYERS[1]
    with torch.inference_mode():
        shared_tokens.quantised(x, LAYERS[0].weight, columns=True)
        shared_tokens.quantised(x, LAYERS[2].weight, columns=True)
    assert tokens(calls) == 1
    layer.zero_grad()
    layer(x).backward(dy)
    assert_bit_equal(layer.weight.grad + 0.0, by_equations(layer, x.detach(), dy).grad_weight + 0.0)


def test_nothing_is_held_once_the_input_is_gone_or_another_one_came(calls) -> None:
    x, _ = fp8_inputs(13)
    with torch.no_grad():
        LAYERS[0](x)
        held = ref(shared_tokens._here.last.tokens[0])
        assert held() is not None
        del x
        gc.collect()
        assert held() is None
        x, _ = fp8_inputs(13)
        LAYERS[0](x)
        held = ref(shared_tokens._here.last.tokens[0])
        LAYERS[0](x.clone())
        assert held() is None


def test_threads_modes_and_inference_tensors_share_nothing(calls) -> None:
    x, _ = fp8_inputs(13)
    with torch.no_grad():
        LAYERS[0](x)
        thread = threading.Thread(target=LAYERS[1], args=(x,))
        thread.start()
        thread.join()
        assert tokens(calls) == 2
        with CountOps():
            LAYERS[1](x)
        assert tokens(calls) == 3
    with torch.inference_mode():
        y = x.clone()
        LAYERS[0](y)
        LAYERS[1](y)
    assert tokens(calls) == 5
