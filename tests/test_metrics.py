"""MaskMetrics against masks that tests/ works out by brute force."""

import pytest
import torch
from torch import nn

from semisparse import MaskMetrics, SemiSparseLinear, SparseConfig, SparseSchedule, densify, mask_statistics, sparsify
from semisparse.errors import ConfigError, NoLayerMatchedError
from tests.support import brute_mask


def kept(weight: torch.Tensor, mask: str) -> torch.Tensor:
    """The mask by brute force; weights are random, so nothing ties."""
    if mask == "transposable":
        return brute_mask(weight)
    groups = weight.detach().abs().view(-1, 4)
    return torch.stack([group >= group.sort().values[2] for group in groups]).view(weight.shape)


def model(**settings: str) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    sparsify(net, SparseConfig(**settings))
    return net


def step(net: nn.Module, scale: float = 0.3) -> None:
    """Stands for an optimizer step: every weight moves."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += scale * torch.randn_like(parameter)


@pytest.mark.parametrize("mask", ["transposable", "row"])
@pytest.mark.parametrize("interval", [2, 3, 5])
def test_the_flip_rate_is_that_of_the_measured_step(mask: str, interval: int) -> None:
    net = model(weight=mask)
    followed = MaskMetrics(net, interval)
    assert followed.read() == {} and followed.step is None
    for count in range(1, 3 * interval + 1):
        before = [kept(net[index].weight, mask) for index in (0, 2)]
        step(net)
        assert followed.update() is (count % interval == 0)
        if count % interval == 0:
            flips = [(old ^ kept(net[i].weight, mask)).sum().item() for i, old in zip((0, 2), before, strict=True)]
            values = followed.read()
            assert values["flip_rate/0"] == pytest.approx(flips[0] / 96) and flips[0] > 0
            assert values["flip_rate/2"] == pytest.approx(flips[1] / 48)
            assert values["flip_rate"] == pytest.approx(sum(flips) / 144)
            assert followed.step == count


def test_weights_that_do_not_move_do_not_flip() -> None:
    net = model()
    followed = MaskMetrics(net, 2)
    followed.update()
    followed.update()
    assert followed.read()["flip_rate"] == 0


def test_kept_magnitude_and_dead_rows() -> None:
    net = model()
    with torch.no_grad():
        net[2].weight[1] = 0
    weight = net[0].weight.detach().double().abs()
    values = mask_statistics(net)
    assert values["kept_magnitude/0"] == pytest.approx(
        (weight[kept(weight.float(), "transposable")].sum() / weight.sum()).item()
    )
    assert values["dead_rows/0"] == 0 and values["dead_rows/2"] == 0.25
    with torch.no_grad():
        net[2].weight.zero_()
    assert mask_statistics(net)["kept_magnitude/2"] == 1
    with torch.no_grad():
        net[2].weight[0, 0] = float("nan")
    assert mask_statistics(net)["kept_magnitude/2"] != mask_statistics(net)["kept_magnitude/2"]


def test_a_dense_phase_is_followed_and_its_values_are_the_reference_of_a_sparse_run() -> None:
    dense, sparse = model(), model()
    schedule = SparseSchedule.sparse_then_dense(dense, 10, 0.0)
    assert schedule.phase == "dense"
    both = MaskMetrics(dense, 2), MaskMetrics(sparse, 2)
    for _ in range(2):
        for net, scale, followed in ((dense, 0.6, both[0]), (sparse, 0.1, both[1])):
            step(net, scale)
            followed.update()
    reference = both[0].read()
    values = both[1].read(reference)
    assert (reference["phase"], values["phase"]) == (0, 1)
    assert values["flip_ratio/0"] == pytest.approx(values["flip_rate/0"] / reference["flip_rate/0"])
    assert not any(name.startswith("flip_ratio") for name in reference)
    calm = reference | {"flip_rate/0": 0.0}
    assert "flip_ratio/0" not in both[1].read(calm)
    with pytest.raises(ConfigError, match="flip_rate/0"):
        both[1].read({})


def test_measuring_leaves_weights_gradients_and_random_numbers_alone() -> None:
    net = model()
    net(torch.randn(2, 8)).sum().backward()
    before = [(p.detach().clone(), p.grad.clone()) for p in net.parameters()]
    state = torch.get_rng_state()
    followed = MaskMetrics(net, 2)
    for _ in range(4):
        followed.update()
    followed.read()
    assert torch.equal(state, torch.get_rng_state())
    assert all(
        torch.equal(p, old) and torch.equal(p.grad, grad)
        for p, (old, grad) in zip(net.parameters(), before, strict=True)
    )


def test_only_layers_with_a_mask_of_their_own_are_followed() -> None:
    mixed = nn.Sequential(SemiSparseLinear(8, 8), nn.Linear(8, 8))
    sparsify(mixed, SparseConfig(weight=None, activation="transposable"), select=lambda name, layer: name == "1")
    assert set(mask_statistics(mixed)) == {"kept_magnitude/0", "dead_rows/0"}
    for nothing in (nn.Sequential(nn.Linear(8, 8)), mixed[1]):
        with pytest.raises(NoLayerMatchedError, match="sparsify"):
            MaskMetrics(nothing)


def test_layers_that_were_made_dense_drop_out() -> None:
    net = model()
    followed = MaskMetrics(net, 2)
    followed.update()
    followed.update()
    before = followed.read()
    SemiSparseLinear.to_dense(net[0])
    step(net)
    assert [followed.update() for _ in range(2)] == [False, True]
    assert "flip_rate/0" in before and "flip_rate/0" not in followed.read() and "flip_rate/2" in followed.read()
    densify(net)
    last = followed.read()
    assert [followed.update() for _ in range(4)] == [False] * 4
    assert followed.read() == last | {"phase": 0.0}


@pytest.mark.parametrize("interval", [1, 0, -3, 2.0, True, None])
def test_a_wrong_interval_is_refused(interval: object) -> None:
    with pytest.raises(ConfigError, match="interval"):
        MaskMetrics(model(), interval)
