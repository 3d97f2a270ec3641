"""Frozen settings of a semi-sparse layer."""

from dataclasses import dataclass
from typing import Literal, get_args

from semisparse.errors import ConfigError
from semisparse.masks import MASKS, MaskName

Backend = Literal["auto", "cusparselt", "dense"]
ActivationMask = Literal["transposable"]
Operand = Literal["weight", "activation"]
GradOutput = Literal["mvue"]
Product = Literal["sparse", "masked dense", "dense"]

BACKENDS: tuple[Backend, ...] = get_args(Backend)
"""What may multiply."""

GRAD_OUTPUTS: tuple[GradOutput | None, ...] = (None, *get_args(GradOutput))
"""How the gradient of the output may be pruned."""

_PLANNED = {"precision": "fp8"}
"""Values that the design has and that no code computes yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseConfig:
    """Which operands of one linear layer are pruned to 2:4, and what multiplies. Immutable, checked when it is built.

    The layer computes y = x W^T + b, and in the backward pass dx = dy W and dW = dy^T x.

    Args:
        weight: Mask that prunes W (N x K) in y and in dx; None leaves W dense. The gradient passes straight through to
            the dense master weight (straight-through estimator). Entries are always chosen by magnitude.
            "transposable": the best of the 90 4x4 tiles that are 2:4 along both axes (arXiv 2102.08124); exact.
            "row": the 2 largest of each 4 along K. It keeps more magnitude, but is 2:4 along K only, so dx is not a
            sparse product.
            "soft": as "row", but what is kept is shrunk by the third magnitude and scaled (S-STE, arXiv 2409.09099).
            The scale is a recipe's: start semisparse.recipes.s_ste().
            "greedy", "signed_greedy": for comparison only, and slow. The greedy 4x4 mask by magnitude and by signed
            value, which is what torchao.sparsity.training did by default.
        activation: "transposable" prunes x (M x K) by 4x4 tiles over (tokens, features) in y and in dW; the gradient
            of x passes straight through. A tile spans 4 tokens, so the output of one token depends on its neighbours,
            later ones included: not for causal models. Needs weight=None.
        grad_output: "mvue" prunes dy (M x N) to 2:4 along tokens in dW = S(dy)^T x, at random and without bias: two of
            each four tokens are kept, with probabilities that make the variance smallest (arXiv 2203.10991), and scaled
            up. dx and the bias gradient are those of dy itself. Needs a pruned weight. A schedule gives each layer and
            rank random numbers of its own; without one they follow from the gradient's values alone.
        precision: None, the 16-bit dtype of the call. "fp8" is not available yet.
        backend: "auto": sparse tensor cores where they can run and the product alone measured faster than the masked
            dense one; masked dense everywhere else, with the same mask. Packing is on neither side of that comparison:
            the operand is packed either way, and where dense wins a step packs it once and unpacks it for each product.
            "cusparselt": always cuSPARSELt; a forward that cannot use it raises EngineError.
            "dense": always a masked dense product.

    Raises:
        ConfigError: A value is not among its choices or not available yet, or two values exclude each other.
    """

    weight: MaskName | None = "transposable"
    activation: ActivationMask | None = None
    grad_output: GradOutput | None = None
    precision: Literal["fp8"] | None = None
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        for name, planned in _PLANNED.items():
            value = getattr(self, name)
            if value == planned:
                raise ConfigError(f"{name}={value!r} is not available yet; leave it at None")
            if value is not None:
                raise ConfigError(f"{name}={value!r} is not one of None and, not available yet, {planned!r}")
        _check("weight", self.weight, (None, *MASKS))
        _check("activation", self.activation, (None, *get_args(ActivationMask)))
        check_grad_output(self.grad_output)
        _check("backend", self.backend, BACKENDS)
        if self.weight is not None and self.activation is not None:
            raise ConfigError(
                f"weight={self.weight!r} and activation={self.activation!r}: sparse tensor cores take one sparse "
                "operand per product; set one of them to None"
            )
        if self.weight is None and self.activation is None:
            raise ConfigError(
                "weight=None and activation=None prune nothing in y: name a mask for one of them, or keep it dense"
            )
        if self.activation is not None and self.grad_output is not None:
            raise ConfigError(
                f"activation={self.activation!r} and grad_output={self.grad_output!r}: both prune an operand of "
                "dW = dy^T x, and sparse tensor cores take one; set grad_output=None"
            )

    @property
    def operand(self) -> Operand:
        """The operand of the forward product that is pruned."""
        return "activation" if self.weight is None else "weight"

    @property
    def products(self) -> dict[str, Product]:
        """How the three products of a layer are computed in a sparse phase, where device, dtype and sizes allow it.

        Keys: "forward" (y), "grad_input" (dx), "grad_weight" (dW). Values: "sparse", "dense", or "masked dense" where a
        2:4 operand is multiplied as a dense one because of backend="dense".
        """
        if self.weight is None:
            pruned = {"forward": True, "grad_input": False, "grad_weight": True}
        else:
            sampled = self.grad_output is not None
            pruned = {"forward": True, "grad_input": MASKS[self.weight].both_ways, "grad_weight": sampled}
        two_to_four: Product = "masked dense" if self.backend == "dense" else "sparse"
        return {product: two_to_four if found else "dense" for product, found in pruned.items()}

    def __str__(self) -> str:
        """The settings that differ from dense, and the products that follow."""
        operands = ("weight", "activation", "grad_output")
        named = [f"{name}={getattr(self, name)}" for name in operands if getattr(self, name)]
        products = ", ".join(f"{product} {how}" for product, how in self.products.items())
        return f"{', '.join(named)}, backend={self.backend}: {products}"


def check_grad_output(value: object) -> None:
    """Raise ConfigError unless value says how dy is pruned."""
    _check("grad_output", value, GRAD_OUTPUTS)


def _check(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")
