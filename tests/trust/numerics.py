"""B1: every kind of layer over many shapes, against fp64 with PyTorch's own error as the measure, and bit for bit."""

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semisparse.exactness import ERROR_RATIO, largest, own_error
from semisparse.gemm.autotune.autotuner import VARIABLE
from semisparse.reference import linear as reference
from semisparse.reference import masks, mvue
from semisparse.selfcheck.operands import SEED
from tests.trust.cases import CASES, FALLING_BACK, FP32, Case, cases, fill, make_layer, normal, step, whole, whole_sums
from tests.trust.machine import Machine
from tests.trust.noise import Noise, decibels
from tests.trust.outcome import Part, Row

Shape = tuple[int, int, int]
"""Tokens M, in_features K, out_features N."""

NAMES = ("y", "dx", "dW", "db")
ALWAYS = ("2:4, bf16", "2:4, fp16", "fp8 + 2:4")
IN_TURN = (
    "2:4, mask row, bf16", "2:4 activation, bf16", "2:4 + mvue, bf16", "fp8 + 2:4, mask row", "fp8 + 2:4 + mvue",
    *FALLING_BACK,
)  # fmt: skip
WANTED = 300
"""Shapes that the plan asks for."""
HALVES = 2
"""Parts that share the shapes, each in a process of its own, and with a GPU of its own where there are several."""

# Around powers of two, where padding and tiles begin and end; 4104 is no multiple of a large tile.
TOKENS = (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 129, 200, 255, 257, 513, 1000, 2048, 4104, 8192)
# K x N: the smallest, next to multiples of 64, 128 and 256, long and short in each direction.
FEATURES = (
    (16, 16), (48, 80), (80, 48), (112, 144), (144, 112), (128, 256), (240, 272), (272, 240), (64, 2048), (2048, 32),
    (528, 1040), (1008, 336),
)  # fmt: skip
UNALIGNED = tuple(
    itertools.product((1, 13, 200, 1001), ((8, 12), (20, 36), (24, 40), (100, 48), (64, 52), (124, 132), (252, 260)))
)
"""Multiples of 4 and 8 alone, which 16-bit layers compute masked dense."""
# ViT-B, ViT-L, Llama with 2048 features, Llama 7B, Llama 3 8B.
FFN = ((768, 3072), (1024, 4096), (2048, 8192), (4096, 11008), (4096, 14336))

LONGEST = 8192
"""Terms of a sum in fp8 up to which it is held against PyTorch's with partial sums in fp32.

Tensor cores keep fewer bits than fp32 has of a sum that they do not hand over. cuSPARSELt's sums stay there to the end.
"""

LARGEST_SAMPLE = 2**18
"""Entries of dy up to which the specification draws the sample; it does so on the CPU, in up to a second."""


def shapes() -> list[Shape]:
    """All shapes, in an order in which any number of the first ones holds some of each kind."""
    aligned = [(m, k, n) for m, (k, n) in itertools.product(TOKENS, FEATURES)]
    large = [(m, *pair) for m in (200, 2048, 8192) for ffn in FFN for pair in (ffn, ffn[::-1])]
    found = [*aligned, *((m, k, n) for m, (k, n) in UNALIGNED), *large]
    stride = 89  # no divisor of the number of shapes
    return [found[at * stride % len(found)] for at in range(len(found))]


@dataclass
class Errors:
    """Errors of results, in units of PyTorch's.

    Attributes:
        unit: What they are compared with, in the name of the row.
        limit: What they may be; None where they are only reported.
        largest: Of them; infinite for NaN.
        checks: How many were compared.
        faults: Results that are further off than they may be.
    """

    unit: str
    limit: float | None = ERROR_RATIO
    largest: float = 0.0
    checks: int = 0
    faults: list[str] = field(default_factory=list)

    def add(
        self, ours: Sequence[Tensor], torchs: Sequence[Tensor | None], exacts: Sequence[Tensor | None], where: str
    ) -> None:
        """Compare the results of one step: ours, PyTorch's, and in fp64, with None for what is not compared."""
        for name, mine, same, exact in zip(NAMES, ours, torchs, exacts, strict=False):
            if same is None or exact is None:
                continue
            error, unit = largest(mine.double() - exact), own_error(same, exact)
            ratio = error / unit if unit else error
            self.checks += 1
            self.largest = max(self.largest, ratio) if ratio == ratio else float("inf")
            if self.limit is not None and not ratio <= self.limit:
                self.faults.append(f"{name} at {where}: {ratio:.3g}")

    def rows(self, kind: str) -> list[Row]:
        """As a line of the table, where something was compared; kind: the name of the kind of layer."""
        if not self.checks:
            return []
        what, rule = f"{kind}: largest error, in units of {self.unit}", "reported" if self.limit is None else "at most"
        return [Row("B1", what, f"{self.checks} results", self.largest, self.limit, rule, self.faults)]


