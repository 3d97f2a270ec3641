"""How much of a model 2:4 layers cannot cover, because it is not an nn.Linear: matrices of other layers, by kind."""

import math
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from semisparse.arguments import check_module
from semisparse.surgery.conv1d import is_conv1d

WORTH_REPORTING = 0.05
"""Share of the parameters below which the report does not mention them."""
_NAMED = 4  # kinds that the sentence names


@dataclass(frozen=True, slots=True)
class OutsideKind:
    """Matrices of one kind outside nn.Linear.

    Attributes:
        name: A class, for the weight of a layer; otherwise of the form "Parameter 'up' of Experts".
        count: How many matrices.
        parameters: Their entries together.
        shape: Their common shape; None if they differ.
        hint: What to know or do about them, or "".
    """

    name: str
    count: int
    parameters: int
    shape: tuple[int, ...] | None
    hint: str = ""

    def __str__(self) -> str:
        size = ""
        if self.shape and self.name.startswith("Parameter"):
            size = " x ".join(map(str, self.shape)) + (" each" if self.count > 1 else "")
        remarks = "; ".join(filter(None, (size, self.hint)))
        return f"{self.count} x {self.name}{f' ({remarks})' if remarks else ''}"


@dataclass(frozen=True, slots=True)
class OutsideLinear:
    """Where the parameters of a model are, each counted once; vectors are in none of the parts.

    str() is one line, or "" if the matrices outside nn.Linear are at most 5 % of the parameters.

    Attributes:
        total: All parameters.
        linear: Those of nn.Linear, its subclasses and semi-sparse layers.
        embeddings: Those of nn.Embedding and nn.EmbeddingBag that no nn.Linear shares.
        kinds: The matrices elsewhere, largest kind first.
    """

    total: int
    linear: int
    embeddings: int
    kinds: tuple[OutsideKind, ...]

    @property
    def share(self) -> float:
        """Share of all parameters that are matrices outside nn.Linear; embeddings and vectors are not among them."""
        return sum(kind.parameters for kind in self.kinds) / max(self.total, 1)

    def __str__(self) -> str:
        if self.share <= WORTH_REPORTING:
            return ""
        named = [str(kind) for kind in self.kinds[:_NAMED]]
        if more := len(self.kinds[_NAMED:]):
            named.append(f"{more} smaller kind{'s' if more > 1 else ''}")
        embeddings = f"; embeddings, not counted here: {self.embeddings / self.total:.0%}" if self.embeddings else ""
        return f"{self.share:.0%} of the parameters lie outside nn.Linear: {', '.join(named)}{embeddings}"


def share_outside_linear(model: nn.Module) -> OutsideLinear:
    """Where the parameters of model are: in nn.Linear, in embeddings, or in matrices that sparsify cannot cover.

    A Parameter that several modules share is counted once: as nn.Linear's if one of them is an nn.Linear, otherwise as
    an embedding's if one of them is an embedding. Vectors (at most one size other than 1) are in the total only.
    Parameters of any dtype and device count, sharded DTensors with their full size, lazy ones after their first
    forward. Reads no data.

    Raises:
        ConfigError: model is not a module.
    """
    check_module(model)
    modules = dict(model.named_modules())
    best: dict[int, tuple[int, nn.Parameter, nn.Module, str]] = {}
    for name, module in modules.items():
        owner, _, parametrised = name.partition("parametrizations.")  # a parametrised weight lives below its layer
        home = modules[owner.rstrip(".")] if parametrised else module
        rank = 0 if isinstance(home, nn.Linear) else 1 if isinstance(home, nn.Embedding | nn.EmbeddingBag) else 2
        for key, parameter in module._parameters.items():
            if parameter is not None and not is_lazy(parameter):
                key = parametrised.partition(".")[0] if parametrised else key
                if rank < best.get(id(parameter), (3,))[0]:
                    best[id(parameter)] = rank, parameter, home, key
    sums, kinds = [0, 0, 0], dict[tuple[str, str], list[tuple[int, ...]]]()
    for rank, parameter, home, key in best.values():
        sums[rank] += parameter.numel()
        if rank == 2 and sum(size != 1 for size in parameter.shape) > 1:
            kinds.setdefault(_kind(home, key, parameter), []).append(tuple(parameter.shape))
    found = [_summed(name, hint, shapes) for (name, hint), shapes in kinds.items()]
    found.sort(key=lambda kind: -kind.parameters)
    return OutsideLinear(sum(sums), sums[0], sums[1], tuple(found))


def _kind(home: nn.Module, key: str, parameter: nn.Parameter) -> tuple[str, str]:
    """Name and hint of the kind that this matrix belongs to."""
    cls = parametrize.type_before_parametrizations(home)
    if is_conv1d(cls) and key == "weight":
        return "Conv1D", "convert with semisparse.conv1d_to_linear"
    if key == "weight":
        return cls.__name__, ""
    hint = "3-D, as stacked experts are" if parameter.dim() == 3 and 1 not in parameter.shape else ""
    return f"Parameter {key!r} of {cls.__name__}", hint


def _summed(name: str, hint: str, shapes: list[tuple[int, ...]]) -> OutsideKind:
    same = shapes[0] if len(set(shapes)) == 1 else None
    return OutsideKind(name, len(shapes), sum(math.prod(shape) for shape in shapes), same, hint)
