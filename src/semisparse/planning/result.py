"""A plan, and what can be done with it: apply, print, save, load."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from torch import nn

from semisparse.errors import PlanError
from semisparse.planning import files
from semisparse.planning.contents import PlanContents, PlanRow
from semisparse.planning.text import shown
from semisparse.surgery.report import SKIPPED, LayerRow, SwapReport
from semisparse.surgery.selection import clean_name, linear_layers
from semisparse.surgery.swap import sparsify


@dataclass(frozen=True)
class Plan(PlanContents):
    """The result of semisparse.plan; print() shows it in 80 columns.

    Attributes:
        rows: One per linear layer, in the model's order.
        mode: "eager", "graph" or "compiled".
        candidates: Settings that were compared with dense, by name.
        machine: GPU and versions that it was measured with.
        step: Of the whole dense step, if it is known.
        predicted_ms: Of the planned step; None if the dense one is not known. Measured, if the plan was tried.
        host_weight: Share of the host's time in the choice; None if the dense step's is not known.
        remarks: What else to know, such as what was tried in the whole step.
        by_layers_ms: What the layers' times alone predict of the planned step.
        packing: When weights are packed and how many micro-batches a step has; the times are for that.
    """

    def differences(self, model: nn.Module) -> dict[str, str]:
        """Layer name -> how the model differs from the one that was planned; empty if the plan fits.

        Args:
            model: To apply the plan to.
        """
        there = {clean_name(found.name): found.layer for found in reversed(linear_layers(model))}
        found = {}
        for row in self.rows:
            layer = there.pop(clean_name(row.name), None)
            if layer is None:
                found[row.name] = "the model has no linear layer of this name"
            elif (layer.out_features, layer.in_features) != (row.out_features, row.in_features):
                sizes = f"{layer.out_features} x {layer.in_features}"
                found[row.name] = f"N x K is {sizes}, and {row.out_features} x {row.in_features} was planned"
        planned = {clean_name(row.name) for row in self.rows}
        names = {id(layer) for name, layer in _by_name(model).items() if name in planned}
        return found | {name: "it was not planned" for name, layer in there.items() if id(layer) not in names}

    def apply(self, model: nn.Module) -> SwapReport:
        """Swap what the plan chose: sparsify(model, plan.configs), after a look whether it is the planned model.

        Args:
            model: The planned model, or one that is built like it.

        Returns:
            The report of the swap; one that changes nothing if no layer gains.

        Raises:
            PlanError: Layers differ from those that were planned; the message names them. The model is as it was.
            LayerRefusedError: A layer cannot be swapped any more.
        """
        differences = self.differences(model)
        if differences:
            listed = "; ".join(f"{name or '(root)'}: {why}" for name, why in list(differences.items())[:10])
            rest = f"; and {len(differences) - 10} more" if len(differences) > 10 else ""
            raise PlanError(f"model is not the one that was planned: {listed}{rest}. Plan it anew with semisparse.plan")
        if self.configs:
            return sparsify(model, self.configs)
        rows = (LayerRow(row.name, row.out_features, row.in_features, SKIPPED, row.why) for row in self.rows)
        return SwapReport(tuple(rows), ("remark: the plan swaps no layer",))

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON.

        Args:
            path: Of the file; one that is there is replaced.

        Raises:
            OSError: It cannot be written.
        """
        files.write(Path(path), self)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a plan, check it, and warn if it was measured on another GPU or with other versions than here.

        Args:
            path: Of a file that save() wrote.

        Raises:
            PlanError: There is no such file, or it is damaged or of another version's format.
        """
        fields, rows = files.read(Path(path))
        plan = cls(rows=tuple(PlanRow(**row) for row in rows), **fields)
        other = plan.other_machine()
        if other:
            told = ", ".join(f"{name} {theirs} (here {ours})" for name, (theirs, ours) in other.items())
            warnings.warn(f"this plan was measured elsewhere: {told}; its times may not hold", stacklevel=2)
        return plan

    def other_machine(self, here: Mapping[str, str] | None = None) -> dict[str, tuple[str, str]]:
        """Fact -> (as measured, as here) of the GPU and versions that differ; empty on the machine of the plan.

        Args:
            here: Facts to compare with; default: those of this process and its current GPU.
        """
        facts = files.here() if here is None else here
        names = dict.fromkeys((*self.machine, *facts))
        pairs = {name: (self.machine.get(name, "none"), facts.get(name, "none")) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def __str__(self) -> str:
        return shown(self)


def _by_name(model: nn.Module) -> dict[str, nn.Module]:
    return {clean_name(found.name): found.layer for found in linear_layers(model)}
