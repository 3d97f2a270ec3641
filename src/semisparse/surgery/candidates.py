"""The linear layers of a model, and what speaks against swapping each."""

from torch import nn

from semisparse.arguments import check_module
from semisparse.errors import NoLayerMatchedError
from semisparse.gemm.problem import SPARSE_MULTIPLE
from semisparse.nn import SemiSparseBase
from semisparse.nn.refusals import refusal
from semisparse.surgery.bypass import bypass_reason, reading_of
from semisparse.surgery.coverage import share_outside_linear
from semisparse.surgery.selection import FoundLayer, linear_layers
from semisparse.surgery.source_walk import Uses


class Candidates:
    """Every nn.Linear of a model under each of its names, in the model's order, each looked at once.

    Raises ConfigError when model is no module, NoLayerMatchedError when it has no nn.Linear.
    """

    def __init__(self, model: nn.Module) -> None:
        check_module(model)
        self.layers: list[FoundLayer] = linear_layers(model)
        if not self.layers:
            nothing = f"model={type(model).__name__} contains no nn.Linear, so nothing would change"
            outside = str(share_outside_linear(model))
            raise NoLayerMatchedError(f"{nothing}. {outside}" if outside else nothing)
        self._refusals: dict[int, str] = {}  # by layer: a tied layer is refused when one of its homes refuses it
        self._verify: dict[int, str] = {}
        known: dict[type, Uses] = {}
        for found in self.layers:
            self._look(found, known)

    def refusal(self, found: FoundLayer) -> str | None:
        """Why the layer cannot be swapped, or None."""
        return self._refusals.get(id(found.layer))

    def note(self, found: FoundLayer) -> str:
        """What to know about the layer although it is swapped; mostly nothing."""
        layer, notes = found.layer, []
        if id(layer) in self._verify:
            notes.append(self._verify[id(layer)])
        if layer.in_features % SPARSE_MULTIPLE or layer.out_features % SPARSE_MULTIPLE:
            notes.append(f"always masked dense: sparse products need N and K in multiples of {SPARSE_MULTIPLE}")
        return "; ".join(notes)

    def _look(self, found: FoundLayer, known: dict[type, Uses]) -> None:
        reason = self._reason(found)
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

    @staticmethod
    def _reason(found: FoundLayer) -> str | None:
        if isinstance(found.layer, SemiSparseBase):
            return "already semi-sparse: densify it first"
        return bypass_reason(found.parent, found.name.rpartition(".")[2]) or refusal(found.layer)
