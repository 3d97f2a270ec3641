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

SETTLED = 2
"""Token counts after which a compilation is an error."""


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
        modes: Of torch.compile; none leaves out all of it.
        sizes: Features of the model.
    """
    machine.tune_quickly()
    given = cases(machine, NAMES)
    captured = part.add(Row("B5", "models captured and replayed", f"of {len(given)}", 0, len(given), "at least"))
    bits = part.add(Row("B5", "models whose replay has other bits than the eager step", "", None))
    done, faults = 0, []
    for case in given:
        if part.left() <= 0:
            break
        with part.attempt(f"replays of {case.name}"):
            wrong = _replayed(machine, case, replays, sizes)
            faults += [f"{case.name}: {wrong} results"] if wrong else []
            done += 1
        captured.figure, bits.size = done, f"{done} models, {replays} replays each"
        bits.figure, bits.faults = len(faults), faults
        part.changed()
    if modes:
        with part.attempt("compilations"):
            counts, last = _compilations(machine, sizes)
            part.add(Row("B5", "compilations", f"{BATCH_SIZES} token counts", counts, COMPILATIONS))
            without = f"token counts without another compilation, after the first {SETTLED}"
            part.add(Row("B5", without, f"of {BATCH_SIZES - SETTLED}", last, BATCH_SIZES - SETTLED, "at least"))
    # The slowest mode comes last, and each case has a row of its own: one that takes too long loses only itself.
    for mode in modes:
        for case in cases(machine, COMPILED):
            row = part.add(
                Row("B5", f"{case.name}: results with other bits, compiled in mode {mode}", "whole numbers", None)
            )
            if part.left() > 0:
                with part.attempt(f"{case.name}, mode {mode}"), whole_sums():
                    row.figure = _compiled(machine, case, mode, sizes)
            else:
                row.faults = ["no time was left"]
            part.changed()


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


def _compiled(machine: Machine, case: Case, mode: str, sizes: tuple[int, int]) -> int:
    """Results of a compiled step with other whole numbers than those of the eager one."""
    net = model(machine, case, integers=True, sizes=sizes)
    x, dy = (whole(machine, TOKENS, sizes[0], seed=at, dtype=case.dtype) for at in (5, 6))
    expected = [one.clone() for one in step(net, x, dy)]
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, mode=mode)
    for _ in range(4):  # warm-up, recording and replays of reduce-overhead
        torch.compiler.cudagraph_mark_step_begin()
        found = [one.clone() + 0.0 for one in step(compiled, x, dy)]
    wrong = int(differing(found, [one + 0.0 for one in expected]))
    torch._dynamo.reset()
    return wrong


def _compilations(machine: Machine, sizes: tuple[int, int], backend: str = "inductor") -> tuple[int, int]:
    """How often a model is compiled for BATCH_SIZES token counts; and for how many after SETTLED it was not again."""
    from torch._dynamo import config
    from torch._dynamo.exc import RecompileError
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    net = model(machine, cases(machine, NAMES[:1])[0], integers=False, sizes=sizes)
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    counts, last = list(range(2, 2 + 2 * BATCH_SIZES, 2)), 0
    for at, tokens in enumerate(counts):
        with config.patch(error_on_recompile=at >= SETTLED):
            try:
                compiled(normal(machine, tokens, sizes[0], seed=5, dtype=torch.bfloat16)).sum().backward()
                last += at >= SETTLED
            except RecompileError:
                pass
    torch._dynamo.reset()
    return counter.frame_count, last
