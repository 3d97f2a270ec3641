"""What happens to a layer besides training: copying, saving, moving, wrapping, functional calls."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from semisparse import SemiSparseActivationLinear, SemiSparseLinear, SparseConfig, densify, sparsify
from semisparse.errors import ConfigError, LayerRefusedError, ShapeError
from semisparse.nn import SemiSparseBase
from semisparse.testing import assert_bit_equal
from tests.support import LAYER_CLASSES, masked_dense, through_a_file

K, N = 16, 12
CLASSES = pytest.mark.parametrize("layer_class", LAYER_CLASSES, ids=lambda cls: cls.operand)


def model_of(layer_class: type[SemiSparseBase]) -> nn.Sequential:
    """Two layers: one with another than the default setting where there is one, one in a dense phase."""
    other = (
        SparseConfig(weight="row")
        if layer_class is SemiSparseLinear
        else SparseConfig(weight=None, activation="transposable")
    )
    model = nn.Sequential(layer_class(K, N, config=other), nn.ReLU(), layer_class(N, K, bias=False))
    model[2].sparse_enabled = False
    return model


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch_save": through_a_file,
    "deepcopy_through_fp64": lambda model: copy.deepcopy(model).to(torch.float64).to(torch.float32),
}


@CLASSES
@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES.keys())
def test_copies_compute_the_same_and_keep_settings_and_phase(layer_class: type, make_copy) -> None:
    model = model_of(layer_class)
    x = torch.randn(8, K)
    other = make_copy(model)
    assert_bit_equal(other(x), model(x))
    assert [type(layer) for layer in other] == [type(layer) for layer in model]
    assert other[0].sparse_config == model[0].sparse_config
    assert (other[0].sparse_enabled, other[2].sparse_enabled) == (True, False)
    with torch.no_grad():
        other[0].weight.zero_()
    assert model[0].weight.abs().sum() > 0


@CLASSES
def test_copies_of_a_swapped_layer_can_still_be_densified(layer_class: type) -> None:
    model = nn.Sequential(nn.Linear(K, N))
    sparsify(model, layer_class.sparse_config)
    other = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    densify(other)
    assert type(other[0]) is nn.Linear
    assert type(model[0]) is layer_class


@CLASSES
def test_the_state_dict_is_nn_linears_and_loads_strictly_both_ways(layer_class: type) -> None:
    sparse, dense = layer_class(K, N), nn.Linear(K, N)
    assert list(sparse.state_dict()) == list(dense.state_dict())
    assert not list(sparse.buffers())
    dense.load_state_dict(sparse.state_dict(), strict=True)
    assert_bit_equal(dense.weight, sparse.weight)
    dense.reset_parameters()
    sparse.load_state_dict(dense.state_dict(), strict=True)
    assert_bit_equal(sparse.weight, dense.weight)
    assert_bit_equal(sparse.bias, dense.bias)
    with pytest.raises(RuntimeError, match="bias"):
        layer_class(K, N, bias=False).load_state_dict(dense.state_dict(), strict=True)


@CLASSES
def test_a_saved_state_dict_loads_with_weights_only(layer_class: type, tmp_path) -> None:
    layer = layer_class(K, N)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    state = torch.load(tmp_path / "layer.pt", weights_only=True)
    other = layer_class(K, N)
    other.load_state_dict(state, strict=True)
    x = torch.randn(8, K)
    assert_bit_equal(other(x), layer(x))


@CLASSES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_moving_to_another_dtype(layer_class: type, dtype: torch.dtype) -> None:
    layer = layer_class(K, N).to(dtype)
    assert type(layer) is layer_class
    x, grad_output = torch.randn(8, K).to(dtype), torch.randn(8, N).to(dtype)
    expected = masked_dense(layer_class, x, layer.weight, layer.bias, grad_output)
    output = layer(x)
    output.backward(grad_output)
    assert_bit_equal(output, expected.output)
    assert layer.weight.grad.dtype == dtype
    assert_bit_equal(layer.weight.grad, expected.grad_weight)


@CLASSES
def test_half_float_and_share_memory(layer_class: type) -> None:
    layer = layer_class(K, N)
    assert layer.half().weight.dtype == torch.float16
    assert layer.float().share_memory().weight.is_shared()
    assert layer(torch.randn(3, K)).shape == (3, N)


@CLASSES
def test_a_layer_made_on_the_meta_device_computes_shapes_and_materialises(layer_class: type) -> None:
    layer = layer_class(K, N, device="meta")
    output = layer(torch.empty(2, 5, K, device="meta"))
    assert (output.shape, output.device.type) == ((2, 5, N), "meta")
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    x, grad_output = torch.randn(8, K), torch.randn(8, N)
    expected = masked_dense(layer_class, x, layer.weight, layer.bias, grad_output)
    assert_bit_equal(layer(x), expected.output)


@CLASSES
def test_a_model_swapped_on_the_meta_device_materialises(layer_class: type) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K))
    report = sparsify(model, layer_class.sparse_config)
    assert report.swapped == ("0", "2")
    assert model(torch.empty(8, K, device="meta")).shape == (8, K)
    model.to_empty(device="cpu")
    source = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K))
    model.load_state_dict(source.state_dict(), strict=True)
    x = torch.randn(8, K)
    hidden = masked_dense(layer_class, x, source[0].weight, source[0].bias, torch.randn(8, N)).output.relu()
    expected = masked_dense(layer_class, hidden, source[2].weight, source[2].bias, torch.randn(8, K)).output
    assert_bit_equal(model(x), expected)


@CLASSES
def test_hooks_of_every_kind_survive_the_swap_and_fire(layer_class: type) -> None:
    linear = nn.Linear(K, N)
    fired: list[str] = []

    def note(name: str, *_: object) -> None:
        fired.append(name)

    linear.register_forward_pre_hook(partial(note, "forward_pre"))
    linear.register_forward_hook(partial(note, "forward"))
    linear.register_full_backward_hook(partial(note, "backward"))
    linear.weight.register_hook(partial(note, "weight"))
    linear.register_state_dict_pre_hook(partial(note, "state_dict"))
    layer = layer_class.from_dense(linear)
    layer(torch.randn(8, K, requires_grad=True)).sum().backward()
    layer.state_dict()
    assert set(fired) == {"forward_pre", "forward", "backward", "weight", "state_dict"}


@CLASSES
def test_functional_call_and_func_grad_agree_with_autograd(layer_class: type) -> None:
    layer = layer_class(K, N)
    x = torch.randn(8, K)
    parameters = {name: torch.randn_like(value) for name, value in layer.named_parameters()}
    grad_output = torch.randn(8, N)
    expected = masked_dense(layer_class, x, parameters["weight"], parameters["bias"], grad_output)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return (functional_call(layer, parameters, (x,)) * grad_output).sum()

    grads = grad(loss)(parameters)
    assert_bit_equal(functional_call(layer, parameters, (x,)), expected.output)
    assert_bit_equal(grads["weight"], expected.grad_weight)
    assert_bit_equal(grads["bias"], expected.grad_bias)


@CLASSES
def test_vmap_over_what_is_pruned_prunes_each_member_by_itself(layer_class: type) -> None:
    layer = layer_class(K, N)
    if layer_class is SemiSparseLinear:
        weights, x = {"weight": torch.randn(3, N, K), "bias": torch.randn(3, N)}, torch.randn(8, K)
        ours = vmap(partial(functional_call, layer), in_dims=(0, None))(weights, (x,))
        each = [functional_call(layer, {name: w[i] for name, w in weights.items()}, (x,)) for i in range(3)]
    else:
        x = torch.randn(3, 7, K)
        ours, each = vmap(layer)(x), [layer(member) for member in x]
    torch.testing.assert_close(ours, torch.stack(each))


@CLASSES
@pytest.mark.parametrize(("k", "n"), [(10, 8), (8, 10), (6, 6), (1, 4)])
def test_sizes_that_are_not_multiples_of_four_are_refused(layer_class: type, k: int, n: int) -> None:
    with pytest.raises(ShapeError, match=rf"in_features={k} and out_features={n}.*use nn\.Linear"):
        layer_class(k, n)


@CLASSES
def test_a_config_of_the_other_operand_is_refused_and_changes_nothing(layer_class: type) -> None:
    other = SemiSparseActivationLinear if layer_class is SemiSparseLinear else SemiSparseLinear
    with pytest.raises(ConfigError, match="does not fit"):
        layer_class(K, N, config=other.sparse_config)
    linear = nn.Linear(K, N)
    with pytest.raises(ConfigError, match="does not fit"):
        layer_class.from_dense(linear, other.sparse_config)
    assert type(linear) is nn.Linear
    assert set(vars(linear)) == set(vars(nn.Linear(K, N)))


@CLASSES
@pytest.mark.parametrize("wrong", [nn.Conv1d(4, 4, 1), nn.Identity(), None, "linear"], ids=lambda x: type(x).__name__)
def test_only_linears_can_be_turned_and_only_semi_sparse_layers_turned_back(layer_class: type, wrong: object) -> None:
    with pytest.raises(LayerRefusedError, match=type(wrong).__name__):
        layer_class.from_dense(wrong)
    with pytest.raises(LayerRefusedError, match=type(wrong).__name__):
        layer_class.to_dense(wrong)
    with pytest.raises(LayerRefusedError, match="Linear"):
        layer_class.to_dense(nn.Linear(4, 4))


@CLASSES
def test_from_dense_and_to_dense_leave_no_trace(layer_class: type) -> None:
    linear = nn.Linear(K, N)
    before, weight, bias = dict(vars(linear)), linear.weight, linear.bias
    layer = layer_class.from_dense(linear, layer_class.sparse_config)
    assert layer is linear
    layer.sparse_enabled = False
    assert layer_class.to_dense(layer) is linear
    assert type(linear) is nn.Linear
    assert set(vars(linear)) == set(before)
    assert linear.weight is weight
    assert linear.bias is bias


def test_the_two_classes_keep_their_settings_apart() -> None:
    assert SemiSparseLinear(K, N).sparse_config == SparseConfig()
    assert SemiSparseActivationLinear(K, N).sparse_config == SparseConfig(weight=None, activation="transposable")
    assert SemiSparseLinear(K, N, config=SparseConfig(weight="row")).sparse_config.weight == "row"
    assert SemiSparseLinear.sparse_config.weight == "transposable"


def test_the_base_class_alone_is_no_layer() -> None:
    with pytest.raises(NotImplementedError):
        SemiSparseBase.pruned_weight(SemiSparseLinear(K, N))


@pytest.mark.parametrize("config", ["row", {"weight": "row"}])
def test_what_is_not_a_config_is_named(config: object) -> None:
    for call in (
        lambda: SemiSparseLinear(K, N, config=config),  # type: ignore[arg-type]
        lambda: SemiSparseLinear.from_dense(nn.Linear(K, N), config),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError, match="is not a SparseConfig"):
            call()
