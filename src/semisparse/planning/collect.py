"""Which linear layers a model calls, with how many tokens, in which dtype, and which gradients they need."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from semisparse.config import SparseConfig
from semisparse.errors import ConfigError
from semisparse.operands import compute_dtype
from semisparse.planning.problems import LayerUse, LinearProblem
from semisparse.surgery.named import names_of
from semisparse.surgery.refusals import Candidates
from semisparse.surgery.selection import FoundLayer, Selector, clean_name
from semisparse.surgery.swap import by_selectors
from semisparse.unchanged import unchanged

Tokens = int | Mapping[str, int | Mapping[int, float]]
"""M of all layers; or a layer's name or glob -> its M, or each M with how often a step calls the layer with it."""

NEVER_CALLED = "never called in this forward"
_NOT_TIMED = "its sizes or dtypes are none that are timed"


def from_forward(
    model: nn.Module,
    inputs: tuple[Any, ...],
    keywords: Mapping[str, Any],
    select: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
) -> tuple[LayerUse, ...]:
    """Run model(*inputs, **keywords) once, with hooks, and return what each linear layer did.

    Compiled modules run eagerly. Gradients are recorded, so that layers know whether their input needs one; no backward
    is run. Afterwards the model and the random number generators are as before.

    Args:
        model: On any device, meta included.
        inputs: Of the forward.
        keywords: Of the forward.
        select: As sparsify's.
        exclude: As sparsify's.

    Raises:
        NoLayerMatchedError: The model has no nn.Linear, or a selector matches none.
        ConfigError: model is not a module or has lazy parameters, or a selector is none.
        Exception: Whatever the model raises; the hooks are gone then, too.
    """
    return calls_of(model, _layers(model, select, exclude), inputs, keywords)


def calls_of(
    model: nn.Module, layers: list[tuple[FoundLayer, str]], inputs: tuple[Any, ...], keywords: Mapping[str, Any]
) -> tuple[LayerUse, ...]:
    """As from_forward(), for layers that the caller chose.

    Args:
        model: On any device, meta included.
        layers: Linear layers of it, semi-sparse ones too, each with why it stays dense, or "".
        inputs: Of the forward.
        keywords: Of the forward.

    Raises:
        Exception: Whatever the model raises; the hooks are gone then, too.
    """
    probe = _Probe(layers)
    with unchanged(model, (inputs, keywords)), probe.watching(), torch.enable_grad():
        model(*inputs, **keywords)
    return tuple(probe.use(found, stays) for found, stays in layers)


def from_tokens(
    model: nn.Module,
    tokens: Tokens,
    select: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
) -> tuple[LayerUse, ...]:
    """What each linear layer does if it is called with these numbers of tokens; nothing is run.

    The dtype of the products is that of the weight, or autocast's where that is on for its device. Every layer is taken
    to need the gradient of its input.

    Args:
        model: On any device, meta included.
        tokens: M by layer. A layer that is not named is not called.
        select: As sparsify's.
        exclude: As sparsify's.

    Raises:
        NoLayerMatchedError: The model has no nn.Linear, or a name or selector matches none.
        ConfigError: tokens is not what it should be.
    """
    layers = _layers(model, select, exclude)
    by_layer = {id(found.layer): _counts(tokens) for found, _ in layers} if not isinstance(tokens, Mapping) else {}
    if isinstance(tokens, Mapping):
        if wrong := [key for key in tokens if not isinstance(key, str)]:
            raise ConfigError(
                f"tokens has the key {wrong[0]!r}, which must be the name of a layer or a glob over names"
            )
        for key, named in names_of(tokens, [found for found, _ in layers], "tokens").items():
            for found in named:
                by_layer.setdefault(id(found.layer), _counts(tokens[key]))
    uses = []
    for found, stays in layers:
        counts = by_layer.get(id(found.layer), {})
        made = {_problem(found.layer, rows, found.layer.weight, True, True): float(n) for rows, n in counts.items()}
        calls = tuple((problem, n) for problem, n in made.items() if problem.timed)
        why = stays or ("" if calls else _NOT_TIMED if counts else "tokens does not name it")
        uses.append(LayerUse(clean_name(found.name), found.layer.in_features, found.layer.out_features, calls, (), why))
    return tuple(uses)


