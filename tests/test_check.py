"""semisparse.check: what really ran, and nothing changed by looking."""

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import semisparse
from semisparse import SparseConfig, SparseSchedule, check, routes, sparsify
from semisparse.errors import ConfigError, NoLayerMatchedError, ShapeError


class Model(nn.Module):
    """One layer of each kind of use, buffers that move, and randomness."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.bypassed = nn.Linear(16, 16), nn.Linear(16, 16)
        self.unused, self.cut, self.frozen = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.frozen.requires_grad_(False)
        self.hidden = [self.bypassed]
        self.norm, self.dropout = nn.BatchNorm1d(16), nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.seen = self.seen + 1  # another tensor
        x = self.called(self.called(x)) + random.random() + np.random.random()
        x = F.linear(x, self.hidden[0].weight) + self.cut(x).detach()
        return {"out": self.dropout(self.norm(self.frozen(x))), "count": torch.tensor(3)}


def model() -> Model:
    torch.manual_seed(0)
    net = Model()
    sparsify(net)
    return net


X = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))


def test_each_row_says_what_the_layer_did() -> None:
    report = check(model(), X)
    rows = {row.name: row for row in report}
    assert {name: row.calls for name, row in rows.items()} == {
        "called": 2,
        "bypassed": 0,
        "unused": 0,
        "cut": 1,
        "frozen": 1,
    }
    assert report.problems == {
        "bypassed": "never called: something else reads its weight",
        "unused": "never called",
        "cut": "its weight got no gradient",
    }
    assert not report.ok
    assert rows["called"].forward == "masked dense: the weight is on cpu, and sparse products need CUDA"
    assert (rows["called"].gradient, rows["frozen"].gradient, rows["cut"].gradient) == (True, None, False)
    text = str(report)
    assert text.splitlines()[-1] == "2 of 5 semi-sparse layers do what they say"
    assert all(name in text for name in rows)


def state(net: nn.Module) -> list:
    return [
        [(name, id(value), value._version) for name, value in net.named_parameters()],
        [(name, id(value)) for name, value in net.named_buffers()],
        [module.training for module in net.modules()],
        [None if p.grad is None else id(p.grad) for p in net.parameters()],
        random.getstate(),
        str(np.random.get_state()),
        torch.get_rng_state().tolist(),
        [getattr(module, "_called", None) for module in net.modules()],
    ]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("gradients", [True, False])
def test_everything_is_as_before(mode: str, gradients: bool) -> None:
    net = getattr(model(), mode)()
    x = X.clone().requires_grad_()
    if gradients:
        net(x)["out"].sum().backward()
    before, values, grad = state(net), copy.deepcopy(net.state_dict()), x.grad
    check(net, x)
    assert state(net) == before
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in values.items())
    assert x.grad is grad


def test_everything_is_as_before_after_an_error() -> None:
    net, wrong = model(), torch.randn(8, 3)
    before = state(net)
    with pytest.raises(ShapeError):
        check(net, wrong)
    assert state(net) == before
    assert not net.called._forward_hooks
    assert not net.called._forward_pre_hooks


def test_a_forward_that_writes_into_parameters_is_undone() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.book = nn.Linear(16, 16), nn.Parameter(torch.zeros(4), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            self.book.data += 1
            self.layer.weight.data *= 1.5
            return self.layer(x)

    net = Writes()
    sparsify(net)
    values = copy.deepcopy(net.state_dict())
    check(net, X)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in values.items())


def test_the_packed_route_and_a_dense_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).bfloat16()
    sparsify(net, SparseConfig(backend="dense"), select="0")
    sparsify(net, select="1")
    net[1].sparse_enabled = False
    assert [row.forward for row in check(net, X.bfloat16())] == [
        "masked dense: backend='dense' asks for it",
        "dense (dense phase)",
    ]
    net[1].sparse_enabled = True
    monkeypatch.setattr(routes, "packs", lambda weight, dtype, backend: backend != "dense")
    monkeypatch.setattr("semisparse._check.why_masked_dense", lambda weight, dtype, backend: "")
    assert check(net, X.bfloat16()).rows[1].forward == "packed"


def test_products_are_told_to_the_layer_that_ran_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the ops tell dispatch's observers; here a substitute of the op does."""
    from semisparse import ops
    from semisparse.gemm import dispatch, problem
    from semisparse.gemm.autotune.algorithm import Choice

    net = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16)).bfloat16()
    sparsify(net)
    monkeypatch.setattr(routes, "packs", lambda weight, dtype, backend: True)
    forward, backward = ops.pack_linear, ops.packed_matmul

    def tell(x: Tensor, out_features: int, bias: Tensor | None) -> None:
        asked = problem.forward(x.shape[0], out_features, x.shape[1], x.dtype, bias is not None)
        dispatch.tell(asked, out_features, Choice(out_features, out_features, 1.0, 2.0, "tuned"))

    def pack_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        tell(x, weight.shape[0], bias)
        return forward(x, weight, bias, *rest)

    def packed_matmul(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, backend: str) -> Tensor:
        tell(x, out_features, bias)
        return backward(x, packed, bias, out_features, backend)

    monkeypatch.setattr(ops, "pack_linear", pack_linear)
    monkeypatch.setattr(ops, "packed_matmul", packed_matmul)
    rows = check(net, X.bfloat16().requires_grad_()).rows
    assert [(row.forward, row.backward) for row in rows] == [
        ("cuSPARSELt algorithm 32 (tuned)", "cuSPARSELt algorithm 16 (tuned)"),
        ("cuSPARSELt algorithm 16 (tuned)", "cuSPARSELt algorithm 32 (tuned)"),
    ]
    assert check(net, X.bfloat16()).rows[0].backward == "dense: no gradient with a 2:4 operand"  # none for the input
    assert not dispatch._observers


