"""The named recipes. Each returns a Recipe; what it omits of its paper is documented here.

`safest` and `fastest` are the two to begin with; the others are papers'. `print(fst())` says which products of a layer
are sparse (`fst().config.products`); in a dense phase none is. FST and S-STE sample the gradient of
the output for a sparse weight gradient, as in their papers, but exactly (see SparseConfig) where the authors' code
draws an approximation with a larger variance.
"""

from collections.abc import Callable

from semisparse.config import Backend, GradOutput, Precision, SparseConfig
from semisparse.masks import MaskName
from semisparse.recipes.recipe import Recipe


def safest(*, sparse_fraction: float = 0.7, backend: Backend = "auto") -> Recipe:
    """Begin with this one: your 16-bit dtype, exact masks at every forward, sparse for 70 % of the steps, then dense.

    The two products with the weight are sparse; the weight gradient is dense, so nothing is sampled and nothing rounded
    beyond your dtype. The settings are dinov2's. Hold the learning rate until the dense part: docs/recipes.md, 'Which
    schedule', has what that and other shares of sparse steps change.

    Measured: speed of layers and training steps in benchmarks/cards/compare.md, rows '2:4'; accuracy against dense
    training in docs/accuracy.md, row '2:4' of 'Time to loss', and rows '70% sparse, then dense' and 'dinov2' of small
    models. Most end about where dense does; one setting of the ViT ends lower than was aimed for, the narrowest model
    loses most.

    Args:
        sparse_fraction: As in Recipe.
        backend: As in SparseConfig.
    """
    config = SparseConfig(backend=backend)
    return Recipe(name="safest", config=config, sparse_fraction=sparse_fraction)


def fastest(
    *, sparse_fraction: float = 0.7, grad_output: GradOutput | None = "mvue", backend: Backend = "auto"
) -> Recipe:
    """The schedule and masks of safest with all three products in fp8, and all three sparse while it is sparse.

    Layers stay in fp8 in the dense phase. The weight gradient is of a 2:4 sample of the output's gradient, which has no
    bias before rounding, but more noise. Layers that fp8 cannot take (see SparseConfig) compute as without it; the
    report of sparsify says which.

    Measured: speed in benchmarks/cards/compare.md, rows 'fp8 + 2:4' (grad_output=None) and 'fp8 + 2:4 + mvue'. Loss at
    equal tokens and at equal seconds, beside dense bf16 and torchao's float8, on a language model wide enough to gain
    speed: docs/accuracy.md, 'Time to loss'. There, too, each part alone on a small language model.

    Args:
        sparse_fraction: As in Recipe.
        grad_output: As in SparseConfig; None for a dense weight gradient.
        backend: As in SparseConfig.
    """
    config = SparseConfig(grad_output=grad_output, precision="fp8", backend=backend)
    return Recipe(name="fastest", config=config, sparse_fraction=sparse_fraction)


def dinov2(*, sparse_fraction: float = 0.7, precision: Precision | None = None, backend: Backend = "auto") -> Recipe:
    """Exact transposable masks chosen at every forward, straight-through gradients; sparse first, then dense.

    torchao's authors trained a DINOv2 ViT-L in this way, with sparse MLP layers (select="mlp") for 70 % of the steps:
    README of torchao.sparsity.training. Their masks were greedy by signed value; these are exact.

    Args:
        sparse_fraction: As in Recipe.
        precision: As in SparseConfig.
        backend: As in SparseConfig.
    """
    config = SparseConfig(precision=precision, backend=backend)
    return Recipe(name="dinov2", config=config, sparse_fraction=sparse_fraction)


