"""May this layer of this model be swapped? The one place that answers, with the reason if not.

Reasons in the layer itself are in nn/refusals.py, because the layers' from_dense also needs them. This module adds the
reasons in its place in a model: its weight is read by a module that does not call the layer, so that a swap would
silently do nothing. There are two ways to know: the source of the modules above it (source/), and a list of classes
that have no readable source or that decide by a flag. They are recognised by name, because their packages need not be
installed. Sources of the list: torch.nn.TransformerEncoderLayer's fast path,
torch.nn.MultiheadAttention, xFormers' SwiGLU, and timm's attention blocks that call F.linear on qkv.weight.
"""

from torch import nn

from semisparse.arguments import check_module
from semisparse.config import SparseConfig
from semisparse.errors import NoLayerMatchedError
from semisparse.formats.layout import SPARSE_MULTIPLE
from semisparse.nn import SemiSparseBase
from semisparse.nn.float8 import is_float8
from semisparse.nn.refusals import refusal
from semisparse.routes import why_not_fp8
from semisparse.surgery.coverage import share_outside_linear
from semisparse.surgery.selection import FoundLayer, linear_layers
from semisparse.surgery.source import Uses, reading_of


class Candidates:
    """Every nn.Linear of a model under each of its names, in the model's order, each examined once.

    Args:
        model: The module to examine.
        take_float8: Whether torchao's Float8Linear may be swapped.

    Attributes:
        model: The same.
        layers: Its linear layers, tied ones once per name.

    Raises:
        ConfigError: model is not a module.
        NoLayerMatchedError: It has no nn.Linear.
    """

    def __init__(self, model: nn.Module, *, take_float8: bool = False) -> None:
        check_module(model)
        self._take_float8 = take_float8
        self.model = model
        self.layers: list[FoundLayer] = linear_layers(model)
        if not self.layers:
            nothing = f"model={type(model).__name__} contains no nn.Linear, so nothing would change"
            outside = str(share_outside_linear(model))
            raise NoLayerMatchedError(f"{nothing}. {outside}" if outside else nothing)
        self._refusals: dict[int, str] = {}  # by layer: a tied layer is refused under all names if under one
        self._verify: dict[int, str] = {}
        known: dict[type, Uses] = {}
        for found in self.layers:
            self._examine(found, known)

    def refusal(self, found: FoundLayer) -> str | None:
        """Why the layer cannot be swapped, or None."""
        return self._refusals.get(id(found.layer))

    def note(self, found: FoundLayer, config: SparseConfig) -> str:
        """What to know about a layer that is swapped with config all the same; mostly nothing."""
        layer, notes = found.layer, []
        if id(layer) in self._verify:
            notes.append(self._verify[id(layer)])
        if is_float8(layer):
            in_fp8 = "" if config.precision is not None else ", in the dtype of the call without precision='fp8'"
            notes.append(f"taken over from torchao's Float8Linear{in_fp8}; densify makes it a plain nn.Linear")
        if config.precision is not None and (reason := why_not_fp8(layer.weight, layer.weight.dtype)):
            notes.append(f"not in fp8: {reason}")
        whole = not (layer.in_features % SPARSE_MULTIPLE or layer.out_features % SPARSE_MULTIPLE)
        if config.prunes and not whole:
            notes.append(f"always masked dense: sparse products need N and K in multiples of {SPARSE_MULTIPLE}")
        return "; ".join(notes)

    def _examine(self, found: FoundLayer, known: dict[type, Uses]) -> None:
        reason = _refusal(found, self._take_float8)
        if reason is None:
            reading = reading_of(found, known)
            if reading is not None and reading.called:
                self._verify[id(found.layer)] = (
                    f"verify: {reading.place} also reads its weight itself; semisparse.check shows what runs"
                )
            elif reading is not None:
                reason = f"{reading.place} reads its weight itself and never calls the layer"
        if reason is not None:
            self._refusals.setdefault(id(found.layer), reason)


def _refusal(found: FoundLayer, take_float8: bool) -> str | None:
    if isinstance(found.layer, SemiSparseBase):
        return "already semi-sparse: densify it first"
    bypassed = _bypassed(found.parent, found.name.rpartition(".")[2])
    return bypassed or refusal(found.layer, take_float8=take_float8)


def _bypassed(parent: nn.Module | None, child: str) -> str | None:
    """Why the layer held as parent.child is never called, by the class of parent; None for a class not listed."""
    if parent is None:
        return None
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads out_proj.weight and never calls the layer"
    if isinstance(parent, nn.TransformerEncoderLayer):
        return (
            "nn.TransformerEncoderLayer's fast path in eval reads its weights and never calls the layer: use a block "
            "that calls its linears"
        )
    ancestry = {(cls.__module__.partition(".")[0], cls.__name__) for cls in type(parent).__mro__}
    if ("xformers", "SwiGLU") in ancestry:
        return "xFormers' SwiGLU reads its weights and never calls the layer: set XFORMERS_DISABLED=1"
    in_timm = any(package == "timm" for package, _ in ancestry)
    if in_timm and child == "qkv" and getattr(parent, "q_bias", None) is not None:
        return f"timm's {type(parent).__name__} with separate q and v biases reads qkv.weight and never calls the layer"
    return None
