"""B7: memory of the GPU and of the process over many steps, many shapes, and many layers that come and go."""

import itertools

import torch
from torch import nn

from semisparse.gemm.engine import engine
from semisparse.nn.packed_weights import PackedWeights
from tests.trust.cases import Case, cases, fill, make_layer, normal
from tests.trust.machine import Machine
from tests.trust.outcome import Part, Row

STEPS = 10_000
SHAPES = 64
LAYERS = 1_000
LOOKS = 10
"""Times that memory is measured, so that what is done is written down."""

DEVICE_BYTES, HOST_BYTES = 256 << 10, 8 << 20
"""Growth that is allowed after the warm-up."""

NAMES = ("2:4, bf16", "2:4 + mvue, bf16", "fp8 + 2:4")
WIDTH, INNER = 256, 320
FIRST, APART = 528, 8
"""The fewest tokens, and the distance of neighbours: they share four buckets of the autotuner, and no plan."""


def trained(machine: Machine) -> nn.Sequential:
    """One model with all kinds of layers; its products of SHAPES token counts have more plans than an engine keeps."""
    given = cases(machine, NAMES)
    widths = [WIDTH, *[INNER] * (len(given) - 1), WIDTH]
    net = nn.Sequential(
        *(make_layer(machine, case, *pair) for case, pair in zip(given, itertools.pairwise(widths), strict=True))
    )
    fill(machine, net, integers=False)
    return net


def run(machine: Machine, part: Part, steps: int = STEPS, shapes: int = SHAPES, layers: int = LAYERS) -> None:
    """Measure: layers that come and go in a fifth of the budget, then steps in the rest of it.

    Args:
        machine: Where.
        part: Gets the rows.
        steps: Training steps after the warm-up.
        shapes: Token counts that take turns.
        layers: Built and dropped.
    """
    machine.tune_quickly()
    with part.attempt("layers that come and go"):
        _built(machine, part, layers)
    with part.attempt("training"):
        _trained(machine, part, steps, shapes)


class Growth:
    """The rows of what memory has grown by, from now on.

    Args:
        machine: Whose memory.
        part: Gets the rows.
        what: Was done, in the first row.
        of: How often it is to be done.
    """

    def __init__(self, machine: Machine, part: Part, what: str, of: int) -> None:
        self.machine, self.part = machine, part
        self.before = machine.allocated(), machine.resident()
        self.rows = [
            part.add(Row("B7", what, f"of {of}", 0, of, "at least")),
            part.add(Row("B7", "growth on the device in bytes", "", None, DEVICE_BYTES)),
            part.add(Row("B7", "growth of the process in bytes", "", None, HOST_BYTES)),
        ]

    def tell(self, done: int, size: str) -> None:
        """Measure and write it down."""
        after = self.machine.allocated(), self.machine.resident()
        count, *grown = self.rows
        count.figure = done
        for row, new, old in zip(grown, after, self.before, strict=True):
            row.figure, row.size = new - old, size
        self.part.changed()


def _trained(machine: Machine, part: Part, steps: int, shapes: int) -> None:
    net = trained(machine)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6)
    inputs = [normal(machine, FIRST + APART * at, WIDTH, seed=at, dtype=torch.bfloat16) for at in range(shapes)]
    gradients = [normal(machine, len(x), WIDTH, seed=1, dtype=torch.bfloat16) for x in inputs]

    def train(count: int, first: int = 0) -> int:
        for turn in range(count):
            if turn % 16 == 15:
                machine.wait()
                if part.left() <= 0:
                    return turn + 1
            optimizer.zero_grad(set_to_none=True)
            at = (first + turn) % shapes
            net(inputs[at]).backward(gradients[at])
            optimizer.step()
        return count

    train(2 * shapes)
    for _ in range(2):  # the first measurement itself takes memory
        machine.allocated(), machine.resident()
        train(min(steps, shapes))
    growth, done = Growth(machine, part, "training steps after the warm-up", steps), 0
    # Whole rounds, after which the same plans are held as before them.
    rounds = -(-steps // (LOOKS * shapes))
    while done < steps and (done == 0 or part.left() > 0):
        done += train(rounds * shapes, done)
        growth.tell(done, f"{done} steps, {shapes} shapes")
    plans = machine.engine.plan_count(machine.index)
    part.add(Row("B7", "plans that this thread holds", f"{done} steps", plans, engine().MAX_PLANS))


def _built(machine: Machine, part: Part, count: int) -> None:
    def build(case: Case) -> None:
        layer = make_layer(machine, case, 64, 96)
        packed = PackedWeights(nn.Sequential(layer))
        packed.pack()
        x = normal(machine, 32, 64, seed=1, dtype=case.dtype)
        layer(x).backward(normal(machine, 32, 96, seed=2, dtype=case.dtype))

    given, done = cases(machine, NAMES), 0
    for at in range(min(64, count)):
        build(given[at % len(given)])
    in_time = part.share(0.2)  # without what was compiled first
    growth = Growth(machine, part, "layers built, packed, trained and dropped", count)
    while done < count and in_time():
        build(given[done % len(given)])
        done += 1
        if done % -(-count // LOOKS) == 0:
            growth.tell(done, f"{done} layers of 64 x 96")
    growth.tell(done, f"{done} layers of 64 x 96")
