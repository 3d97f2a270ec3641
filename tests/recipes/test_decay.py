"""MaskedDecay against the formula, worked out by hand from a brute-force mask."""

import copy

import pytest
import torch
from torch import nn

from semisparse import Phase, SparseConfig, SparseSchedule, sparsify
from semisparse.errors import ConfigError, NoLayerMatchedError
from semisparse.recipes import MaskedDecay
from semisparse.testing import assert_as_good_as_torch, assert_bit_equal
from tests.support import brute_mask

DECAY = 0.25
"""A power of two: the product with a weight is exact, so a sum is rounded once, however it is made."""


def model(**settings: str) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4), nn.Linear(4, 4))
    sparsify(net, SparseConfig(**settings), select=["0", "2"])
    return net


def backward(net: nn.Module, seed: int = 1, scaler: torch.amp.GradScaler | None = None) -> None:
    loss = net(torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))).square().mean()
    (loss if scaler is None else scaler.scale(loss)).backward()


def by_hand(net: nn.Sequential, indices: tuple[int, ...] = (0, 2)) -> dict[str, torch.Tensor]:
    """The gradients as they are now, with the term added for the layers at indices."""
    wanted = {name: p.grad.clone() for name, p in net.named_parameters()}
    for index in indices:
        weight = net[index].weight.detach()
        wanted[f"{index}.weight"] += DECAY * torch.where(brute_mask(weight), 0, weight)
    return wanted


def assert_gradients(net: nn.Module, wanted: dict[str, torch.Tensor]) -> None:
    for name, parameter in net.named_parameters():
        assert_bit_equal(parameter.grad, wanted[name])


OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1),
    "fused adamw": lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
    "foreach": lambda params: torch.optim.RMSprop(params, lr=0.1, foreach=True),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_optimizer_sees_the_term_once_whatever_it_is(kind: str) -> None:
    net = model()
    optimizer = OPTIMIZERS[kind](net.parameters())
    MaskedDecay(net, optimizer, DECAY)
    backward(net)
    backward(net, seed=2)  # a second micro-batch
    reference = copy.deepcopy(net)
    wanted = by_hand(net)
    for name, parameter in reference.named_parameters():
        parameter.grad = wanted[name].clone()
    other = OPTIMIZERS[kind](reference.parameters())
    optimizer.step()
    other.step()
    assert_gradients(net, wanted)
    for parameter, same in zip(net.parameters(), reference.parameters(), strict=True):
        assert_bit_equal(parameter, same)


def test_every_parameter_group_is_served() -> None:
    net = model()
    optimizer = torch.optim.SGD(
        [{"params": [net[0].weight]}, {"params": list(net.parameters())[1:], "lr": 0.5}], lr=0.1
    )
    MaskedDecay(net, optimizer, DECAY)
    backward(net)
    wanted = by_hand(net)
    optimizer.step()
    assert_gradients(net, wanted)


@pytest.mark.parametrize("fused", [True, False])
def test_a_scaler_changes_nothing(fused: bool) -> None:
    """Weights after a scaled step equal those of an unscaled one: the scale is a power of two and rounds nothing."""
    nets = model(), model()
    for net, scaled in zip(nets, (True, False), strict=True):
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=fused)
        MaskedDecay(net, optimizer, DECAY)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=scaled)
        for seed in (1, 2, 3):
            optimizer.zero_grad()
            backward(net, seed, scaler)
            scaler.step(optimizer)
            scaler.update()
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert_bit_equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_large_scale_times_a_weight_does_not_overflow_in_16_bits(dtype: torch.dtype) -> None:
    net = model().to(dtype)
    with torch.no_grad():
        net[0].weight.mul_(8)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=True)
    MaskedDecay(net, optimizer, 6e-5)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(net[0].weight.grad.clone()))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**19)
    before, mask = net[0].weight.detach().clone(), brute_mask(net[0].weight.detach())
    scaler.scale(torch.zeros((), requires_grad=True)).backward()
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    scaler.step(optimizer)
    exact = torch.where(mask, 0, before.double()) * 2.0**19 * 6e-5
    by_torch = (torch.where(mask, 0, before.float()) * (2.0**19 * 6e-5)).to(dtype)
    assert 2.0**19 * before.abs().max() > torch.finfo(torch.float16).max
    assert_as_good_as_torch(seen[0], by_torch, exact)
    assert all(parameter.isfinite().all() for parameter in net.parameters())


@pytest.mark.parametrize("fused", [True, False])
def test_a_skipped_step_moves_no_weight(fused: bool) -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=fused)
    MaskedDecay(net, optimizer, DECAY)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    before = copy.deepcopy(net.state_dict())
    backward(net, scaler=scaler)
    net[0].weight.grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_the_term_is_added_after_clipping() -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    MaskedDecay(net, optimizer, DECAY)
    backward(net)
    nn.utils.clip_grad_norm_(net.parameters(), 1e-2)
    wanted = by_hand(net)
    optimizer.step()
    assert_gradients(net, wanted)


def test_only_sparse_layers_decay() -> None:
    net = model()
    schedule = SparseSchedule(net, [Phase("sparse", 1), Phase("dense", 1)])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    MaskedDecay(net, optimizer, DECAY)
    for indices in ((0, 2), ()):
        optimizer.zero_grad()
        backward(net)
        wanted = by_hand(net, indices)
        optimizer.step()
        schedule.step()
        assert_gradients(net, wanted)


def test_pruned_weights_shrink_and_kept_ones_stay_without_a_gradient() -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    decay = MaskedDecay(net, optimizer, DECAY)
    old = net[0].weight.detach().clone()
    kept = brute_mask(old)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(net[0].weight[~kept], old[~kept] * (1 - DECAY))
    assert torch.equal(net[0].weight[kept], old[kept])
    decay.remove()
    left = net[0].weight.detach().clone()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert torch.equal(net[0].weight, left)


def test_a_weight_without_gradient_and_broken_weights_are_left_alone() -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    MaskedDecay(net, optimizer, DECAY)
    with torch.no_grad():
        net[0].weight[0, 0] = float("inf")
    net[0].weight.grad = torch.zeros_like(net[0].weight)
    optimizer.step()
    assert net[2].weight.grad is None
    assert net[0].weight.grad.isfinite().all()


def test_a_shared_weight_decays_once() -> None:
    net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    net[1].weight = net[0].weight
    sparsify(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    MaskedDecay(net, optimizer, DECAY)
    backward(net)
    weight, grad = net[0].weight.detach().clone(), net[0].weight.grad.clone()
    optimizer.step()
    torch.testing.assert_close(net[0].weight.grad, grad + DECAY * torch.where(brute_mask(weight), 0, weight))


def test_what_cannot_be_served_is_refused_by_name() -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for decay in (-1.0, float("nan"), float("inf"), True, "1"):
        with pytest.raises(ConfigError, match="decay="):
            MaskedDecay(net, optimizer, decay)
    with pytest.raises(ConfigError, match=r"does not hold 2\.weight"):
        MaskedDecay(net, torch.optim.SGD(net[0].parameters(), lr=0.1), DECAY)
    with pytest.raises(ConfigError, match="optimizer=object"):
        MaskedDecay(net, object(), DECAY)
    with pytest.raises(NoLayerMatchedError, match="sparsify"):
        MaskedDecay(nn.Linear(4, 4), optimizer, DECAY)
    MaskedDecay(net, optimizer, DECAY)
    with pytest.raises(ConfigError, match="closure"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(ConfigError, match="closure"):
        optimizer.step(closure=lambda: 0.0)
