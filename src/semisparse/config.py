"""Frozen settings of a semi-sparse layer."""

from dataclasses import dataclass
from typing import Literal, get_args

from semisparse.errors import ConfigError
from semisparse.masks import MASKS, MaskName

Backend = Literal["auto", "cusparselt", "dense"]
ActivationMask = Literal["transposable"]
Operand = Literal["weight", "activation"]
GradOutput = Literal["mvue"]
Precision = Literal["fp8"]
Product = Literal["sparse", "masked dense", "dense", "sparse fp8", "masked dense fp8", "dense fp8"]

BACKENDS: tuple[Backend, ...] = get_args(Backend)
"""What may multiply."""

GRAD_OUTPUTS: tuple[GradOutput | None, ...] = (None, *get_args(GradOutput))
"""How the gradient of the output may be pruned."""

PRECISIONS: tuple[Precision | None, ...] = (None, *get_args(Precision))
"""What the products of a layer may be computed in, besides the dtype of the call."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseConfig:
    """Which operands of one linear layer are pruned to 2:4, and what multiplies. Immutable, checked when it is built.

    The layer computes y = x W^T + b, and in the backward pass dx = dy W and dW = dy^T x.

    Args:
        weight: Mask that prunes W (N x K) in y and in dx; None leaves W dense, and with precision="fp8" alone means a
            dense layer in fp8. The gradient passes straight through to
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
            rank random numbers of its own; without one they follow from the gradient's values alone. In fp8 what is
            kept is rounded at random, too, which leaves the mean unbiased to 2^-13 of a value; and with backend="auto"
            dW is a dense fp8 product of dy itself where that measured faster than sampling.
        precision: None, the dtype of the call. "fp8" computes all three products in e4m3: x, W~ and dy are each
            multiplied by a power of two (one per tensor, from its largest magnitude at this call) and rounded; products
            are accumulated in a wider type and scaled back. The mask is chosen before rounding. Dense phases stay in
            fp8. Where fp8 cannot run (N or K not a multiple of 32, fp64, CUDA capability below 8.9) the layer computes
            as without it. Takes no activation and not the mask "soft".
        repack: True packs W~^T for dx in the backward, from the weight, and does not keep it from the forward until
            then: 9/16 of the bytes of a 16-bit weight less in between, for one more packing. Needs a weight mask that
            is 2:4 along both axes, and precision=None. No effect on weights that are packed per step.
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
    precision: Precision | None = None
    repack: bool = False
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        _check("weight", self.weight, (None, *MASKS))
        _check("activation", self.activation, (None, *get_args(ActivationMask)))
        check_grad_output(self.grad_output)
        check_precision(self.precision)
        _check("repack", self.repack, (False, True))
        _check("backend", self.backend, BACKENDS)
        self._check_operands()
        if self.precision is not None:
            self._check_precision()

    def _check_operands(self) -> None:
        if self.weight is not None and self.activation is not None:
            raise ConfigError(
                f"weight={self.weight!r} and activation={self.activation!r}: sparse tensor cores take one sparse "
                "operand per product; set one of them to None"
            )
        if self.weight is None and self.activation is None and self.precision is None:
            raise ConfigError(
                "weight=None and activation=None prune nothing in y: name a mask for one of them, or keep it dense; "
                "precision='fp8' alone makes its dense products fp8"
            )
        if self.repack and (self.weight is None or not MASKS[self.weight].both_ways or self.precision is not None):
            raise ConfigError(
                f"repack=True, weight={self.weight!r} and precision={self.precision!r}: the forward keeps no 16-bit "
                "W~^T; use weight='transposable' and precision=None, or leave repack at False"
            )
        if self.activation is not None and self.grad_output is not None:
            raise ConfigError(
                f"activation={self.activation!r} and grad_output={self.grad_output!r}: both prune an operand of "
                "dW = dy^T x, and sparse tensor cores take one; set grad_output=None"
            )

    def _check_precision(self) -> None:
        """What cannot be computed in fp8."""
        given = f"precision={self.precision!r}"
        if self.activation is not None:
            raise ConfigError(
                f"{given} and activation={self.activation!r}: tokens are not packed in fp8; prune the weight, or set "
                "precision=None"
            )
        if self.weight is None and self.grad_output is not None:
            raise ConfigError(
                f"weight=None and grad_output={self.grad_output!r}: only layers with a pruned weight sample the "
                "gradient; name a mask, or set grad_output=None"
            )
        if self.weight is not None and MASKS[self.weight].needs_scale:
            raise ConfigError(
                f"{given} and weight={self.weight!r}: its values are scaled beyond the largest magnitude of W, which "
                "the scale of fp8 follows; use weight='row' or 'transposable', or precision=None"
            )
        if self.weight is None and self.backend == "cusparselt":
            raise ConfigError("backend='cusparselt' has no sparse product to compute with weight=None: use 'auto'")

    @property
    def operand(self) -> Operand:
        """The operand of the forward product that may be pruned; "weight" for a dense layer in fp8."""
        return "weight" if self.activation is None else "activation"

    @property
    def prunes(self) -> bool:
        """Whether an operand of the forward product is pruned; False for a dense layer in fp8."""
        return self.weight is not None or self.activation is not None

    @property
    def products(self) -> dict[str, Product]:
        """How the three products of a layer are computed in a sparse phase, where device, dtype and sizes allow it.

        Keys: "forward" (y), "grad_input" (dx), "grad_weight" (dW). Values: "sparse", "dense", or "masked dense" where a
        2:4 operand is multiplied as a dense one because of backend="dense"; with precision="fp8" followed by "fp8".
        With backend="auto" what measured slower is not sparse; check says what ran.
        """
        if self.activation is not None:
            pruned = {"forward": True, "grad_input": False, "grad_weight": True}
        elif self.weight is not None:
            sampled = self.grad_output is not None
            pruned = {"forward": True, "grad_input": MASKS[self.weight].both_ways, "grad_weight": sampled}
        else:
            pruned = {"forward": False, "grad_input": False, "grad_weight": False}
        two_to_four: Product = "masked dense" if self.backend == "dense" else "sparse"
        plain: dict[str, Product] = {product: two_to_four if found else "dense" for product, found in pruned.items()}
        return plain if self.precision is None else {product: _FP8[how] for product, how in plain.items()}

    def __str__(self) -> str:
        """The settings that differ from dense, and the products that follow."""
        operands = ("weight", "activation", "grad_output", "precision")
        named = [f"{name}={getattr(self, name)}" for name in operands if getattr(self, name)]
        named += ["repack=True"] if self.repack else []
        products = ", ".join(f"{product} {how}" for product, how in self.products.items())
        return f"{', '.join(named)}, backend={self.backend}: {products}"


def check_grad_output(value: object) -> None:
    """Raise ConfigError unless value says how dy is pruned."""
    _check("grad_output", value, GRAD_OUTPUTS)


def check_precision(value: object) -> None:
    """Raise ConfigError unless value says what products are computed in."""
    _check("precision", value, PRECISIONS)


_FP8: dict[Product, Product] = {
    "sparse": "sparse fp8",
    "masked dense": "masked dense fp8",
    "dense": "dense fp8",
}


def _check(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")
