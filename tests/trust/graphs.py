"""B5: replays of a CUDA graph and compiled code against eager bits."""

import torch
from torch import nn

from tests.trust.cases import Case, cases, fill, make_layer, normal, step, whole, whole_sums
from tests.trust.machine import Machine, differing
from tests.trust.outcome import Part, Row

REPLAYS = 100
SIZES = (256, 512)
TOKENS = 208
MODES = ("default", "reduce-overhead", "max-autotune")
NAMES = ("2:4, bf16", "2:4, fp16", "2:4 activation, bf16", "2:4 + mvue, bf16", "fp8 + 2:4", "fp8 + 2:4 + mvue")
COMPILED = ("2:4, bf16", "fp8 + 2:4")
BATCH_SIZES = 20
COMPILATIONS = 2
"""Most of them, for BATCH_SIZES token counts."""


def model(machine: Machine, case: Case, integers: bool, sizes: tuple[int, int] = SIZES) -> nn.Sequential:
    """Two layers with a ReLU between."""
    first, second = make_layer(machine, case, *sizes), make_layer(machine, case, *sizes[::-1])
    net = nn.Sequential(first, nn.ReLU(), second)
    fill(machine, net, integers)
    return net


def run(
    machine: Machine, part: Part, replays: int = REPLAYS, modes: tuple[str, ...] = MODES, sizes: tuple[int, int] = SIZES
) -> None:
    """Compare replays and compiled code with eager steps.

    Args:
        machine: Where; on the CPU a replay is a call.
        part: Gets the rows.
        replays: Per kind of layer.
        modes: Of torch.compile.
        sizes: Features of the model.
    """
    machine.tune_quickly()
    given, done, faults = cases(machine, NAMES), 0, []
    for case in given:
        if part.left() <= 0:
            break
        wrong = _replayed(machine, case, replays, sizes)
        faults += [f"{case.name}: {wrong} results"] if wrong else []
        done += 1
    part.add(Row("B5", "models captured and replayed", f"of {len(given)}", done, len(given), "at least"))
    size = f"{done} models, {replays} replays each"
    part.add(Row("B5", "models whose replay has other bits than the eager step", size, len(faults), faults=faults))
    for mode in modes:
        if part.left() <= 0:
            break
        with whole_sums():
            found = [_compiled(machine, case, mode, sizes) for case in cases(machine, COMPILED)]
        faults = [name for name in found if name]
        what, size = f"compiled models with other bits, mode {mode}", f"{len(found)} models, whole numbers"
        part.add(Row("B5", what, size, len(faults), faults=faults))
    if "default" in modes and part.left() > 0:
        count = _compilations(machine, sizes)
        part.add(Row("B5", "compilations", f"{BATCH_SIZES} token counts", count, COMPILATIONS))


def _replayed(machine: Machine, case: Case, replays: int, sizes: tuple[int, int]) -> int:
    """Results of a replayed step, with new inputs each time, that differ from those of an eager one."""
    net = model(machine, case, integers=False, sizes=sizes)
    x, dy = (normal(machine, TOKENS, sizes[0], seed=at, dtype=case.dtype) for at in (5, 6))
    step(net, x, dy)  # tunes, which a capture cannot
    recorded, replay = machine.capture(lambda: step(net, x, dy))
    wrong = 0
    for turn in range(replays):
        x.copy_(normal(machine, *x.shape, seed=100 + turn, dtype=case.dtype))
        dy.copy_(normal(machine, *dy.shape, seed=1100 + turn, dtype=case.dtype))
        with torch.no_grad():  # weights change, too, as they do in training
            for parameter in net.parameters():
                parameter.mul_(1 + 2.0**-6)
        replay()
        wrong += int(differing(step(net, x, dy), recorded))
    return wrong


def _compiled(machine: Machine, case: Case, mode: str, sizes: tuple[int, int]) -> str:
    """The name of a case whose compiled step gives other whole numbers than the eager one; "" if it gives the same."""
    net = model(machine, case, integers=True, sizes=sizes)
    x, dy = (whole(machine, TOKENS, sizes[0], seed=at, dtype=case.dtype) for at in (5, 6))
    expected = [one.clone() for one in step(net, x, dy)]
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, mode=mode)
    for _ in range(4):  # warm-up, recording and replays of reduce-overhead
        found = [one.clone() + 0.0 for one in step(compiled, x, dy)]
    torch._dynamo.reset()
    return case.name if int(differing(found, [one + 0.0 for one in expected])) else ""


def _compilations(machine: Machine, sizes: tuple[int, int]) -> int:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    net = model(machine, cases(machine, NAMES[:1])[0], integers=False, sizes=sizes)
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    for tokens in range(2, 2 + 2 * BATCH_SIZES, 2):
        compiled(normal(machine, tokens, sizes[0], seed=5, dtype=torch.bfloat16)).sum().backward()
    torch._dynamo.reset()
    return counter.frame_count
