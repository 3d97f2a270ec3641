"""Selective checkpointing, and LoRA on a sparse base: the computation with weights that are masked by hand."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from semisparse import SemiSparseLinear, SparseConfig, SparseSchedule, reuse_packed, sparsify
from semisparse.ops import sac_save_ops
from semisparse.testing import assert_bit_equal
from tests.functional.counting import CountOps
from tests.support import brute_mask

pytestmark = pytest.mark.usefixtures("packed_on_cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
SIZE, RANK, STEPS = 32, 8, 4
PACKINGS = ("pack", "pack_linear", "pack_transpose")
SELECTED = partial(create_selective_checkpoint_contexts, sac_save_ops())

Call = Callable[[nn.Module, Tensor], Tensor]
CALLS: dict[str, Call] = {
    "plain": lambda module, x: module(x),
    "checkpointed": lambda module, x: checkpoint(module, x, use_reentrant=False),
    "selectively checkpointed": lambda module, x: checkpoint(module, x, use_reentrant=False, context_fn=SELECTED),
}


def batch(step: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(16, SIZE, generator=torch.Generator().manual_seed(step)).to(dtype)


def loss_of(y: Tensor) -> Tensor:
    return (y.float() - 1).square().sum()


def masked(weight: Tensor) -> Tensor:
    return torch.where(brute_mask(weight), weight.detach(), 0)


PRODUCTS = {"plain": 2, "checkpointed": 4, "selectively checkpointed": 2}
"""Forward products of the two layers: both run again where nothing is saved."""


@DTYPES
@pytest.mark.parametrize("block", ["packs at each forward", "packs the transpose again", "packed before"])
@pytest.mark.parametrize("how", CALLS)
def test_checkpointed_regions_compute_the_same_and_selected_products_run_once(
    how: str, block: str, dtype: torch.dtype
) -> None:
    config = SparseConfig(repack=block == "packs the transpose again")
    first, last = (SemiSparseLinear(SIZE, SIZE, bias=False, dtype=dtype, config=config) for _ in range(2))
    model, x = nn.Sequential(first, nn.GELU(), last, nn.GELU()), batch(0, dtype).requires_grad_()
    leaves = [leaf.detach().requires_grad_() for leaf in (x, masked(first.weight), masked(last.weight))]
    expected = F.gelu(F.linear(F.gelu(F.linear(leaves[0], leaves[1])), leaves[2]))
    gradients = torch.autograd.grad(loss_of(expected), leaves)

    def run() -> None:
        with CountOps() as counter:
            output = CALLS[how](model, x)
            forward = counter.counts.copy()
            loss_of(output).backward()
        assert_bit_equal(output.detach(), expected.detach())
        for ours, other in zip((x.grad, first.weight.grad, last.weight.grad), gradients, strict=True):
            assert_bit_equal(ours, other)
        assert sum(forward[op] for op in PACKINGS) == (0 if block == "packed before" else 2)
        products = counter.counts["pack_linear"] + counter.counts["packed_matmul"]
        assert products == PRODUCTS[how] + 2  # and the gradients of the two inputs

    if block == "packed before":
        with reuse_packed(model):
            run()
    else:
        run()


class LoRA(nn.Module):
    """A frozen linear layer with a trained difference of low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(SIZE, SIZE).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(SIZE, RANK, bias=False), nn.Linear(RANK, SIZE, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_B(self.lora_A(x))


def adapters(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(LoRA() for _ in range(2))).to(dtype)
    assert sparsify(model).swapped == ("0.base", "1.base")
    return model


def trained_by_hand(dtype: torch.dtype) -> list[Tensor]:
    """Losses, then the adapters, with bases whose masks were applied once."""
    model = adapters(dtype)
    bases = [(masked(layer.base.weight), layer.base.bias) for layer in model]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    losses = []
    for step in range(STEPS):
        for part in range(2):
            y = batch(2 * step + part, dtype)
            for (weight, bias), layer in zip(bases, model, strict=True):
                y = F.linear(y, weight, bias) + F.linear(F.linear(y, layer.lora_A.weight), layer.lora_B.weight)
            loss = loss_of(y)
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return losses + [p.detach() for p in model.parameters() if p.requires_grad]


@DTYPES
@pytest.mark.parametrize("how", CALLS)
def test_lora_trains_on_a_sparse_base_that_is_packed_once(how: str, dtype: torch.dtype, launches: list[int]) -> None:
    model = adapters(dtype)
    schedule = SparseSchedule.sparse_then_dense(model, STEPS, 1.0, pack="per_step")
    schedule.trust_calls()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    losses = []
    for step in range(STEPS):
        for part in range(2):
            x = batch(2 * step + part, dtype).requires_grad_()  # whose gradient needs the base's transpose
            with CountOps() as counter:
                y = x
                for layer in model:
                    y = CALLS[how](layer, y)
                loss = loss_of(y)
                loss.backward()
            assert not {"prune", "tile_codes", *PACKINGS} & set(counter.counts)
            losses.append(loss.detach())
            assert not schedule.step()  # a micro-batch
        optimizer.step()
        optimizer.zero_grad()
        assert schedule.step()
    assert launches == [2]
    ours = losses + [p.detach() for p in model.parameters() if p.requires_grad]
    for one, other in zip(ours, trained_by_hand(dtype), strict=True):
        assert other.isfinite().all()
        assert_bit_equal(one, other)
