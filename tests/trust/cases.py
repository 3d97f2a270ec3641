"""The kinds of layers that are looked at, their operands on any device, and one step of them without side effects."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from semisparse.config import SparseConfig
from semisparse.errors import TokenMixingWarning
from semisparse.nn import SemiSparseActivationLinear, SemiSparseLinear
from semisparse.routes import why_not_fp8
from semisparse.selfcheck.operands import SEED
from tests.trust.machine import Machine

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """A kind of layer.

    Attributes:
        name: In reports.
        dtype: Of parameters and inputs.
        config: Its settings.
        unaligned: Whether its sizes are none that its precision can take.
    """

    name: str
    dtype: torch.dtype
    config: SparseConfig
    unaligned: bool = False

    @property
    def fp8(self) -> bool:
        """Whether it computes in fp8."""
        return self.config.precision is not None

    @property
    def sampled(self) -> bool:
        """Whether dW is of a sampled gradient."""
        return self.config.grad_output is not None

    @property
    def multiple(self) -> int:
        """What N and K must be multiples of for sparse products."""
        return 32 if self.fp8 else 16

    @property
    def computed(self) -> "Case":
        """What its results are those of: a layer in fp8 that fp8 cannot take computes in its own dtype."""
        return replace(self, config=replace(self.config, precision=None)) if self.unaligned else self


CASES = {
    case.name: case
    for case in (
        Case("2:4, bf16", BF16, SparseConfig()),
        Case("2:4, fp16", FP16, SparseConfig()),
        Case("2:4, mask row, bf16", BF16, SparseConfig(weight="row")),
        Case("2:4 activation, bf16", BF16, SparseConfig(weight=None, activation="transposable")),
        Case("2:4 + mvue, bf16", BF16, SparseConfig(grad_output="mvue")),
        Case("fp8 + 2:4", BF16, SparseConfig(precision="fp8")),
        Case("fp8 + 2:4, mask row", BF16, SparseConfig(weight="row", precision="fp8")),
        Case("fp8 + 2:4 + mvue", BF16, SparseConfig(precision="fp8", grad_output="mvue")),
    )
}

FALLING_BACK = {
    case.name: case
    for case in (
        Case("2:4, fp32", FP32, SparseConfig()),
        Case("fp8 + 2:4, unaligned", BF16, SparseConfig(precision="fp8"), unaligned=True),
    )
}
"""Those that are computed in another way than they would be in 16 bits or at aligned sizes."""


def cases(machine: Machine, names: Sequence[str] = tuple(CASES)) -> list[Case]:
    """Those that this machine can run, with sparse products that may not fall back where there are any."""
    given = [(CASES | FALLING_BACK)[name] for name in names]
    if why_not_fp8(torch.empty(32, 32, device=machine.device), BF16):
        given = [case for case in given if not case.fp8]
    return [
        case if case.name in FALLING_BACK else replace(case, config=replace(case.config, backend=machine.backend))
        for case in given
    ]


def make_layer(
    machine: Machine, case: Case, k: int, n: int, bias: bool = True, backend: str | None = None
) -> nn.Linear:
    """A layer of a case, N x K, that draws from a fixed seed where it samples.

    Args:
        machine: Where.
        case: What.
        k: in_features.
        n: out_features.
        bias: Whether it has one.
        backend: Instead of the case's.
    """
    config = case.config if backend is None else replace(case.config, backend=backend)
    kind = SemiSparseLinear if config.operand == "weight" else SemiSparseActivationLinear
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TokenMixingWarning)  # nothing is trained here
        layer = kind(k, n, bias, device=machine.device, dtype=case.dtype, config=config)
    if case.sampled:
        layer.held_seed = torch.tensor(SEED, device=machine.device)  # as a schedule sets it
    return layer


def normal(machine: Machine, *shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers, drawn on the device: large ones are made quickly there."""
    generator = torch.Generator(machine.device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=machine.device).to(dtype)


def whole(machine: Machine, *shape: int, seed: int, dtype: torch.dtype, limit: int = 2) -> Tensor:
    """Whole numbers from -limit to limit, drawn on the device."""
    generator = torch.Generator(machine.device).manual_seed(seed)
    return torch.randint(-limit, limit + 1, shape, generator=generator, device=machine.device).to(dtype)


def fill(machine: Machine, module: nn.Module, integers: bool, seed: int = 1) -> None:
    """Give all parameters numbers that depend on the seed alone.

    Args:
        machine: Where.
        module: Whose parameters.
        integers: Whole numbers from -2 to 2; else normal ones, divided by the root of in_features.
        seed: Of the first.
    """
    with torch.no_grad():
        for at, one in enumerate(module.parameters(), seed):
            shape = tuple(one.shape)
            if integers:
                one.copy_(whole(machine, *shape, seed=at, dtype=one.dtype))
            else:
                one.copy_(normal(machine, *shape, seed=at, dtype=torch.float32) / shape[-1] ** 0.5)


def step(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """y, dx and the gradients of all parameters; nothing is written into .grad, so that threads can share a module."""
    x = x.detach().requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], dy)]


@contextmanager
def whole_sums() -> Iterator[None]:
    """cuBLAS adds parts of a sum in fp32: rounded to 16 bits in between, whole numbers would be off in PyTorch, too.

    And fp32 is multiplied as such, and not in TF32.
    """
    matmul = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction", "allow_tf32")
    before = [getattr(matmul, name) for name in names]
    for name in names:
        setattr(matmul, name, False)
    try:
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(matmul, name, value)
