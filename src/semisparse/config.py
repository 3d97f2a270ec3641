"""Frozen settings of a semi-sparse layer."""

from dataclasses import dataclass, fields
from typing import Literal, get_args

from semisparse.errors import ConfigError

Operand = Literal["weight", "activation"]
Mask = Literal["transposable", "row", "soft", "greedy", "signed_greedy"]
Engine = Literal["auto", "cusparselt", "dense"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseConfig:
    """How one linear layer is made 2:4 sparse. Immutable, checked when it is built.

    operand: which operand of the forward product is pruned.
        "weight": W (N x K). Forward and input gradient use the pruned weight; the weight gradient goes to the dense
        master weight unchanged (straight-through estimator).
        "activation": x (M x K), pruned by 4x4 tiles over (tokens, features), so that the forward product and the
        weight gradient both have a 2:4 operand; the gradient of x passes straight through. A tile spans 4 tokens, so
        the output of one token depends on its neighbours, later ones included: not for causal models.
    mask: how the kept entries are chosen, always by magnitude.
        "transposable": the best of the 90 4x4 tiles that are 2:4 along both axes (arXiv 2102.08124); exact.
        "row": the 2 largest of each 4 along K. It keeps more magnitude, but is 2:4 along K only, so the input
        gradient is no sparse product. Weight operand only.
        "soft": as "row", but what is kept is shrunk by the third magnitude and scaled (S-STE, arXiv 2409.09099). The
        scale is a recipe's: start semisparse.recipes.s_ste(). Weight operand only.
        "greedy", "signed_greedy": for comparison only, and slow. The greedy 4x4 mask by magnitude and by signed value,
        which is what torchao.sparsity.training did by default. Weight operand only.
    engine: what multiplies.
        "auto": sparse tensor cores where they can run and the product alone measured faster than the masked dense one;
        masked dense everywhere else, with the same mask. Packing is on neither side of that comparison: the operand is
        packed either way, and where dense wins a step packs it once and unpacks it for each product.
        "cusparselt": always cuSPARSELt; a forward that cannot use it raises EngineError.
        "dense": always a masked dense product.

    Raises ConfigError when a value is outside its choices or two values exclude each other.
    """

    operand: Operand = "weight"
    mask: Mask = "transposable"
    engine: Engine = "auto"

    def __post_init__(self) -> None:
        choices = {"operand": get_args(Operand), "mask": get_args(Mask), "engine": get_args(Engine)}
        for field in fields(self):
            value, allowed = getattr(self, field.name), choices[field.name]
            if value not in allowed:
                raise ConfigError(f"{field.name}={value!r} is not one of {', '.join(map(repr, allowed))}")
        if self.operand == "activation" and self.mask != "transposable":
            raise ConfigError(
                f"mask={self.mask!r} cannot serve operand='activation', whose weight gradient needs groups along the "
                "tokens too; use mask='transposable'"
            )
