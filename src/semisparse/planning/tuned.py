"""What tuning a whole model did, problem by problem."""

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from semisparse.gemm.autotune.algorithm import Choice

Outcome = Literal["tuned", "cached", "shipped", "left out"]

_WIDTH = 80
_LISTED = 3
_MEANINGS: dict[Outcome, str] = {
    "tuned": "measured now",
    "cached": "measured before",
    "shipped": "from the table that ships with the package",
    "left out": "left out",
}


@dataclass(frozen=True, slots=True)
class TunedProblem:
    """One distinct product; token counts of one bucket are one problem.

    Attributes:
        problem: Sizes, storage and dtype, in words.
        products: What needs it, as "blocks.0.fc1 forward" ("forward", "grad_input" or "grad_weight" of a layer; or
            "sampling": whether its weight gradient in fp8 is sampled).
        outcome: "tuned" (measured now, on this rank or another), "cached" (measured before: in this process, on disk or
            by another rank), "shipped" (from the table of the package), or "left out".
        choice: How it is computed; None where it was left out.
        why: Why it was left out, or what disturbed its measurement; else "".
    """

    problem: str
    products: tuple[str, ...]
    outcome: Outcome
    choice: Choice | None
    why: str = ""


@dataclass(frozen=True, slots=True)
class TuningReport:
    """The result of tuning a model; print() shows it.

    Attributes:
        rows: One per problem, those with most work first.
        layers: Name -> why the layer has no product to tune: it was not called, or computes masked dense.
        seconds: Wall time.
    """

    rows: tuple[TunedProblem, ...]
    layers: dict[str, str]
    seconds: float

    @property
    def complete(self) -> bool:
        """Whether there are products of the sparse engine, and no problem was left out."""
        return bool(self.rows) and not self.left_out

    @property
    def left_out(self) -> dict[str, str]:
        """Problem -> why it was left out; it is measured at its first call, if tuning is on."""
        return {row.problem: row.why for row in self.rows if row.outcome == "left out"}

    def __iter__(self) -> Iterator[TunedProblem]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        lines = []
        for outcome, meaning in _MEANINGS.items():
            rows = [row for row in self.rows if row.outcome == outcome]
            if rows:
                lines.append(f"{len(rows)} {'problem' if len(rows) == 1 else 'problems'} {meaning}:")
            for row in rows:
                result = row.why if row.choice is None else f"{row.choice}{row.why and f'; {row.why}'}"
                lines += _wrapped(f"{row.problem} [{_listed(row.products)}]: {result}")
        if not self.rows:
            lines.append("No product of the sparse engine runs with these inputs, so nothing was tuned.")
        reasons: dict[str, list[str]] = {}
        for name, why in self.layers.items():
            reasons.setdefault(why, []).append(name or "(root)")
        if reasons:
            lines.append("Layers without a product to tune:")
        for why, names in reasons.items():
            lines += _wrapped(f"{why}: {_listed(tuple(names))}")
        return "\n".join([*lines, f"Took {self.seconds:.1f} s."])


def _listed(names: tuple[str, ...]) -> str:
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + rest


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="    ")
