"""The one table of 2:4 masks: what each is called, what it needs, how it is chosen, and the kernels' constant for it.

Everything that depends on the kind of a mask asks this table. The choosing functions are the specification
(reference/masks.py); kernels choose the same entries bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from semisparse.errors import ConfigError
from semisparse.reference import masks as reference

MaskName = Literal["transposable", "row", "soft", "greedy", "signed_greedy"]

GIVEN_CODES = 0
"""The kernels' constant for a mask that is not chosen but given as tile codes; the table's constants start at 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mask:
    """One way to choose what a weight keeps, always from the stored weight and before any rounding.

    Attributes:
        name: As in SparseConfig.
        constant: What the kernels know it by.
        both_ways: Whether it is 2:4 along both axes, so that the transpose has a packed form, too.
        choose: matrix (R x C) -> bool mask of the same shape, True where an entry is kept.
        from_codes: Whether tile codes may be given instead of choosing the mask.
        needs_scale: Whether kept values are shrunk and multiplied by a scale, which a recipe takes at its start.
        chosen_while_packing: Whether the pack kernel chooses it in its one pass over the matrix.
    """

    name: MaskName
    constant: int
    both_ways: bool
    choose: Callable[[Tensor], Tensor]
    from_codes: bool = False
    needs_scale: bool = False
    chosen_while_packing: bool = True


MASKS: dict[str, Mask] = {
    mask.name: mask
    for mask in (
        Mask(name="transposable", constant=1, both_ways=True, choose=reference.transposable, from_codes=True),
        Mask(name="row", constant=2, both_ways=False, choose=reference.row),
        Mask(name="soft", constant=3, both_ways=False, choose=reference.row, needs_scale=True),
        Mask(name="greedy", constant=4, both_ways=True, choose=reference.greedy, chosen_while_packing=False),
        Mask(
            name="signed_greedy",
            constant=5,
            both_ways=True,
            choose=partial(reference.greedy, signed=True),
            chosen_while_packing=False,
        ),
    )
}
"""Every mask by its name."""


def get(name: str) -> Mask:
    """The mask called name.

    Raises:
        ConfigError: There is no such mask.
    """
    mask = MASKS.get(name)
    if mask is None:
        raise ConfigError(f"mask={name!r} is not one of {', '.join(map(repr, MASKS))}")
    return mask
