"""Plain tensors skip the dispatcher; everything that a mode, a transform or autograd must see does not."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from semisparse import ops
from semisparse.ops import register
from semisparse.ops.register import CUDA_SIDE
from semisparse.ops.register import register as registered

DIRECT: list[str] = []


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def _on_the_gpu(matrix, other=None, factor=2.0):
    DIRECT.append("test_doubled")
    return matrix * factor


register.CUDA_SIDE = "python"  # the shortcut is Python's; where C++ implements hot ops, none has it


@registered(
    "test_doubled(Tensor matrix, Tensor? other=None, float factor=2.0) -> Tensor",
    fake=lambda matrix, other=None, factor=2.0: torch.empty_like(matrix),
    cuda=_on_the_gpu,
    hot=True,
)
def doubled(matrix, other=None, factor=2.0):
    """An op of this test."""
    return matrix * factor


register.CUDA_SIDE = CUDA_SIDE


@pytest.fixture
def direct_calls(monkeypatch):
    """Names of the ops that were called directly; the CPU plays the part of the GPU."""
    monkeypatch.setattr(register, "_EAGER_DEVICE", "cpu")
    DIRECT.clear()
    return DIRECT


def call_all():
    matrix = torch.ones(4, 4)
    assert torch.equal(doubled(matrix), matrix * 2)
    assert torch.equal(doubled(matrix, None, 3.0), matrix * 3)
    assert torch.equal(doubled(matrix, matrix), matrix * 2)


def test_plain_tensors_go_directly(direct_calls):
    call_all()
    assert direct_calls == ["test_doubled"] * 3


def test_keywords_go_through_the_dispatcher(direct_calls):
    assert torch.equal(doubled(torch.ones(2), factor=3.0), torch.full((2,), 3.0))
    assert direct_calls == []


@pytest.mark.parametrize(
    "name",
    [
        "pack",
        "pack_transpose",
        "pack_tokens",
        "unpack",
        "packed_matmul",
        "pack_linear",
        "packed_tokens_matmul",
        "packed_tokens_grad_weight",
        "sampled_grad_weight",
    ],
)
def test_the_ops_of_a_training_step_have_the_shortcut_or_an_implementation_in_cpp(name):
    natively = hasattr(torch.ops.semisparse, f"{name}_in_python")
    assert natively is (CUDA_SIDE == "native")
    assert natively or getattr(ops, name).__code__.co_name == "call"


def test_other_devices_go_through_the_dispatcher(direct_calls, monkeypatch):
    monkeypatch.setattr(register, "_EAGER_DEVICE", "cuda")
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
        doubled(make())
    assert bool(direct_calls) is direct


def test_transforms_and_compilers_see_every_op(direct_calls):
    weight = torch.randn(16, 16)

    def total(scale):
        return doubled(weight).sum() * scale

    torch.func.grad(lambda scale: total(scale))(torch.tensor(2.0))
    assert direct_calls == []
    compiled = torch.compile(lambda matrix: doubled(matrix), backend="eager", fullgraph=True)
    compiled(weight)
    assert direct_calls == []
