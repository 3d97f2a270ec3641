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
DEVICE_BYTES, HOST_BYTES = 256 << 10, 8 << 20
"""Growth that is allowed after the warm-up."""

NAMES = ("2:4, bf16", "2:4 + mvue, bf16", "fp8 + 2:4")
FEATURES = (256, 320, 256)
FIRST, APART = 528, 8
"""The fewest tokens, and the distance of neighbours: they share four buckets of the autotuner, and no plan."""


def trained(machine: Machine) -> nn.Sequential:
    """One model with all kinds of layers; its products have more plans than an engine keeps."""
    layers: list[nn.Module] = []
    for case in cases(machine, NAMES):
        layers += [make_layer(machine, case, k, n) for k, n in itertools.pairwise(FEATURES)]
    net = nn.Sequential(*layers)
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
    _built(machine, part, layers)
    net = trained(machine)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6)
    inputs = [normal(machine, FIRST + APART * at, FEATURES[0], seed=at, dtype=torch.bfloat16) for at in range(shapes)]
    gradients = [normal(machine, len(x), FEATURES[0], seed=1, dtype=torch.bfloat16) for x in inputs]

    def train(count: int) -> int:
        for turn in range(count):
            if turn % 16 == 15:
                machine.wait()
                if part.left() <= 0:
                    return turn + 1
            optimizer.zero_grad(set_to_none=True)
            net(inputs[turn % shapes]).backward(gradients[turn % shapes])
            optimizer.step()
        return count

    train(2 * shapes)
    for _ in range(2):  # the first measurement itself takes memory
        before = machine.allocated(), machine.resident()
        train(min(steps, shapes))
    before = machine.allocated(), machine.resident()
    done = train(steps)
    after = machine.allocated(), machine.resident()
    size = f"{done} steps, {shapes} shapes"
    part.add(Row("B7", "training steps after the warm-up", f"of {steps}", done, steps, "at least"))
    part.add(Row("B7", "growth on the device in bytes", size, after[0] - before[0], DEVICE_BYTES))
    part.add(Row("B7", "growth of the process in bytes", size, after[1] - before[1], HOST_BYTES))
    plans = machine.engine.plan_count(machine.index)
    part.add(Row("B7", "plans that this thread holds", size, plans, engine().MAX_PLANS))


def _built(machine: Machine, part: Part, count: int) -> None:
    in_time = part.share(0.2)

    def build(case: Case) -> None:
        layer = make_layer(machine, case, 64, 96)
        packed = PackedWeights(nn.Sequential(layer))
        packed.pack()
        x = normal(machine, 32, 64, seed=1, dtype=case.dtype)
        layer(x).backward(normal(machine, 32, 96, seed=2, dtype=case.dtype))

    given, done = cases(machine, NAMES), 0
    for at in range(min(64, count)):
        build(given[at % len(given)])
    before = machine.allocated(), machine.resident()
    for at in range(count):
        if not in_time():
            break
        build(given[at % len(given)])
        done += 1
    after = machine.allocated(), machine.resident()
    size = f"{done} layers of 64 x 96"
    part.add(Row("B7", "layers built, packed, trained and dropped", f"of {count}", done, count, "at least"))
    part.add(Row("B7", "growth on the device in bytes", size, after[0] - before[0], DEVICE_BYTES))
    part.add(Row("B7", "growth of the process in bytes", size, after[1] - before[1], HOST_BYTES))
