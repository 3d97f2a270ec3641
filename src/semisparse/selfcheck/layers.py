"""Part "layers": the four linear layers of docs/speed.md, timed as a plan does, and what the autotuner chose."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from semisparse.gemm.autotune.algorithm import Choice
from semisparse.gemm.autotune.autotuner import autotuner
from semisparse.gemm.autotune.store import canonical
from semisparse.planning.measuring import Measurer
from semisparse.planning.problems import LinearProblem
from semisparse.selfcheck.contents import LayerTimes

SHAPES = ((13008, 1024, 4096), (13008, 4096, 1024), (16384, 2048, 8192), (16384, 4096, 11008))
"""M x K x N: ViT-L's MLP, and two Llama-like MLPs."""

_SIZES = ("rows", "reduction", "columns", "out_features", "in_features")
"""In keys of products, and of the choice whether a weight gradient is sampled."""


def time_layers(
    measurer: Measurer,
    left: Callable[[], float],
    add: Callable[[LayerTimes], None],
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
) -> None:
    """Time each layer with all candidates, forward and backward, in bf16 with bias, interleaved.

    Args:
        measurer: How; without a store, so that all is measured here and now.
        left: Seconds that are left for this part.
        add: Takes each result as it is there.
        shapes: M, K and N of each.
    """
    for shape in shapes:
        problem = LinearProblem(*shape)
        # What has less than no time left measures nothing, and says so.
        found = replace(measurer, seconds=max(left(), 0.0)).measure([problem])
        add(LayerTimes(problem, found[problem]))


def choices_of(problems: Sequence[LinearProblem]) -> list[tuple[dict[str, object], Choice]]:
    """The autotuner's choices for products of these layers, with the key of each.

    Args:
        problems: That ran in this process.
    """
    features = [{problem.in_features, problem.out_features} for problem in problems]
    found = {canonical(key): (key, choice) for key, choice in autotuner().used()}
    return [
        (key, choice)
        for key, choice in found.values()
        if any(wanted <= {key.get(name) for name in _SIZES} for wanted in features)
    ]