def test_products_in_chunks_say_so() -> None:
    from semisparse._check import _Probe
    from semisparse.gemm import problem
    from semisparse.gemm.autotune.algorithm import Choice

    choice = Choice(4, 4, 5.0, 20.0, "disk", chunk=16, whole_us=9.5)
    probe = _Probe({})
    probe._now = ("0", "forward")
    for tokens in (40, 16):
        probe._saw(problem.forward(tokens, 32, 16, torch.bfloat16), 4, choice)
    assert probe._products[probe._now] == [
        "cuSPARSELt algorithm 4 in chunks of 16 tokens, 1.90x faster than whole (disk)",
        "cuSPARSELt algorithm 4 (disk)",
    ]


def test_outputs_of_any_shape_and_a_loss() -> None:
    net = nn.Sequential(nn.Linear(16, 16))
    sparsify(net)
    assert check(net, X, loss=lambda y: y.square().mean()).ok
    for wrong in (lambda y: y, lambda y: 3.0, lambda y: y.detach().sum()):
        with pytest.raises(ConfigError, match="loss returned"):
            check(net, X, loss=wrong)
    with pytest.raises(ConfigError, match="without a tensor that depends on a trainable parameter"):
        check(net.requires_grad_(False), X)
    with torch.no_grad():
        assert check(net.requires_grad_(True), X).ok
    with pytest.raises(NoLayerMatchedError, match="no semi-sparse layer to check"):
        check(nn.Linear(16, 16), X)


def test_keywords_and_compiled_models() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, *, x: Tensor) -> tuple[Tensor, ...]:
            return (self.layer(input=x),)

    net = Keywords()
    sparsify(net)
    assert check(net, x=X).ok
    compiled = torch.compile(net, backend="aot_eager")
    compiled(x=X)
    assert check(compiled, x=X).ok


def test_a_check_is_no_call_of_the_training() -> None:
    net = model()
    schedule = SparseSchedule.sparse_then_dense(net, 4)
    check(net, X)
    assert not net.called._called
    assert not any(schedule._layers.watch.saw(layer.weight) for layer in (net.called, net.cut))


def test_optimizers_in_backward_do_not_step() -> None:
    net = nn.Sequential(nn.Linear(16, 16))
    sparsify(net)
    optimizers = {p: torch.optim.AdamW([p]) for p in net.parameters()}

    def step(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    schedule = SparseSchedule.sparse_then_dense(net, 4)
    net(X).sum().backward()
    assert schedule.step()
    assert check(net, X).ok
    assert optimizers[net[0].weight].state[net[0].weight]["step"] == 1
    assert not schedule.step()
    net(X).sum().backward()
    assert optimizers[net[0].weight].state[net[0].weight]["step"] == 2


def test_the_name_is_public() -> None:
    assert semisparse.check is check
