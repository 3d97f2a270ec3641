"""On a GPU: both gradients of a shared operand, what check() sees, bypassed layers, skipped steps, packings."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semisparse import SparseConfig, SparseSchedule, check, ops, reuse_packed, sparsify
from semisparse.errors import ScheduleError
from semisparse.functional import semi_sparse_activation_linear, semi_sparse_linear
from semisparse.testing import assert_bit_equal
from tests.support import config_of

pytestmark = [
    pytest.mark.gpu,
    # torch's own, of cuBLAS on the autograd thread, and of torch.compile where a block's input is not a leaf
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

N = 128
BF16 = torch.bfloat16


def randn(*size: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("function", [semi_sparse_linear, semi_sparse_activation_linear], ids=["weight", "activation"])
@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
def test_one_tensor_as_both_operands_gets_both_gradients_compiled(function, backend: str, dtype: torch.dtype) -> None:
    grads = []
    torch._dynamo.reset()
    for call in (lambda x: function(x, x, x[0]), torch.compile(lambda x: function(x, x, x[0]), backend=backend)):
        x = randn(N, N, dtype=dtype).requires_grad_()
        call(x).backward(randn(N, N, dtype=dtype, seed=1))
        grads.append(x.grad.float())
    eager, compiled = grads
    assert (eager - compiled).norm() <= 2 * torch.finfo(dtype).eps * eager.norm()


def test_one_tensor_as_both_operands_from_a_graph() -> None:
    x, grad = randn(N, N).requires_grad_(), randn(N, N, seed=1)
    expected = torch.autograd.grad(semi_sparse_linear(x, x), x, grad)[0]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(semi_sparse_linear(x, x), x, grad)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.autograd.grad(semi_sparse_linear(x, x), x, grad)[0]
    graph.replay()
    assert_bit_equal(captured, expected)


class Bypass(nn.Module):
    """`proj` is read through a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.proj, self.last = (nn.Linear(N, N) for _ in range(3))
        self.hidden = [self.proj]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.linear(self.first(x), self.hidden[0].weight))


def test_check_tells_kernel_and_algorithm_of_each_layer() -> None:
    model = Bypass().to("cuda", BF16)
    sparsify(model, SparseConfig(backend="cusparselt"))
    before = [p.detach().clone() for p in model.parameters()]
    report = check(model, randn(N, N).requires_grad_())
    rows = {row.name: row for row in report}
    for name in ("first", "last"):
        assert rows[name].forward.startswith("cuSPARSELt algorithm")
        assert rows[name].backward.startswith("cuSPARSELt algorithm")
    assert report.problems == {"proj": "never called: something else reads its weight"}
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    fp32 = nn.Sequential(nn.Linear(N, N, device="cuda"))
    sparsify(fp32)
    assert "need fp16 or bf16" in str(check(fp32, torch.randn(8, N, device="cuda")))


@pytest.mark.parametrize("how", ["eager", "inductor", "blocks"])
@pytest.mark.parametrize("operand", ["weight", "activation"])
def test_bypassed_layers_stop_the_first_step_and_called_ones_do_not(how: str, operand: str) -> None:
    for bypassed in (True, False):
        model = Bypass().to("cuda", BF16)
        if not bypassed:
            model.forward = lambda x, model=model: model.last(model.proj(model.first(x)))
        sparsify(model, config_of(operand))
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        schedule = SparseSchedule.sparse_then_dense(model, 10)
        torch._dynamo.reset()
        call = torch.compile(model) if how == "inductor" else model
        if how == "blocks":
            for layer in (model.first, model.proj, model.last):
                layer.compile()
        call(randn(N, N)).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if bypassed and (how == "eager" or operand == "weight"):
            with pytest.raises(ScheduleError, match="proj: swapped, but not called"):
                schedule.step()
        else:  # compiled code with a pruned activation leaves no evidence, and so no alarm
            assert schedule.step()


@pytest.mark.parametrize("fused", [True, False])
def test_skipped_steps_with_a_floor_on_the_scale(fused: bool) -> None:
    model = nn.Sequential(nn.Linear(N, N, device="cuda"))
    sparsify(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    scaler, schedule = torch.amp.GradScaler("cuda", init_scale=2.0), SparseSchedule.sparse_then_dense(model, 10)
    pattern, counted = [False, True, False, False, True], []
    for good in pattern:
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = model(torch.randn(N, N, device="cuda")).float().mean() * (1.0 if good else math.inf)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < 2:
            scaler.update(2.0)
        counted.append(schedule.step(scaler))
    assert counted == pattern


def test_a_packing_knows_its_dtype_and_its_mode() -> None:
    model, x = nn.Sequential(nn.Linear(N, N, device="cuda")), torch.randn(N, N, device="cuda")
    sparsify(model)
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.float16):
        expected = model(x)
    with torch.autocast("cuda", dtype=BF16), torch.inference_mode(), reuse_packed(model):
        model(x)
        with torch.autocast("cuda", dtype=torch.float16):
            with pytest.warns(UserWarning, match="packed again"):
                assert_bit_equal(model(x).clone(), expected)
            with reuse_packed(model):
                assert_bit_equal(model(x).clone(), expected)
    with torch.autocast("cuda", dtype=BF16), reuse_packed(model):
        model(x).sum().backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("operand", ["weight", "activation"])
def test_jagged_tensors_and_vmap(operand: str) -> None:
    model = nn.Sequential(nn.Linear(N, N)).to("cuda", BF16)
    sparsify(model, config_of(operand))
    parts = [randn(3, N, seed=1), randn(5, N, seed=2)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    assert_bit_equal(model(nested).values().detach(), model(torch.cat(parts)).detach())
    batch = randn(2, 8, N)
    ours = torch.func.vmap(model)(batch).detach()
    weight = model[0].pruned_weight()
    x = batch if operand == "weight" else torch.stack([ops.prune_tokens(member, BF16) for member in batch])
    expected = F.linear(x, weight, model[0].bias.detach())
    assert (ours.double() - expected.double()).norm() <= 2 * torch.finfo(BF16).eps * expected.double().norm()
