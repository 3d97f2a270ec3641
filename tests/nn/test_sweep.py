"""Random shapes, strides, dtypes and settings: errors within twice PyTorch's own, whole numbers bit for bit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from semisparse.testing import DTYPES, assert_as_good_as_torch, assert_bit_equal
from tests.support import LAYER_CLASSES, Result, make_layer, masked_dense

EXAMPLES = 300
# A result here can be a single value, and PyTorch's error in it zero by chance. Its error is therefore taken over the
# same problem with other random numbers as well, until there are so many values that luck no longer matters: among a
# thousand, the largest error varies by about a tenth, far less than the factor of two that ours is allowed.
SAMPLED_VALUES = 1000
SIZES = st.sampled_from([4, 8, 12, 16, 20, 28, 32, 36, 60, 64, 68])
LEADING = st.lists(st.integers(0, 5), max_size=3).map(tuple) | st.integers(0, 70).map(lambda m: (m,))
LAYOUTS = st.sampled_from(["contiguous", "transposed", "strided", "offset", "expanded"])


@dataclass(frozen=True)
class Case:
    """One drawn problem."""

    layer_class: type
    leading: tuple[int, ...]
    k: int
    n: int
    dtype: torch.dtype
    bias: bool
    layouts: tuple[str, str, str]
    seed: int


CASES = st.builds(Case, layer_class=st.sampled_from(LAYER_CLASSES), leading=LEADING, k=SIZES, n=SIZES,
                  dtype=st.sampled_from(DTYPES), bias=st.booleans(), layouts=st.tuples(LAYOUTS, LAYOUTS, LAYOUTS),
                  seed=st.integers(0, 2**31))  # fmt: skip


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same shape with another memory layout; "expanded" repeats the first row in all the others."""
    if tensor.dim() < 2 or tensor.numel() == 0 or layout == "contiguous":
        return tensor
    if layout == "transposed":
        return tensor.mT.contiguous().mT
    if layout == "strided":
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=-1)[..., 0]
    if layout == "offset":
        return torch.cat([tensor.flatten()[:3], tensor.flatten()])[3:].view(tensor.shape)
    return tensor[..., :1, :].expand(tensor.shape)


def operands(case: Case, *, whole: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    torch.manual_seed(case.seed)

    def draw(*shape: int) -> Tensor:
        return (torch.randint(-2, 3, shape) if whole else torch.randn(shape)).to(case.dtype)

    x, weight, grad = (
        laid_out(draw(*shape), layout)
        for shape, layout in zip(
            [(*case.leading, case.k), (case.n, case.k), (*case.leading, case.n)], case.layouts, strict=True
        )
    )
    return x, weight, draw(case.n) if case.bias else None, grad


def run(case: Case, x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor) -> Result:
    layer = make_layer(case.layer_class, weight, bias)
    layer.weight = torch.nn.Parameter(weight)
    assert layer.weight.stride() == weight.stride()
    leaf = x.detach().requires_grad_()
    output = layer(leaf)
    output.backward(grad)
    return Result(output.detach(), leaf.grad, layer.weight.grad, None if bias is None else layer.bias.grad)


def fp64_result(case: Case, x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor) -> Result:
    return masked_dense(
        case.layer_class, x.double(), weight.double(), None if bias is None else bias.double(), grad.double()
    )


def torch_and_truth(case: Case) -> tuple[Result, Result]:
    """The case by plain PyTorch in its dtype with its strides (which decide how it sums), and in fp64 without them."""
    parts = operands(case, whole=False)
    contiguous = [part if part is None else part.contiguous() for part in parts]
    return masked_dense(case.layer_class, *parts), fp64_result(case, *contiguous)


def samples(case: Case, place: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """PyTorch's result number place and the truth, for the case with other numbers; SAMPLED_VALUES values in all."""
    for further in range(1, SAMPLED_VALUES // max(1, size) + 1):
        same, exact = torch_and_truth(replace(case, seed=case.seed + further))
        yield same[place], exact[place]


@settings(max_examples=EXAMPLES)
@given(CASES)
def test_random_numbers_err_no_more_than_twice_as_much_as_torch(case: Case) -> None:
    ours = run(case, *operands(case, whole=False))
    for place, (result, plain, exact) in enumerate(zip(ours, *torch_and_truth(case), strict=True)):
        assert (result is None) == (exact is None)
        if result is None:
            continue
        if case.dtype == torch.float64:  # nothing here is more exact than fp64: judge by PyTorch's own fp64 bounds
            torch.testing.assert_close(result, exact)
        else:
            assert_as_good_as_torch(result, plain, exact, samples=samples(case, place, result.numel()))


@settings(max_examples=EXAMPLES)
@given(CASES)
def test_whole_numbers_give_the_same_bits_whatever_the_strides(case: Case) -> None:
    x, weight, bias, grad = operands(case, whole=True)
    ours = run(case, x, weight, bias, grad)
    for result, exact in zip(ours, fp64_result(case, x, weight, bias, grad), strict=True):
        assert (result is None) == (exact is None)
        if result is not None:
            assert_bit_equal(result + 0, exact.to(case.dtype) + 0)
