"""What really runs: one forward and backward pass with hooks, reported per semi-sparse layer."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from semisparse.errors import ConfigError, NoLayerMatchedError
from semisparse.gemm.autotune.algorithm import Choice
from semisparse.gemm.chunks import can_be_cut
from semisparse.gemm.dispatch import observed
from semisparse.gemm.problem import Problem
from semisparse.gemm.weight_gradient import WeightGradient
from semisparse.nn import SemiSparseBase
from semisparse.nn.float8 import LOST
from semisparse.operands import compute_dtype
from semisparse.routes import why_masked_dense, why_not_fp8
from semisparse.surgery.layers import lost_to_float8, semi_sparse_layers
from semisparse.unchanged import unchanged


@dataclass(frozen=True, slots=True)
class CheckRow:
    """What one semi-sparse layer did.

    Attributes:
        name: The layer's name; "" for the root.
        calls: Calls of its forward.
        forward: How its products ran in the forward pass; "" if none ran.
        backward: The same in the backward pass.
        gradient: Whether its weight got a gradient; None if the weight does not require one.
        problem: What is wrong, or "".
    """

    name: str
    calls: int
    forward: str
    backward: str
    gradient: bool | None
    problem: str


@dataclass(frozen=True, slots=True)
class CheckReport:
    """The result of one check; print() shows a table.

    Attributes:
        rows: One per layer, in the model's order; last, those that torchao's conversion to float8 replaced.
    """

    rows: tuple[CheckRow, ...]

    @property
    def ok(self) -> bool:
        """Whether every layer was called and got its gradient."""
        return not self.problems

    @property
    def problems(self) -> dict[str, str]:
        """Name -> what is wrong, for the layers that have a problem."""
        return {row.name: row.problem for row in self.rows if row.problem}

    def __iter__(self) -> Iterator[CheckRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        gradients = {True: "arrived", False: "none", None: "frozen"}
        header = ("layer", "calls", "gradient", "forward", "backward", "problem")
        body = [
            (
                row.name or "(root)",
                str(row.calls),
                gradients[row.gradient],
                row.forward,
                "the same" if row.backward == row.forward else row.backward,
                row.problem,
            )
            for row in self.rows
        ]
        widths = [max(len(line[column]) for line in (header, *body)) for column in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                 for line in (header, *body)]  # fmt: skip
        good = len(self.rows) - len(self.problems)
        return "\n".join([*lines, f"{good} of {len(self.rows)} semi-sparse layers do what they say"])


def check(model: nn.Module, *inputs: Any, loss: Callable[[Any], Tensor] | None = None, **keywords: Any) -> CheckReport:
    """Run model(*inputs, **keywords) and its backward pass once, and report what each semi-sparse layer did.

    Runs in the mode that is set (train or eval, autocast), compiled modules eagerly. Afterwards parameters, buffers,
    gradients, random number generators and training flags are as before, which needs memory for one copy of the model.
    Under DistributedDataParallel call it on every rank.

    Args:
        model: A module with semi-sparse layers.
        *inputs: Passed to the model.
        loss: Maps the model's output to a scalar. Default: the sum of all floating-point tensors in the output.
        **keywords: Passed to the model.

    Returns:
        Per layer: whether it was called at all (if something else reads its weight, it multiplies dense), how it
        multiplied (kernel and algorithm, or masked dense and why), and whether its weight got a gradient.

    Raises:
        NoLayerMatchedError: model has no semi-sparse layer.
        ConfigError: There is nothing to differentiate.
        Exception: Whatever the model raises.
    """
    layers: dict[str, SemiSparseBase] = semi_sparse_layers(model)
    lost: dict[str, nn.Linear] = lost_to_float8(model)
    if not layers and not lost:
        raise NoLayerMatchedError(
            f"model={type(model).__name__} has no semi-sparse layer to check; call sparsify first"
        )
    probe = _Probe(layers)
    with unchanged(model, (inputs, keywords)), probe.watching(), torch.enable_grad():
        output = model(*inputs, **keywords)
        _scalar(output, loss).backward()
        gradients = {name: layer.weight.grad is not None for name, layer in (layers | lost).items()}
    rows = [probe.row(name, gradients[name]) for name in layers]
    rows += [CheckRow(name, 0, "", "", gradients[name], f"no longer semi-sparse: {LOST}") for name in lost]
    return CheckReport(tuple(rows))


def _scalar(output: Any, loss: Callable[[Any], Tensor] | None) -> Tensor:
    if loss is not None:
        value = loss(output)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise ConfigError(f"loss returned {value!r}; it must return one number that depends on the parameters")
        return value
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not leaves:
        raise ConfigError(
            f"model returned {type(output).__name__} without a tensor that depends on a trainable parameter: pass "
            "loss=, or let some parameter train"
        )
    return torch.stack([leaf.float().sum() for leaf in leaves]).sum()


class _Probe:
    """Hooks on layers, and what they recorded."""

    def __init__(self, layers: dict[str, SemiSparseBase]) -> None:
        self._layers = layers
        self._calls: dict[str, int] = defaultdict(int)
        self._routes: dict[str, str] = {}
        self._products: dict[tuple[str, str], list[str]] = defaultdict(list)
        self._now: tuple[str, str] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record inside the block."""
        with ExitStack() as stack:
            for name, layer in self._layers.items():
                for handle in self._hooks(name, layer):
                    stack.callback(handle.remove)
            stack.enter_context(observed(self._saw))
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield

    def _hooks(self, name: str, layer: SemiSparseBase) -> Iterator[Any]:
        def before(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            self._calls[name] += 1
            self._now = (name, "forward")
            operand = args[0] if args else keywords.get("input")
            self._routes[name] = _route(layer, operand)

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._now = None
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(before_backward)  # runs just before the layer's own backward function

        def before_backward(gradient: Tensor) -> None:
            self._now = (name, "backward")

        yield layer.register_forward_pre_hook(before, with_kwargs=True)
        yield layer.register_forward_hook(after, always_call=True)

    def _saw(self, problem: Problem | WeightGradient, algorithm: int | None, choice: Choice | None) -> None:
        if self._now is None:
            return
        if isinstance(problem, WeightGradient):
            ran = "dense fp8 instead of a sampled dW"
        else:
            ran = "masked dense" if algorithm is None else f"cuSPARSELt algorithm {algorithm}"
            if algorithm is not None and choice is not None and choice.chunk and can_be_cut(problem, choice.chunk):
                ran += f" {choice.way}"
        why = f" ({choice.origin})" if choice is not None else ""
        self._products[self._now].append(ran + why)

    def row(self, name: str, gradient: bool) -> CheckRow:
        """The result for one layer."""
        layer = self._layers[name]
        trains = layer.weight.requires_grad
        problem = ""
        if not self._calls[name]:
            problem = "never called: something else reads its weight" if gradient else "never called"
        elif trains and not gradient:
            problem = "its weight got no gradient"
        route = self._routes.get(name, "") if self._calls[name] else ""
        # Where forward ran a sparse product and backward none, no gradient was asked for that has a 2:4 operand.
        idle = "dense: no gradient with a 2:4 operand" if self._products[name, "forward"] else route
        backward = ", ".join(dict.fromkeys(self._products[name, "backward"])) or idle
        return CheckRow(
            name,
            self._calls[name],
            ", ".join(dict.fromkeys(self._products[name, "forward"])) or self._routes.get(name, ""),
            backward,
            gradient if trains else None,
            problem,
        )


def _route(layer: SemiSparseBase, operand: Any) -> str:
    """How the layer computes if no product of an engine was recorded."""
    config, dense = layer.sparse_config, not layer.sparse_enabled or not layer.sparse_config.prunes
    phase = "dense (dense phase)" if config.prunes else "dense"
    if dense and config.precision is None:
        return phase
    if not isinstance(operand, Tensor):
        return "unknown"
    dtype = compute_dtype(operand, layer.weight)
    obstacle = "" if config.precision is None else why_not_fp8(layer.weight, dtype)
    if config.precision is not None and not obstacle:
        how = phase.replace("dense", "dense fp8", 1) if dense else "packed fp8"
        return how if layer.weight.is_cuda else f"{how}, emulated: the weight is on {layer.weight.device}"
    not_fp8 = obstacle and f"; not in fp8: {obstacle}"
    if dense:
        return phase + not_fp8
    reason = why_masked_dense(layer.weight, dtype, config.backend)
    return (f"masked dense: {reason}" if reason else "packed") + not_fp8
