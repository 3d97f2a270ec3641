"""torchao's Float8Linear beside semi-sparse layers: left alone, taken over, and never put in their place unnoticed."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from semisparse import (
    SemiSparseLinear,
    SparseConfig,
    SparseSchedule,
    check,
    densify,
    not_swapped,
    register_linear,
    sparsify,
)
from semisparse.errors import ConfigError, LayerRefusedError, NoLayerMatchedError, ScheduleError
from semisparse.testing import assert_bit_equal
from tests.surgery.float8 import Float8Linear, convert

FP8 = SparseConfig(precision="fp8")


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 32)).to(dtype)


def types(model: nn.Module) -> list[type]:
    return [type(layer) for layer in model.children() if isinstance(layer, nn.Linear)]


def train(model: nn.Module, steps: int = 4) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = SparseSchedule.sparse_then_dense(model, total_steps=steps, sparse_fraction=0.5)
    x, losses = torch.randn(32, 32, dtype=next(model.parameters()).dtype), []
    for _ in range(steps):
        loss = (model(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def test_a_float8_layer_is_left_alone_and_the_report_says_why() -> None:
    model = network()
    convert(model, lambda _, name: name != "3")
    layers = list(model)
    report = sparsify(model, FP8)
    assert report.swapped == ("3",)
    assert "multiplies in float8 already" in report.skipped["0"]
    assert "take_float8=True" in report.skipped["2"]
    assert list(model) == layers
    assert types(model) == [Float8Linear, Float8Linear, SemiSparseLinear]
    with pytest.raises(LayerRefusedError, match=r"config names '0'.*float8 already"):
        sparsify(model, {"0": FP8})
    with pytest.raises(LayerRefusedError, match="float8 already"):
        SemiSparseLinear.from_dense(model[0])
    with pytest.raises(ConfigError, match="take_float8=True"):
        register_linear(Float8Linear)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("named", [False, True], ids=["selected", "named"])
def test_taken_over_it_is_the_semi_sparse_layer_of_the_linear_that_it_was(dtype: torch.dtype, named: bool) -> None:
    model = network(dtype)
    expected = copy.deepcopy(model)
    sparsify(expected, FP8, select="0")
    convert(model)
    layer, parameters = model[0], list(model.parameters())
    report = (
        sparsify(model, {"0": FP8}, take_float8=True) if named else sparsify(model, FP8, select="0", take_float8=True)
    )
    assert report.swapped == ("0",)
    assert "taken over from torchao's Float8Linear" in report.rows[0].reason
    assert types(model) == [SemiSparseLinear, Float8Linear, Float8Linear]
    assert model[0] is layer
    assert all(ours is before for ours, before in zip(model.parameters(), parameters, strict=True))
    assert vars(layer).keys() == vars(expected[0]).keys()
    x = torch.randn(8, 32, dtype=dtype)
    assert_bit_equal(model[0](x), expected[0](x))
    losses = train(model)
    assert losses[-1] < losses[0]
    densify(model)
    assert types(model) == [nn.Linear, Float8Linear, Float8Linear]


def test_taken_over_without_fp8_the_report_says_so() -> None:
    model = network()
    convert(model)
    report = sparsify(model, take_float8=True)
    assert "without precision='fp8'" in report.rows[0].reason


def test_what_cannot_be_taken_over_is_refused() -> None:
    class Derived(Float8Linear):
        pass

    model = network()
    convert(model)
    model[0].__class__ = Derived
    report = sparsify(model, FP8, take_float8=True)
    assert "Derived is derived from torchao's Float8Linear" in report.skipped["0"]
    with pytest.raises(ConfigError, match="take_float8=1"):
        sparsify(model, FP8, take_float8=1)  # type: ignore[call-overload]


def test_with_the_filter_both_train_beside_each_other() -> None:
    model = network()
    sparsify(model, FP8, select="0")
    convert(model, not_swapped)
    assert types(model) == [SemiSparseLinear, Float8Linear, Float8Linear]
    losses = train(model)
    assert losses[-1] < losses[0]
    assert check(model, torch.randn(4, 32)).ok


def test_a_layer_that_a_conversion_replaced_is_noticed() -> None:
    model = network()
    sparsify(model, FP8, exclude="3")
    schedule = SparseSchedule.sparse_then_dense(model, total_steps=4)
    convert(model, lambda _, name: name != "2")
    with pytest.raises(ScheduleError, match=r"^0 is scheduled, but.*module_filter_fn=semisparse\.not_swapped"):
        schedule.step()
    with pytest.raises(ScheduleError, match=r"^0 was made semi-sparse, but.*not_swapped"):
        SparseSchedule.sparse_then_dense(model, total_steps=4)
    problems = check(model, torch.randn(4, 32)).problems
    assert list(problems) == ["0"]
    assert "torchao's conversion to float8 replaced it" in problems["0"]
    assert sparsify(model, FP8, select="0", take_float8=True).swapped == ("0",)
    assert check(model, torch.randn(4, 32)).ok
    assert train(model)


def emptied(model: nn.Sequential) -> nn.Sequential:
    return model.to("meta").to_empty(device="cpu")


def swapped(model: nn.Sequential) -> nn.Sequential:
    torch.__future__.set_swap_module_params_on_conversion(True)  # as torch does for DTensors
    try:
        return model.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def assigned(model: nn.Sequential) -> nn.Sequential:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    return model


def built(_: nn.Sequential) -> nn.Sequential:
    return nn.Sequential(*(SemiSparseLinear(32, 32, config=FP8) for _ in range(3)))


@pytest.mark.parametrize("change", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), emptied, swapped,
                                    assigned, built],
                         ids=["copied", "pickled", "emptied", "swapped", "assigned", "built"])  # fmt: skip
def test_so_it_is_whatever_the_weight_went_through(change: Callable[[nn.Sequential], nn.Sequential]) -> None:
    model = network()
    sparsify(model, FP8)
    model = change(model)
    convert(model, lambda _, name: name == "0")
    assert list(check(model, torch.zeros(4, 32)).problems) == ["0"]
    with pytest.raises(ScheduleError, match=r"^0 was made semi-sparse, but.*not_swapped"):
        SparseSchedule.sparse_then_dense(model, total_steps=4)


def test_layers_that_were_made_dense_first_may_be_converted() -> None:
    model = network()
    sparsify(model, FP8, select="0")
    sparsify(model, FP8, select="2")
    densify(model)
    sparsify(model, FP8, select="3")
    convert(model, not_swapped)
    assert types(model) == [Float8Linear, Float8Linear, SemiSparseLinear]
    assert check(model, torch.randn(4, 32)).ok
    assert train(model)


def test_a_weight_that_a_semi_sparse_layer_still_holds_is_not_lost() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[1].weight = model[0].weight
    sparsify(model, FP8, select="0")
    convert(model, not_swapped)
    assert types(model) == [SemiSparseLinear, Float8Linear]
    assert train(model)


def test_a_model_of_float8_layers_alone_says_what_to_do() -> None:
    model = network()
    convert(model)
    with pytest.raises(NoLayerMatchedError, match="take_float8=True"):
        sparsify(model)