def _counts(tokens: object) -> dict[int, float]:
    """M -> how often, from an M or such a mapping."""
    counts: dict[Any, Any] = dict(tokens) if isinstance(tokens, Mapping) else {tokens: 1.0}
    if not counts:
        raise ConfigError(f"tokens={tokens!r} has no number of tokens; leave out layers that are never called")
    for rows, count in counts.items():
        good = type(rows) is int and rows > 0 and type(count) in (int, float) and 0 < count < float("inf")
        if not good:
            raise ConfigError(f"tokens={tokens!r} must be a number of tokens, or {{number: calls per step}}")
    return counts


def _layers(
    model: nn.Module, select: Selector | Iterable[Selector] | None, exclude: Selector | Iterable[Selector] | None
) -> list[tuple[FoundLayer, str]]:
    """Every linear layer once, with why it must stay dense; a tied layer under the name that sparsify would take."""
    candidates = Candidates(model)
    decide, _ = by_selectors(candidates, SparseConfig(), select, exclude)
    found_by_id: dict[int, tuple[FoundLayer, str]] = {}
    for found in candidates.layers:
        decision = decide(found)
        stays = decision if isinstance(decision, str) else ""
        if id(found.layer) not in found_by_id or (found_by_id[id(found.layer)][1] and not stays):
            found_by_id[id(found.layer)] = found, stays
    return list(found_by_id.values())


def _problem(layer: nn.Linear, rows: int, operand: Tensor, grad_input: bool, grads: bool) -> LinearProblem:
    weight = layer.weight
    dtypes = (compute_dtype(operand, weight), weight.dtype, operand.dtype)
    dtype, weight_dtype, input_dtype = (str(one).removeprefix("torch.") for one in dtypes)
    return LinearProblem(
        rows,
        layer.in_features,
        layer.out_features,
        dtype,
        weight_dtype,
        input_dtype,
        layer.bias is not None,
        grad_input,
        bool(grads and weight.requires_grad),
    )


class _Probe:
    """Hooks on layers, and what they recorded."""

    def __init__(self, layers: list[tuple[FoundLayer, str]]) -> None:
        self._layers = layers
        self._calls: dict[int, Counter[LinearProblem]] = {id(found.layer): Counter() for found, _ in layers}
        self._reads: dict[int, list[int]] = {id(found.layer): [] for found, _ in layers}
        self._inputs: dict[int, tuple[ReferenceType[Tensor], int, int]] = {}
        self._others: set[int] = set()  # layers with calls that cannot be timed
        self._count = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record inside the block."""
        with ExitStack() as stack:
            for found, _ in self._layers:
                handle = found.layer.register_forward_pre_hook(self._saw, with_kwargs=True)
                stack.callback(handle.remove)
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield

    def _saw(self, layer: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        operand = args[0] if args else keywords.get("input")
        if not isinstance(layer, nn.Linear) or not isinstance(operand, Tensor):
            return
        rows, grads = operand.numel() // max(1, layer.in_features), torch.is_grad_enabled()
        if rows:
            problem = _problem(layer, rows, operand, bool(grads and operand.requires_grad), grads)
            if not problem.timed:
                self._others.add(id(layer))
                return
            self._calls[id(layer)][problem] += 1
            self._reads[id(layer)].append(self._number(operand))

    def _number(self, operand: Tensor) -> int:
        """The same number for the same state of the same tensor."""
        known = self._inputs.get(id(operand))
        version = -1 if operand.is_inference() else operand._version  # such a tensor counts no writes
        if known is not None and known[0]() is operand and known[1] == version >= 0:
            return known[2]
        self._count += 1
        self._inputs[id(operand)] = ref(operand), version, self._count
        return self._count

    def use(self, found: FoundLayer, stays: str) -> LayerUse:
        """What one layer did."""
        layer = found.layer
        calls = tuple((problem, float(count)) for problem, count in self._calls[id(layer)].items())
        why = stays or (_NOT_TIMED if id(layer) in self._others else "" if calls else NEVER_CALLED)
        sizes = layer.in_features, layer.out_features
        return LayerUse(clean_name(found.name), *sizes, calls, tuple(self._reads[id(layer)]), why)
