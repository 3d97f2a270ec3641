"""The named recipes. Each is a Recipe; what it leaves out of its paper is said here.

Which products are sparse, for a layer y = x W~^T with M tokens (on CUDA, where the sizes allow; exact everywhere):

    recipe    forward    input gradient                    weight gradient
    dinov2    sparse     sparse                            dense
    sr_ste    sparse     sparse; dense with mask="row"     dense
    fst       sparse     sparse                            dense (the paper prunes dy too, by MVUE: that comes later)
    s_ste     sparse     dense: the mask is row-wise       dense (as fst)
    step      sparse     dense with mask="row"             dense

In a dense phase all three are dense.
"""

from collections.abc import Callable

from semisparse.config import Backend, SparseConfig
from semisparse.masks import MaskName
from semisparse.recipes.recipe import Recipe


def dinov2(*, sparse_fraction: float = 0.7, backend: Backend = "auto") -> Recipe:
    """Exact transposable masks chosen at every forward, straight-through gradients; sparse first, dense for the rest.

    The recipe with which torchao's authors trained a DINOv2 ViT-L, its MLP layers sparse (select="mlp"), with 70 % of
    the steps sparse: README of torchao.sparsity.training. Its masks were greedy by signed value; these are exact.
    """
    return Recipe(name="dinov2", config=SparseConfig(backend=backend), sparse_fraction=sparse_fraction)


def sr_ste(
    *, decay: float = 2e-4, sparse_fraction: float = 1.0, mask: MaskName = "transposable", backend: Backend = "auto"
) -> Recipe:
    """Masks chosen at every forward; pruned weights decay: gradient + decay * (1 - M) * W. arXiv 2102.04010.

    The paper's mask is row-wise, which mask="row" gives; the default is transposable, so that the input gradient is a
    sparse product too. The paper adds the term in the backward pass, this recipe after clipping (see MaskedDecay).
    decay: the paper's value, chosen for SGD; Adam divides the term by its own scale.
    """
    config = SparseConfig(weight=mask, backend=backend)
    return Recipe(name="sr_ste", config=config, sparse_fraction=sparse_fraction, decay=decay)


def fst(
    *, decay: float = 6e-5, refresh_every: int = 40, sparse_fraction: float = 5 / 6, backend: Backend = "auto"
) -> Recipe:
    """Transposable masks held for refresh_every applied steps, decay of pruned weights, dense for the last sixth.

    arXiv 2404.01847, for the feed-forward layers of a transformer. The decay is added to gradients after they were
    unscaled and clipped. To be chosen for each model, with the flip rate (see MaskMetrics) as a guide; the default is
    what the authors' code uses for its smallest GPT-2. The paper also prunes dy for a sparse weight gradient (MVUE);
    here the weight gradient is dense.
    """
    config = SparseConfig(backend=backend)
    return Recipe(name="fst", config=config, sparse_fraction=sparse_fraction, decay=decay, refresh_every=refresh_every)


def s_ste(*, sparse_fraction: float = 1.0, backend: Backend = "auto") -> Recipe:
    """Continuous pruning: the two largest of each 4 along K, shrunk by the third, times a scale frozen at the start.

    arXiv 2409.09099. No decay, and no dense phase unless sparse_fraction asks for one: going dense replaces the shrunk
    weight by W itself, which is a jump. The scale of each weight, <W, S> / <S, S>, is taken when the recipe starts. The
    paper also prunes dy (MVUE) and multiplies in fp8; here the weight gradient is dense and the dtype yours.
    """
    return Recipe(name="s_ste", config=SparseConfig(weight="soft", backend=backend), sparse_fraction=sparse_fraction)


def step(*, dense_range: tuple[float, float] = (0.1, 0.5), mask: MaskName = "row", backend: Backend = "auto") -> Recipe:
    """Dense until Adam's second moment has settled, then sparse with that moment frozen. arXiv 2302.01172.

    Needs StepAdamW. AutoSwitch: the switch comes when the change of the second moment, |v_t - v_{t-1}| averaged over
    all sparse weights and over the last 1 / (1 - beta2) steps, is below Adam's eps (looked at every tenth step); not
    before and not after the shares of all steps in dense_range, as the paper recommends. A run shorter than that
    window switches at the latest step. Made for accuracy: the dense phase saves no time.
    """
    config = SparseConfig(weight=mask, backend=backend)
    return Recipe(name="step", config=config, dense_range=dense_range)


PRESETS: dict[str, Callable[..., Recipe]] = {
    "dinov2": dinov2,
    "sr_ste": sr_ste,
    "fst": fst,
    "s_ste": s_ste,
    "step": step,
}
"""The presets by name."""
