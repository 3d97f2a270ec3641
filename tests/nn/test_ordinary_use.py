"""What users do with nn.Linear every day: keywords, nested tensors, transforms, autocast of the other kind."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jvp, vmap

from semisparse import SemiSparseActivationLinear, SemiSparseLinear, functional, ops, routes
from semisparse.errors import EngineError, TensorError
from semisparse.testing import assert_bit_equal
from tests.support import LAYER_CLASSES

CLASSES = pytest.mark.parametrize("layer_class", LAYER_CLASSES, ids=lambda cls: cls.operand)
X = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["packed", "masked dense"])
def route(request, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "packed":
        monkeypatch.setattr(routes, "packs", lambda weight, dtype, backend: dtype in (torch.float16, torch.bfloat16))
    return request.param


@CLASSES
@pytest.mark.parametrize("sparse", [True, False])
def test_the_argument_has_the_name_that_linear_gives_it(layer_class: type, sparse: bool) -> None:
    layer = layer_class(16, 16)
    layer.sparse_enabled = sparse
    assert_bit_equal(layer(input=X), layer(X))
    with pytest.raises(TypeError):
        nn.Linear(16, 16)(x=X)
    with pytest.raises(TypeError):
        layer(x=X)


def jagged(dtype: torch.dtype, *sizes: int) -> Tensor:
    parts = [X[:size].to(dtype) + number for number, size in enumerate(sizes)]
    return torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)


@CLASSES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(3, 5), (1, 8, 2), (4,)])
def test_jagged_tensors_are_their_rows(route: str, layer_class: type, dtype: torch.dtype, sizes: tuple) -> None:
    layer = layer_class(16, 32, dtype=dtype)
    nested = jagged(dtype, *sizes)
    out = layer(nested)
    assert out.is_nested
    assert [part.shape for part in out.unbind()] == [(size, 32) for size in sizes]
    rows = torch.cat([part.detach() for part in nested.unbind()]).requires_grad_()
    expected = layer(rows)
    assert_bit_equal(out.values().detach(), expected.detach())
    out.values().float().sum().backward()
    ours = layer.weight.grad.clone()
    layer.zero_grad()
    expected.float().sum().backward()
    assert_bit_equal(ours, layer.weight.grad)
    assert_bit_equal(nested.grad.values(), rows.grad)


@CLASSES
def test_jagged_tensors_compiled(layer_class: type) -> None:
    layer, nested = layer_class(16, 16), jagged(torch.float32, 3, 5)
    torch._dynamo.reset()
    out = torch.compile(layer, backend="aot_eager")(nested)
    assert_bit_equal(out.values().detach(), layer(nested).values().detach())


@CLASSES
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # torch says it once per process
def test_other_nested_tensors_are_refused(layer_class: type) -> None:
    strided = torch.nested.nested_tensor([X[:3], X[:5]])
    for nested in (strided, jagged(torch.float32, 3, 5).transpose(1, 2)):
        with pytest.raises(TensorError, match="nested tensor of another kind"):
            layer_class(16, 16)(nested)


@CLASSES
@pytest.mark.parametrize("tokens", [1, 4, 5, 7, 8])
@pytest.mark.parametrize(
    ("stored", "computed"),
    [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16), (torch.float32, torch.float16)],
)
def test_the_other_sixteen_bit_autocast(
    route: str, layer_class: type, tokens: int, stored: torch.dtype, computed: torch.dtype
) -> None:
    layer = layer_class(16, 16, dtype=stored)
    x = X[:tokens].to(stored).requires_grad_()
    with torch.autocast("cpu", dtype=computed):
        y = layer(x)
    assert y.dtype is computed
    pruned = ops.prune_tokens(x.detach(), computed) if layer_class is SemiSparseActivationLinear else x.to(computed)
    weight = layer.weight.to(computed) if layer_class is SemiSparseActivationLinear else layer.pruned_weight()
    assert_bit_equal(y, F.linear(pruned.detach(), weight.to(computed), layer.bias.to(computed)))
    y.float().sum().backward()
    assert x.grad.dtype is layer.weight.grad.dtype is stored


def assert_near(ours: Tensor, expected: Tensor) -> None:
    """Products that are summed in another order or rounded twice: a few roundings of the dtype apart, as a whole."""
    error = (ours.double() - expected.double()).norm()
    assert error <= 4 * torch.finfo(expected.dtype).eps * expected.double().norm()


def parameters(layer: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in layer.named_parameters()}


@CLASSES
def test_forward_mode_follows_the_straight_through_formula(route: str, layer_class: type) -> None:
    layer = layer_class(16, 16, dtype=torch.float32 if route == "masked dense" else torch.bfloat16)
    values, x = parameters(layer), X.to(layer.weight.dtype)
    tangents = {name: torch.ones_like(value) for name, value in values.items()}
    _, ours = jvp(lambda p, x: functional_call(layer, p, (x,)), (values, x), (tangents, torch.ones_like(x)))
    sparse_x = ops.prune_tokens(x, x.dtype) if layer_class is SemiSparseActivationLinear else x
    weight = layer.pruned_weight()
    expected = F.linear(torch.ones_like(x), weight) + F.linear(sparse_x, tangents["weight"], tangents["bias"])
    assert_near(ours, expected)


@CLASSES
def test_dual_numbers(layer_class: type) -> None:
    layer = layer_class(16, 16)
    with torch.autograd.forward_ad.dual_level():
        y = layer(torch.autograd.forward_ad.make_dual(X, torch.ones_like(X)))
        ours = torch.autograd.forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(ours, F.linear(torch.ones_like(X), layer.pruned_weight()))


@CLASSES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_per_sample(route: str, layer_class: type, dtype: torch.dtype) -> None:
    layer, samples = layer_class(16, 16, dtype=dtype), X.view(2, 4, 16).to(dtype)

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, values, (x,)).float().square().sum()

    ours = vmap(grad(loss), in_dims=(None, 0))(parameters(layer), samples)
    for number, sample in enumerate(samples):
        expected = grad(loss)(parameters(layer), sample)
        for name in expected:
            assert_near(ours[name][number], expected[name])


@CLASSES
def test_an_ensemble_is_its_members(layer_class: type) -> None:
    layers = [layer_class(16, 16) for _ in range(3)]
    values, _ = torch.func.stack_module_state(layers)
    ours = vmap(lambda p, x: functional_call(layers[0], p, (x,)), in_dims=(0, None))(values, X)
    torch.testing.assert_close(ours, torch.stack([layer(X) for layer in layers]))


@CLASSES
def test_a_jacobian(layer_class: type) -> None:
    layer = layer_class(8, 8, dtype=torch.float64)
    x = torch.randn(4, 8, dtype=torch.float64)
    forward, backward = jacfwd(layer)(x), torch.func.jacrev(layer)(x)
    torch.testing.assert_close(forward, backward)


@CLASSES
def test_an_engine_that_was_asked_for_says_that_it_cannot(monkeypatch: pytest.MonkeyPatch, layer_class: type) -> None:
    call = (
        functional.semi_sparse_linear if layer_class is SemiSparseLinear else functional.semi_sparse_activation_linear
    )
    weight = torch.randn(16, 16)
    with pytest.raises(EngineError, match="cannot run inside vmap"):
        vmap(lambda x: call(x, weight, backend="cusparselt"))(X.view(2, 4, 16))


def test_masked_gradients_of_torch_func_use_the_packed_ops_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "packs", lambda weight, dtype, backend: True)
    seen = []
    real = ops.packed_matmul
    monkeypatch.setattr(ops, "packed_matmul", lambda *args: seen.append(1) or real(*args))
    layer = SemiSparseLinear(16, 16, dtype=torch.bfloat16)
    grad(lambda p: functional_call(layer, p, (X.bfloat16(),)).float().sum())(parameters(layer))
    assert seen  # only vmap and forward mode have no rule for them


TRANSFORMS = {
    "grad": lambda call, w, x: grad(lambda w, x: call(w, x).square().sum())(w, x),
    "jvp": lambda call, w, x: jvp(call, (w, x), (torch.ones_like(w), torch.ones_like(x)))[1],
    "per sample": lambda call, w, x: vmap(grad(lambda w, x: call(w, x).square().sum()), (None, 0))(w, x[:, None]),
    "ensemble": lambda call, w, x: vmap(call, (0, None))(torch.stack([w, w + 1]), x),
    "jacfwd": lambda call, w, x: jacfwd(call, argnums=1)(w, x),
    "jacrev": lambda call, w, x: torch.func.jacrev(call)(w, x),
}


@CLASSES
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_transforms_give_the_gradients_of_eager_ones(layer_class: type, transform: str, backend: str) -> None:
    """torch.compile ignores an autograd.Function's backward there, and would give zeros without a word."""
    layer = layer_class(16, 16)

    def call(weight: Tensor, x: Tensor) -> Tensor:
        return functional_call(layer, {"weight": weight}, (x,))

    def transformed(weight: Tensor, x: Tensor) -> Tensor:
        return TRANSFORMS[transform](call, weight, x)

    weight = layer.weight.detach()
    torch._dynamo.reset()
    ours = torch.compile(transformed, backend=backend)(weight, X)
    expected = transformed(weight, X)
    assert expected.any()
    torch.testing.assert_close(ours, expected)