@dataclass
class Tally:
    """What was found of one kind of layer."""

    case: Case
    errors: Errors = field(default_factory=lambda: Errors("PyTorch's"))
    long_errors: Errors = field(default_factory=lambda: Errors(f"PyTorch's, sums of more than {LONGEST:,}", None))
    fast_errors: Errors = field(default_factory=lambda: Errors("PyTorch's with fast accumulation"))
    inexact: int = 0
    integers: int = 0
    inexact_faults: list[str] = field(default_factory=list)
    unaligned: int = 0
    silent: list[str] = field(default_factory=list)
    noise: Noise = field(init=False)

    def __post_init__(self) -> None:
        self.noise = Noise(self.case.computed)


def run(machine: Machine, part: Part, every: int = 1, first: int = 0, chosen: Sequence[Shape] | None = None) -> None:
    """Compare until the budget is spent.

    Args:
        machine: Where.
        part: Gets the rows.
        every: One shape in as many.
        first: The number of the first one.
        chosen: Instead of all shapes.
    """
    tallies = {case.name: Tally(case) for case in cases(machine, (*CASES, *FALLING_BACK))}
    todo, done = (list(chosen) if chosen is not None else shapes())[first::every], 0
    # Every shape would be tuned; algorithms are compared in algorithms.py.
    with mock.patch.dict(os.environ, {VARIABLE: "0"}), whole_sums():
        for at, shape in enumerate(todo):
            if part.left() <= 0:
                break
            for case in cases(machine, (*ALWAYS, IN_TURN[at % len(IN_TURN)])):
                with part.attempt(f"{case.name} at {shape}"):
                    _check(machine, case, shape, at, tallies[case.name])
            done += 1
            if done % 10 == 0:
                _tell(part, done, len(todo), list(tallies.values()))
    _tell(part, done, len(todo), list(tallies.values()))


