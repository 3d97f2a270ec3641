"""A self-check of a GPU as it might come back, made up."""

from semisparse.gemm.autotune.algorithm import Choice
from semisparse.planning.problems import LinearProblem
from semisparse.selfcheck.contents import Check, Gpu, LayerTimes, Layout, ModelTimes, Part, Report
from semisparse.selfcheck.layers import SHAPES
from tests.planning.simulated import measurement

FACTS = {"semisparse": "0.1.0", "torch": "2.11.0+cu130", "driver": "570.1", "native library": "launch.so is loaded"}


def report(capability: tuple[int, int] = (9, 0), name: str = "NVIDIA H100 80GB HBM3") -> Report:
    """Every field has something in it."""
    problems = [LinearProblem(*shape) for shape in SHAPES]
    layers = [LayerTimes(problem, measurement(problem)) for problem in problems]
    layers[0].measurement.dropped["fp8 + 2:4 + mvue"] = "out of memory"
    key: dict[str, object] = {"dtype": "bfloat16", "rows": 4096, "reduction": 1024, "columns": 13312, "bias": True}
    way: dict[str, object] = {"dtype": "bfloat16", "tokens": 13312, "out_features": 4096, "in_features": 1024}
    return Report(
        "2026-11-26T12:00:00Z",
        False,
        150.0,
        "cuda",
        dict(FACTS),
        [("weight mask", "Triton kernel", "packed")],
        Gpu(name, capability, 80 * 2**30, 132, 700.0),
        [Part("numerics", "done", 30.5), Part("layouts", "done", 1.0), Part("layers", "done", 60.0),
         Part("model", "raised", 40.0, "RuntimeError: no")],
        [Check("2:4, bf16", "pass", 0.01, 0.02, "dx", "twice"), Check("fp8", "skipped", reason="needs 8.9")],
        [Layout("bfloat16", "verified", "kernel", (0, 32, 33), "verified"), Layout("float16", "failed", "", (), "no")],
        layers,
        [(key, Choice(17, 17, 100.0, 150.0, "tuned")),
         (way, Choice(None, 0, 90.0, 80.0, "shipped", decides="sampling"))],
        ModelTimes("2 MLPs", "compiled", "", {"dense": 16.0, "2:4": 12.8}, {"dense fp8": "the budget was spent"}),
    )  # fmt: skip