def sr_ste(
    *,
    decay: float = 2e-4,
    sparse_fraction: float = 1.0,
    weight: MaskName = "transposable",
    precision: Precision | None = None,
    backend: Backend = "auto",
) -> Recipe:
    """Masks chosen at every forward; pruned weights decay: gradient + decay * (1 - M) * W. arXiv 2102.04010.

    The paper adds the term in the backward pass, this recipe after clipping (see MaskedDecay).

    Args:
        decay: Default: the paper's value, chosen for SGD. Adam divides the term by its own scale.
        sparse_fraction: As in Recipe.
        weight: Mask of the weights. "row" is the paper's; with the default the input gradient is also a sparse product.
        precision: As in SparseConfig.
        backend: As in SparseConfig.
    """
    config = SparseConfig(weight=weight, precision=precision, backend=backend)
    return Recipe(name="sr_ste", config=config, sparse_fraction=sparse_fraction, decay=decay)


def fst(
    *,
    decay: float = 6e-5,
    refresh_every: int = 40,
    sparse_fraction: float = 5 / 6,
    grad_output: GradOutput | None = "mvue",
    precision: Precision | None = None,
    backend: Backend = "auto",
) -> Recipe:
    """Transposable masks held for refresh_every applied steps, decay of pruned weights, dense for the last sixth.

    arXiv 2404.01847, for the feed-forward layers of a transformer. All three products of a layer are sparse.

    Args:
        decay: Added to gradients after they were unscaled and clipped. Tune it per model by the flip rate (see
            MaskMetrics); the default is what the authors' code uses for its smallest GPT-2.
        refresh_every: Applied steps for which masks are held.
        sparse_fraction: As in Recipe.
        grad_output: As in SparseConfig; None for a dense weight gradient.
        precision: As in SparseConfig; with "fp8", grad_output is sampled in fp8, too.
        backend: As in SparseConfig.
    """
    config = SparseConfig(grad_output=grad_output, precision=precision, backend=backend)
    return Recipe(name="fst", config=config, sparse_fraction=sparse_fraction, decay=decay, refresh_every=refresh_every)


def s_ste(
    *, sparse_fraction: float = 1.0, grad_output: GradOutput | None = "mvue", backend: Backend = "auto"
) -> Recipe:
    """Continuous pruning: the two largest of each 4 along K, shrunk by the third, times a scale fixed at the start.

    arXiv 2409.09099. The scale of each weight, <W, S> / <S, S>, is computed when the recipe starts. The paper
    multiplies in fp8; here products are in your dtype, because "soft" has no form in fp8 yet.

    Args:
        sparse_fraction: As in Recipe. With less than 1, the dense phase replaces the shrunk weight by W itself, which
            is a jump.
        grad_output: As in SparseConfig; None for a dense weight gradient.
        backend: As in SparseConfig.
    """
    config = SparseConfig(weight="soft", grad_output=grad_output, backend=backend)
    return Recipe(name="s_ste", config=config, sparse_fraction=sparse_fraction)


def step(
    *,
    dense_range: tuple[float, float] = (0.1, 0.5),
    weight: MaskName = "row",
    precision: Precision | None = None,
    backend: Backend = "auto",
) -> Recipe:
    """Dense until Adam's second moment has settled, then sparse with that moment frozen. arXiv 2302.01172.

    Needs StepAdamW. The switch comes when the change of the second moment, |v_t - v_{t-1}| averaged over all sparse
    weights and over the last 1 / (1 - beta2) steps, is below Adam's eps (checked every 10 steps; see AutoSwitch). A run
    shorter than that window switches at the latest step. Intended for accuracy: the dense phase saves no time.

    Args:
        dense_range: Shares of all steps before and after which the switch does not come. Default: as the paper
            recommends.
        weight: Mask of the weights, as in SparseConfig; the paper's is "row".
        precision: As in SparseConfig.
        backend: As in SparseConfig.
    """
    config = SparseConfig(weight=weight, precision=precision, backend=backend)
    return Recipe(name="step", config=config, dense_range=dense_range)


PRESETS: dict[str, Callable[..., Recipe]] = {
    "safest": safest,
    "fastest": fastest,
    "dinov2": dinov2,
    "sr_ste": sr_ste,
    "fst": fst,
    "s_ste": s_ste,
    "step": step,
}
"""The presets by name."""
