"""Muon, 8-bit AdamW, SAM and averages beside a schedule: the training of dense weights that are masked by hand."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from semisparse import Phase, SparseSchedule, sparsify
from semisparse.schedule.step_packing import Pack
from semisparse.testing import assert_bit_equal
from tests.support import brute_mask

pytestmark = pytest.mark.usefixtures("packed_on_cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
PACKS = pytest.mark.parametrize("pack", ["each_forward", "per_step"])
SIZE = 64  # torchao keeps the state of smaller weights in 32 bits
RATE = 0.2  # with momentum, moves masks within a step
PHASES = [Phase("sparse", 3), Phase("dense", 1), Phase("sparse", 1)]
STEPS = sum(phase.steps for phase in PHASES)
SPARSE = [phase.kind == "sparse" for phase in PHASES for _ in range(phase.steps)]


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation (arXiv 2010.01412): the gradient at perturbed weights steps the old ones.

    Args:
        params: What is trained.
        rho: Length of the perturbation.
    """

    def __init__(self, params: Iterable[Tensor], rho: float) -> None:
        super().__init__(params, {"rho": rho})
        self.base = torch.optim.SGD(self.param_groups, lr=RATE, momentum=0.9)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def perturb(self) -> None:
        """Move the weights along their gradients, and clear these."""
        held = [(p, group["rho"]) for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.float().norm() for p, _ in held]).norm()
        for p, rho in held:
            self.state[p]["before"] = p.detach().clone()
            p.add_(p.grad * (rho / norm).to(p.dtype))
            p.grad = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Put the weights back, by .data as published code does, and step."""
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p].pop("before")
        self.base.step()


def adamw_8bit(params: list[Tensor]) -> torch.optim.Optimizer:
    optim = pytest.importorskip("torchao.optim")
    return optim.AdamW8bit(params, lr=0.02)


OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "Muon": lambda params: torch.optim.Muon(params, lr=0.05),
    "AdamW8bit of torchao": adamw_8bit,
    "SAM": lambda params: SAM(params, rho=1.0),
}


def network(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(SIZE, SIZE, bias=False) for _ in range(2))).to(dtype)
    sparsify(model)
    return model


def batch(step: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(8, SIZE, generator=torch.Generator().manual_seed(step)).to(dtype)


def loss_of(y: Tensor, x: Tensor) -> Tensor:
    return (y - x).float().square().mean()


def masks_of(weights: list[Tensor]) -> list[Tensor]:
    return [brute_mask(weight) for weight in weights]


def by_hand(make: Callable[[list[Tensor]], torch.optim.Optimizer], dtype: torch.dtype) -> tuple[list[Tensor], int]:
    """Losses, then the weights; and how many masks SAM's perturbations changed."""
    weights: list[Any] = [nn.Parameter(weight.detach().clone()) for weight in network(dtype).parameters()]
    optimizer, moved, losses = make(weights), 0, []

    def backward(step: int) -> list[Tensor]:
        masks = masks_of(weights) if SPARSE[step] else [torch.ones(SIZE, SIZE, dtype=torch.bool)] * 2
        leaves = [torch.where(mask, w.detach(), 0).requires_grad_() for mask, w in zip(masks, weights, strict=True)]
        x = batch(step, dtype)
        loss = loss_of(F.linear(F.linear(x, leaves[0]), leaves[1]), x)
        for weight, grad in zip(weights, torch.autograd.grad(loss, leaves), strict=True):
            weight.grad = grad
        losses.append(loss.detach())
        return masks

    for step in range(STEPS):
        masks = backward(step)
        if isinstance(optimizer, SAM):
            optimizer.perturb()
            moved += sum(not torch.equal(*pair) for pair in zip(masks, backward(step), strict=True))
        optimizer.step()
        optimizer.zero_grad()
    return losses + [weight.detach() for weight in weights], moved


def trained(
    make: Callable[[list[Tensor]], torch.optim.Optimizer], dtype: torch.dtype, pack: Pack, compiled: bool = False
) -> list[Tensor]:
    """The same with a schedule, whose step() is called after each optimizer step."""
    model = network(dtype)
    schedule = SparseSchedule(model, PHASES, pack=pack)
    optimizer, losses = make(list(model.parameters())), []
    call = torch.compile(model, backend="aot_eager") if compiled else model

    def backward(step: int) -> None:
        x = batch(step, dtype)
        loss = loss_of(call(x), x)
        loss.backward()
        losses.append(loss.detach())

    for step in range(STEPS):
        backward(step)
        if isinstance(optimizer, SAM):
            optimizer.perturb()
            if compiled:
                schedule.refresh()  # compiled code does not see that weights were written to
            elif step % 2:
                assert not schedule.step(skipped=True)
            backward(step)
        optimizer.step()
        optimizer.zero_grad()
        assert schedule.step()
    assert schedule.applied_steps == STEPS
    return losses + [weight.detach() for weight in model.parameters()]


def assert_equal(ours: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(ours, expected, strict=True):
        assert other.isfinite().all()
        assert_bit_equal(one, other)


@PACKS
@DTYPES
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_is_that_of_weights_masked_by_hand(kind: str, dtype: torch.dtype, pack: Pack) -> None:
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step
        expected, moved = by_hand(OPTIMIZERS[kind], dtype)
        assert_equal(trained(OPTIMIZERS[kind], dtype, pack), expected)
    assert (moved > 0) == (kind == "SAM")


def test_compiled_sam_sees_perturbed_weights_after_a_refresh() -> None:
    expected, _ = by_hand(OPTIMIZERS["SAM"], torch.bfloat16)
    assert_equal(trained(OPTIMIZERS["SAM"], torch.bfloat16, "per_step", compiled=True), expected)


@PACKS
@DTYPES
def test_an_average_computes_with_the_mask_of_its_own_weights_in_each_phase(dtype: torch.dtype, pack: Pack) -> None:
    model = network(dtype)
    schedule = SparseSchedule(model, PHASES, pack=pack)
    optimizer = torch.optim.SGD(model.parameters(), lr=4.0)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    schedule.follow(average)
    differ = 0
    for step in range(STEPS):
        x = batch(step, dtype)
        loss_of(model(x), x).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        weights = [weight.detach() for weight in average.parameters()]
        if SPARSE[step]:
            masks = masks_of(weights)
            differ += sum(
                not torch.equal(*pair) for pair in zip(masks, masks_of(list(model.parameters())), strict=True)
            )
            weights = [torch.where(mask, weight, 0) for mask, weight in zip(masks, weights, strict=True)]
        assert_bit_equal(average(x).detach(), F.linear(F.linear(x, weights[0]), weights[1]))
        schedule.step()
    assert differ
