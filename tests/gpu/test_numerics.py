"""Both layers on the packed route against fp64, with plain PyTorch's own error as the yardstick."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from semisparse import SemiSparseActivationLinear, SemiSparseLinear, SparseConfig
from semisparse.reference import linear as reference
from semisparse.reference import masks
from semisparse.testing import assert_as_good_as_torch, assert_bit_equal, small_integers
from tests.support import config_of

# PyTorch's warning when a cuBLAS product is the first CUDA call of its autograd thread; seen once, in a tiny backward.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current")]

TOKENS = (0, 1, 7, 13, 200, 13008)
FEATURES = (  # (K, N): tiny, odd multiples of 16, no multiple of 64, and transformer sizes up to 14336
    (16, 16),
    (48, 80),
    (80, 48),
    (112, 272),
    (208, 16),
    (256, 1024),
    (1024, 4096),
    (4096, 1024),
    (1008, 336),
    (2048, 8192),
    (14336, 4096),
)
SHAPES = tuple(itertools.product(TOKENS, FEATURES))
UNALIGNED = ((13, (20, 36)), (200, (100, 48)), (7, (64, 52)))  # multiples of 4 only: masked dense, same masks
LAYERS = {"weight": SemiSparseLinear, "activation": SemiSparseActivationLinear}


@pytest.fixture(autouse=True)
def no_tuning(monkeypatch):
    monkeypatch.setenv("SEMISPARSE_TUNE", "0")  # algorithms are compared in tests/gemm; here every shape would tune


def test_there_are_at_least_sixty_shapes():
    assert len(SHAPES) + len(UNALIGNED) >= 60


def operands(tokens, features, dtype, bias, integers=False):
    in_features, out_features = features
    torch.manual_seed(tokens + in_features)
    shapes = {"x": (tokens, in_features), "weight": (out_features, in_features), "grad": (tokens, out_features)}
    if bias:
        shapes["bias"] = (out_features,)
    if integers:
        made = {name: small_integers(s, seed=len(name), dtype=dtype, device="cuda") for name, s in shapes.items()}
    else:
        made = {name: torch.randn(s, device="cuda", dtype=torch.float32).to(dtype) for name, s in shapes.items()}
    return made["x"], made["weight"], made.get("bias"), made["grad"]


def ours(operand, x, weight, bias, grad, backend="cusparselt"):
    config = config_of(operand, backend=backend)
    layer = LAYERS[operand](weight.shape[1], weight.shape[0], bias is not None, "cuda", weight.dtype, config=config)
    layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(grad)
    return [y.detach(), x.grad, layer.weight.grad] + ([] if bias is None else [layer.bias.grad])


def plain(operand, x, weight, bias, grad, dtype):
    """The same function by F.linear and autograd in dtype, with the reference's masks."""
    pruned_w = reference.prune(weight, masks.transposable(weight)) if operand == "weight" else weight
    pruned_x = reference.prune_tokens(x) if operand == "activation" else x
    leaves = [t.to(dtype).detach().requires_grad_() for t in (pruned_x, pruned_w)]
    leaves += [] if bias is None else [bias.to(dtype).detach().requires_grad_()]
    y = F.linear(*leaves)
    y.backward(grad.to(dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("operand", LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("tokens", "features"), SHAPES, ids=str)
def test_packed_route_errs_at_most_twice_as_much_as_torch(operand, dtype, tokens, features):
    given = operands(tokens, features, dtype, bias=(tokens + features[0]) % 32 != 0)
    expected = plain(operand, *given, dtype), plain(operand, *given, torch.float64)
    for result, same_dtype, exact in zip(ours(operand, *given), *expected, strict=True):
        assert_as_good_as_torch(result, same_dtype, exact)


@pytest.mark.parametrize("operand", LAYERS)
@pytest.mark.parametrize(("tokens", "features"), UNALIGNED, ids=str)
def test_sizes_that_are_not_multiples_of_16_run_masked_dense(operand, tokens, features):
    given = operands(tokens, features, torch.bfloat16, bias=True)
    for result, same_dtype, exact in zip(
        ours(operand, *given, backend="auto"),
        plain(operand, *given, torch.bfloat16),
        plain(operand, *given, torch.float64),
        strict=True,
    ):
        assert_as_good_as_torch(result, same_dtype, exact)


@pytest.mark.parametrize("operand", LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("tokens", "features"), [(13, (48, 80)), (200, (256, 1024)), (64, (1008, 336))], ids=str)
def test_small_integers_are_bit_equal(operand, dtype, tokens, features):
    given = operands(tokens, features, dtype, bias=True, integers=True)
    for result, exact in zip(ours(operand, *given), plain(operand, *given, torch.float64), strict=True):
        assert_bit_equal(result + 0.0, exact.to(dtype) + 0.0)  # a zero's sign depends on the order of summation


@pytest.mark.parametrize("operand", LAYERS)
def test_strides_do_not_change_a_bit(operand):
    x, weight, bias, grad = operands(200, (256, 1024), torch.bfloat16, bias=True)
    contiguous = ours(operand, x, weight, bias, grad)
    strided_x = torch.empty(256, 400, device="cuda", dtype=x.dtype).mT[::2]
    strided_x.copy_(x)
    strided_grad = torch.empty(1024, 200, device="cuda", dtype=x.dtype).mT
    strided_grad.copy_(grad)
    for result, expected in zip(ours(operand, strided_x, weight, bias, strided_grad), contiguous, strict=True):
        assert_bit_equal(result, expected)


@pytest.mark.parametrize("fill", [-0.0, float("inf"), float("nan")], ids=str)
def test_what_stands_in_pruned_slots_does_not_matter(fill):
    """A tile with two non-finite weights a row keeps them; others elsewhere must not leak. -0.0 must pack like +0.0."""
    x, weight, bias, grad = operands(64, (64, 128), torch.bfloat16, bias=True)
    mask = masks.transposable(weight)
    base = ours("weight", x, torch.where(mask, weight, 0.0), bias, grad)[:2]
    if fill == 0:
        filled = torch.where(mask, weight, fill)
        for result, expected in zip(ours("weight", x, filled, bias, grad)[:2], base, strict=True):
            assert_bit_equal(result, expected)
        return
    weight[:4, :4] = fill  # 16 non-finite entries: exactly 8 are kept, 8 are pruned and must vanish
    kept = reference.prune(weight, masks.transposable(weight))
    y = ours("weight", x, weight, bias, grad)[0]
    assert y[:, 4:].isfinite().all() and not y[:, :4].isfinite().any()
    assert (kept[:4, :4] == 0).sum() == 8


def test_masks_are_the_cpu_masks_bit_for_bit():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        weight = torch.randn(336, 1008, device="cuda").to(dtype)
        for mask in ("transposable", "row"):
            on_gpu = torch.ops.semisparse.prune(weight, dtype, mask)
            assert_bit_equal(on_gpu.cpu(), torch.ops.semisparse.prune(weight.cpu(), dtype, mask))


def test_autocast_chooses_the_mask_from_the_fp32_master_weight():
    layer = SemiSparseLinear(256, 512, bias=False, device="cuda", config=SparseConfig(backend="cusparselt"))
    with torch.no_grad():  # bf16 would round these to ties; fp32 tells them apart
        layer.weight.copy_(1 + torch.rand_like(layer.weight) * 1e-4)
    x = torch.eye(256, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    assert torch.equal((y.mT != 0), masks.transposable(layer.weight))
    assert layer.weight.grad.dtype == torch.float32
