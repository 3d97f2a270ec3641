"""Plain tensors skip the dispatcher; everything that a mode, a transform or autograd must see does not."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from semisparse import cpu_ops, ops

BF16 = torch.bfloat16


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


@pytest.fixture
def direct_calls(monkeypatch):
    """Names of the ops that were called directly; the CPU plays the part of the GPU."""
    calls = []

    def named(name):
        def call(*args):
            calls.append(name)
            return getattr(cpu_ops, name)(*args)

        return call

    names = ("pack", "pack_tokens", "packed_linear", "packed_tokens_linear", "packed_tokens_grad_weight")
    monkeypatch.setattr(ops, "_DIRECT_DEVICE", "cpu")
    monkeypatch.setattr(ops, "_cuda", lambda: SimpleNamespace(**{name: named(name) for name in names}))
    return calls


def call_all():
    weight, x = torch.randn(32, 16, dtype=BF16), torch.randn(5, 16, dtype=BF16)
    packed, _ = ops.pack(weight, BF16, "transposable")
    ops.packed_linear(x, packed, None, 32, "auto")
    packed_x, packed_xt = ops.pack_tokens(x, BF16)
    ops.packed_tokens_linear(packed_x, weight, weight[:, 0].contiguous(), 5, "auto")
    ops.packed_tokens_grad_weight(packed_xt, torch.randn(5, 32, dtype=BF16), 16, "auto")


def test_plain_tensors_go_directly(direct_calls):
    call_all()
    assert direct_calls == [
        "pack",
        "packed_linear",
        "pack_tokens",
        "packed_tokens_linear",
        "packed_tokens_grad_weight",
    ]


def test_other_devices_go_through_the_dispatcher(direct_calls, monkeypatch):
    monkeypatch.setattr(ops, "_DIRECT_DEVICE", "cuda")
    call_all()
    assert direct_calls == []


def test_a_dispatch_mode_sees_every_op(direct_calls):
    with Watching():
        call_all()
    assert direct_calls == []


@pytest.mark.parametrize(
    ("make", "mode", "direct"),
    [
        (lambda: torch.nn.Parameter(torch.randn(16, 16), requires_grad=False), nullcontext(), True),
        (lambda: torch.nn.Parameter(torch.randn(16, 16)), torch.no_grad(), True),
        (lambda: torch.nn.Parameter(torch.randn(16, 16)), nullcontext(), False),
        (lambda: torch.randn(16, 16).as_subclass(Subclass), nullcontext(), False),
    ],
    ids=["parameter", "no_grad", "needs_grad", "subclass"],
)
def test_what_autograd_or_a_subclass_must_see_is_dispatched(direct_calls, make, mode, direct):
    with mode:
        ops.pack(make(), BF16, "transposable")
    assert bool(direct_calls) is direct


def test_transforms_and_compilers_see_every_op(direct_calls):
    weight = torch.randn(16, 16)

    def total(scale):
        return ops.pack(weight, BF16, "transposable")[0].sum() * scale

    torch.func.grad(lambda scale: total(scale))(torch.tensor(2.0))
    assert direct_calls == []
    compiled = torch.compile(lambda matrix: ops.pack(matrix, BF16, "transposable"), backend="eager", fullgraph=True)
    compiled(weight)
    assert direct_calls == []