def _tell(part: Part, done: int, of: int, tallies: Sequence[Tally]) -> None:
    """Replace the rows by what was found up to now."""
    rows = [Row("B1", "shapes", f"of {of}", done, min(WANTED // HALVES, of), "at least")]
    for tally in tallies:
        name = tally.case.name
        rows += [*tally.errors.rows(name), *tally.long_errors.rows(name), *tally.fast_errors.rows(name)]
        rows += tally.noise.rows()
        if tally.integers:
            what, size = f"{name}: results of whole numbers that differ in a bit", f"{tally.integers} results"
            rows.append(Row("B1", what, size, tally.inexact, faults=tally.inexact_faults))
        if tally.unaligned:
            what, size = f"{name}: layers that do not say why they are not in fp8", f"{tally.unaligned} layers"
            rows.append(Row("B1", what, size, len(tally.silent), faults=tally.silent))
    part.renew(rows)


def _check(machine: Machine, case: Case, shape: Shape, at: int, tally: Tally) -> None:
    """Compare one step with fp64, and one of whole numbers bit for bit; bias and layouts change with the number at."""
    (m, k, n), bias = shape, bool((at + at // 5) % 3)
    if case.unaligned:
        k, n = unaligned(k, n, case.multiple, at)
    elif case.fp8:
        k, n = (-(-size // case.multiple) * case.multiple for size in (k, n))
    aligned = case.dtype is not FP32 and k % 16 == 0 and n % 16 == 0
    layer = make_layer(machine, case, k, n, bias, None if aligned else "auto")
    where = f"M={m}, K={k}, N={n}, bias {bias}"
    if case.unaligned:
        tally.unaligned += 1
        if "not in fp8: N x K" not in repr(layer):
            tally.silent.append(where)
        case = case.computed
    fill(machine, layer, integers=False)
    x, dy = (normal(machine, m, size, seed=at, dtype=case.dtype) for at, size in ((5, k), (6, n)))
    ours = step(layer, x, dy)
    same, exacts = (list(one) for one in _yardstick(machine, case, layer, x, dy))
    _noise(tally.noise, layer, x, dy, where, ours, exacts, sparse=aligned)
    terms = k, n, m, m
    long = [case.fp8 and count > LONGEST for count in terms]
    tally.errors.add(ours, same, _kept(exacts, long, False), where)
    tally.long_errors.add(ours, same, _kept(exacts, long, True), where)
    if case.fp8:
        tally.fast_errors.add(ours, _fast_fp8(case, layer, x, dy), exacts, where)
    if case.sampled:
        return  # what is kept of a sample is scaled, so that it is no whole number
    fill(machine, layer, integers=True)
    x, dy = (whole(machine, m, size, seed=at, dtype=case.dtype) for at, size in ((5, k), (6, n)))
    found = step(layer, arranged(x, at), arranged(dy, at // len(ARRANGEMENTS)))
    for name, mine, right in zip(NAMES, found, _whole(case, layer, x, dy), strict=False):
        tally.integers += 1
        if not torch.equal(mine + 0.0, right + 0.0):  # a zero's sign depends on the order of summation
            tally.inexact += 1
            tally.inexact_faults.append(f"{name} at {where}: {int((mine != right).sum())} values")


def _kept(exacts: Sequence[Tensor | None], marks: Sequence[bool], mark: bool) -> list[Tensor | None]:
    """Those with this mark; None for the others."""
    return [exact if found is mark else None for exact, found in zip(exacts, marks, strict=False)]


def unaligned(k: int, n: int, multiple: int, turn: int) -> tuple[int, int]:
    """Sizes that fp8 cannot take: K is off by a group of four, or N by half of what 16 bits and fp8 share."""
    if k % multiple or n % multiple:
        return k, n
    return (k, n + multiple // 2) if turn % 2 else (k + 4, n)


def _noise(
    noise: Noise, layer: nn.Linear, x: Tensor, dy: Tensor, where: str, ours: Sequence[Tensor],
    exacts: Sequence[Tensor | None], sparse: bool,
) -> None:  # fmt: skip
    """Put the noise of all results into levels; exacts: as _yardstick has them. sparse: dW may be of a sample."""
    case, bias = noise.case, None if layer.bias is None else layer.bias.detach()
    plain = list(_plain(case, layer, x, dy, torch.float64)) if case.fp8 or case.sampled else []
    operands = {"y": (x, layer.weight), "dx": (dy, layer.weight), "dW": (dy, x)}
    for at, (name, mine, exact) in enumerate(zip(NAMES, ours, exacts, strict=False)):
        place = f"{name} at {where}"
        if exact is not None and case.fp8 and name != "db":
            noise.codes.add(decibels(mine, exact), place)
        elif exact is not None:
            noise.own_dtype(name, mine, exact, bias, place)
        if name == "dW" and case.sampled and sparse:
            noise.sampled(mine, _given(plain[at]), dy, place)
        elif case.fp8 and name != "db":
            noise.in_fp8(mine, _given(plain[at]), operands[name], place)


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


ARRANGEMENTS = ("as it is", "turned", "every second row", "behind another number")


def arranged(matrix: Tensor, turn: int) -> Tensor:
    """The same numbers laid out in another way: layers take any strides and addresses."""
    rows, columns = matrix.shape
    match ARRANGEMENTS[turn % len(ARRANGEMENTS)]:
        case "turned":
            return matrix.mT.contiguous().mT
        case "every second row":
            return matrix.new_zeros(2 * rows, columns).copy_(matrix.repeat_interleave(2, 0))[::2]
        case "behind another number":  # at an address that is a multiple of 2 alone
            return torch.cat([matrix.new_ones(1), matrix.flatten()])[1:].view(rows, columns)
    return matrix


Results = Iterator[Tensor | None] | Sequence[Tensor | None]


def _yardstick(machine: Machine, case: Case, layer: nn.Linear, x: Tensor, dy: Tensor) -> tuple[Results, Results]:
    """The same by PyTorch in the same dtype, and in fp64; None for what has no exact counterpart here."""
    if case.fp8:
        dense = make_layer(machine, case, layer.in_features, layer.out_features, layer.bias is not None, "dense")
        dense.load_state_dict(layer.state_dict())
        return step(dense, x, dy), _fp8_exact(case, layer, x, dy)
    drawn = None
    if case.sampled and dy.numel() <= LARGEST_SAMPLE:
        drawn = mvue.sample(dy.cpu(), SEED).matrix.to(dy.device)
    same, exact = (list(_plain(case, layer, x, dy, dtype, drawn)) for dtype in (case.dtype, torch.float64))
    if case.sampled and drawn is None:
        exact[2] = None
    return same, exact


def _plain(
    case: Case, layer: nn.Linear, x: Tensor, dy: Tensor, dtype: torch.dtype, drawn: Tensor | None = None
) -> list[Tensor | None]:
    """F.linear and autograd of the operands that the specification prunes."""
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    mask = None if case.config.weight is None else _mask(case, weight)
    pruned = weight if mask is None else reference.prune(weight, mask)
    tokens = reference.prune_tokens(x) if mask is None else x
    leaves = [one.to(dtype, copy=True).requires_grad_() for one in (tokens, pruned, bias) if one is not None]
    if case.config.activation is not None and bias is not None:  # which follows the rounded product, as in the layer
        y = F.linear(*leaves[:2]) + leaves[2]
    else:
        y = F.linear(*leaves)
    grads = list(torch.autograd.grad(y, leaves, dy.to(dtype)))
    if drawn is not None:
        grads[1] = reference.grad_weight(drawn.to(dtype), leaves[0].detach())
    return [y.detach(), *grads]


def _mask(case: Case, weight: Tensor) -> Tensor:
    return masks.row(weight) if case.config.weight == "row" else masks.transposable(weight)


def _fast_fp8(case: Case, layer: nn.Linear, x: Tensor, dy: Tensor) -> list[Tensor | None]:
    """PyTorch's products of the same codes with use_fast_accum=True: partial sums stay in the tensor cores.

    So do cuSPARSELt's. They are rounded where the layer's are, before and after the bias. torchao's recipes take such
    products in the forward pass: users of fp8 know their error.
    """
    weight, bias = layer.weight.detach(), layer.bias
    tokens, gradient = reference.quantised(x), reference.quantised(dy)
    pruned, sums = reference.quantised(weight, _mask(case, weight)), reference.fp8_sums(dy.dtype)
    y = fast_product(tokens.values, pruned.values).to(sums).float() * (tokens.scale * pruned.scale)
    y = y if bias is None else y + bias.detach().float()
    dx = fast_product(gradient.values, pruned.values.mT).to(sums).float() * (gradient.scale * pruned.scale)
    if case.sampled:
        return [y.to(x.dtype), dx.to(x.dtype), None]
    dw = fast_product(gradient.values.mT, tokens.values.mT) * (gradient.scale * tokens.scale)
    return [y.to(x.dtype), dx.to(x.dtype), dw.to(weight.dtype)]


def fast_product(left: Tensor, right: Tensor) -> Tensor:
    """left right^T of numbers that e4m3 has, in fp32; padded to sizes that PyTorch takes."""
    rows, columns = left.shape[0], right.shape[0]
    padded = [F.pad(one, (0, -one.shape[1] % 16, 0, -one.shape[0] % 16)) for one in (left, right)]
    first, second = (one.to(torch.float8_e4m3fn).contiguous() for one in padded)
    one = torch.ones((), device=left.device)
    wide = torch._scaled_mm(first, second.mT, one, one, out_dtype=torch.float32, use_fast_accum=True)
    return wide[:rows, :columns]


def _fp8_exact(case: Case, layer: nn.Linear, x: Tensor, dy: Tensor) -> list[Tensor | None]:
    """Of the rounded operands, in fp64."""
    weight = layer.weight.detach()
    tokens, gradient = reference.quantised(x), reference.quantised(dy)
    pruned = reference.quantised(weight, _mask(case, weight))
    y = (tokens.values @ pruned.values.mT) * (tokens.scale * pruned.scale).double()
    y = y if layer.bias is None else y + layer.bias.detach().double()
    dx = (gradient.values @ pruned.values) * (gradient.scale * pruned.scale).double()
    dw = (gradient.values.mT @ tokens.values) * (gradient.scale * tokens.scale).double()
    return [y, dx, None if case.sampled else dw, dy.double().sum(0)]


def _whole(case: Case, layer: nn.Linear, x: Tensor, dy: Tensor) -> list[Tensor]:
    """What whole numbers must give, bit for bit: their sums are exact."""
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    if not case.fp8:
        results = [one.to(case.dtype) for one in _plain(case, layer, x, dy, torch.float64) if one is not None]
        if case.config.activation is not None and bias is not None:  # which follows the product
            results[0] = (reference.prune_tokens(x).double() @ weight.double().mT).to(case.dtype) + bias
        return results
    mask, packed_twice = _mask(case, weight), case.config.products["grad_input"] == "sparse fp8"
    return [
        reference.fp8_forward(x, weight, mask, bias, dy.dtype),
        reference.fp8_grad_input(dy, weight, mask, x.dtype, sparse=packed_twice),
        reference.fp8_grad_weight(dy, x, weight.dtype),
        dy.double().sum(0).to(weight.dtype),
    ]
