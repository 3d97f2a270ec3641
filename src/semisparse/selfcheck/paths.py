"""The paths that are checked, each against the specification. A path that cannot run here raises NotHere."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from semisparse import native, ops
from semisparse.config import SparseConfig
from semisparse.formats.layout import FP8, sm90_layout
from semisparse.formats.packed import packed_format
from semisparse.gemm.engine import engine
from semisparse.nn.packed_weights import PackedWeights
from semisparse.pattern import GROUP, KEPT, TRANSPOSABLE_TILES
from semisparse.reference import linear as reference
from semisparse.reference import masks
from semisparse.routes import why_not_fp8
from semisparse.selfcheck.comparing import Found, as_good_as_torch, same_bits
from semisparse.selfcheck.drawing import mean_of_draws
from semisparse.selfcheck.operands import (
    Setting,
    Step,
    build,
    drawn_sample,
    in_16_bits,
    in_fp8,
    normal_step,
    whole_step,
)

BF16, FP16 = torch.bfloat16, torch.float16
Path = Callable[[Setting], Found]

ORACLE = "0: the kept magnitude of each tile is that of the best of all 90, and of each group that of its two largest"
NATIVE = "none of the values may differ between launches by the native library and by Python"
PER_STEP = "none of the values may differ from those with packing at each forward"
PACKED = "none of the bytes may differ from the specification's"


class NotHere(Exception):
    """A path that this machine does not have; the message says why."""


def paths() -> dict[str, Path]:
    """All paths by name, in the order in which they are checked."""
    row = SparseConfig(weight="row")
    return {
        "mask: transposable": partial(_mask, "transposable"),
        "mask: row": partial(_mask, "row"),
        "2:4, bf16": partial(_sixteen, BF16, SparseConfig()),
        "2:4, fp16": partial(_sixteen, FP16, SparseConfig()),
        "2:4, mask row, bf16": partial(_sixteen, BF16, row),
        "2:4 activation, bf16": partial(_sixteen, BF16, SparseConfig(weight=None, activation="transposable")),
        "2:4 + mvue, bf16": partial(_sixteen, BF16, SparseConfig(grad_output="mvue")),
        "mvue: mean of draws": partial(_draws, SparseConfig(grad_output="mvue")),
        "2:4, packing per step": partial(_per_step, SparseConfig()),
        "fp8 dense": partial(_fp8, SparseConfig(weight=None, precision="fp8")),
        "fp8 + 2:4": partial(_fp8, SparseConfig(precision="fp8")),
        "fp8 + 2:4, mask row": partial(_fp8, SparseConfig(weight="row", precision="fp8")),
        "fp8 + 2:4 + mvue": partial(_fp8, SparseConfig(precision="fp8", grad_output="mvue")),
        "fp8 + 2:4, normal numbers": _fp8_normal,
        "fp8: packed weight": _packed_bytes,
        "fp8 + mvue: mean of draws": partial(_draws, SparseConfig(precision="fp8", grad_output="mvue")),
        "fp8 + 2:4, packing per step": partial(_per_step, SparseConfig(precision="fp8")),
        "native launches, 2:4 + mvue": partial(_native, SparseConfig(grad_output="mvue")),
        "native launches, fp8 + 2:4": partial(_native, SparseConfig(precision="fp8")),
    }


def _mask(mask: str, setting: Setting) -> Found:
    """The pruned weight against a search of its own through all tiles, or through each group."""
    _, k, n = setting.sizes
    weight = setting.whole(n, k, seed=1, dtype=BF16, limit=127)
    pruned = ops.prune(weight, BF16, mask)
    size = weight.double().abs()
    kept = torch.where(pruned != 0, size, 0)
    if mask == "row":
        best = size.view(n, -1, GROUP).topk(KEPT, -1).values.sum(-1)
        found = kept.view(n, -1, GROUP)
        fits = (found != 0).sum(-1).le(KEPT).all()
        return _oracle(best - found.sum(-1), fits & _unchanged(pruned, weight))
    codes = torch.tensor(TRANSPOSABLE_TILES, device=setting.device)
    patterns = (codes[:, None] >> torch.arange(GROUP * GROUP, device=setting.device) & 1).double()
    best = (_tiles(size).flatten(1) @ patterns.mT).amax(1)
    found = _tiles(kept)
    fits = (found != 0).sum(1).le(KEPT).all() & (found != 0).sum(2).le(KEPT).all()
    return _oracle(best - found.flatten(1).sum(1), fits & _unchanged(pruned, weight))


def _tiles(matrix: Tensor) -> Tensor:
    """Tiles x 4 x 4."""
    n, k = matrix.shape
    return matrix.view(n // GROUP, GROUP, k // GROUP, GROUP).transpose(1, 2).reshape(-1, GROUP, GROUP)


def _unchanged(pruned: Tensor, weight: Tensor) -> Tensor:
    return ((pruned == weight) | (pruned == 0)).all()


def _oracle(missing: Tensor, fits: Tensor) -> Found:
    error = float(missing.abs().max()) if bool(fits) else float("inf")
    return Found(error, 0, "kept magnitude", ORACLE)


def _sixteen(dtype: torch.dtype, config: SparseConfig, setting: Setting) -> Found:
    """A layer in 16 bits against fp64."""
    step = normal_step(setting, _with_engine(config, setting), dtype)
    weight_mask = _mask_of(config, step)
    drawn = None if config.grad_output is None else drawn_sample(step)
    torchs, exact = (in_16_bits(step, weight_mask, one, drawn) for one in (dtype, torch.float64))
    return as_good_as_torch(step.run(), torchs, exact)


def _draws(config: SparseConfig, setting: Setting) -> Found:
    _needs_fp8(config, setting)
    return mean_of_draws(setting, _with_engine(config, setting))


def _fp8(config: SparseConfig, setting: Setting) -> Found:
    """A layer in fp8 against the equations, bit for bit."""
    _needs_fp8(config, setting)
    step = whole_step(setting, _with_engine(config, setting))
    return same_bits(step.run(), in_fp8(step, config, _mask_of(config, step)))


def _mask_of(config: SparseConfig, step: Step) -> Tensor | None:
    """What is kept of the weight, by the specification; None for all of it."""
    if config.weight is None:
        return None
    weight = step.layer.weight.detach()
    return masks.row(weight) if config.weight == "row" else masks.transposable(weight)


def _fp8_normal(setting: Setting) -> Found:
    """Sparse products of e4m3 against fp64, with torch's own fp8 products of the same codes as the measure."""
    if setting.device.type != "cuda":
        raise NotHere("the CPU computes fp8 by the specification itself")
    config = SparseConfig(precision="fp8")
    _needs_fp8(config, setting)
    if setting.no_engine:
        raise NotHere(f"no sparse products: {setting.no_engine}")
    step = normal_step(setting, _with_engine(config, setting), BF16)
    ours = step.run()
    dense = normal_step(setting, SparseConfig(precision="fp8", backend="dense"), BF16).run()
    weight = step.layer.weight.detach()
    x, dy = (reference.quantised(one) for one in (step.x, step.dy))
    w = reference.quantised(weight, masks.transposable(weight))
    exact = {
        "y": (x.values @ w.values.mT) * (x.scale * w.scale).double() + step.layer.bias.detach().double(),
        "dx": (dy.values @ w.values) * (dy.scale * w.scale).double(),
        "dW": (dy.values.mT @ x.values) * (dy.scale * x.scale).double(),
    }
    return as_good_as_torch(ours, dense, exact)


def _packed_bytes(setting: Setting) -> Found:
    """The bytes of a packed weight and its transpose against the specification's, where the layout is sm90's."""
    _needs_fp8(SparseConfig(precision="fp8"), setting)
    if setting.device.type != "cuda":
        raise NotHere("the CPU packs by the specification itself")
    _known_layout(setting)
    weight = setting.normal(192, 160, seed=5, dtype=BF16)
    names = ("W", "W^T", "scale")
    ours, expected = (
        dict(zip(names, ops.pack_fp8(one, "transposable", None), strict=True)) for one in (weight, weight.cpu())
    )
    return same_bits(ours, expected, PACKED)


def _known_layout(setting: Setting) -> None:
    found = packed_format(setting.device.index or 0, FP8, engine())
    if found.layout != sm90_layout(FP8) or found.packer != "kernel":
        raise NotHere("this GPU's layout is another one than the specification on the CPU writes")


def _per_step(config: SparseConfig, setting: Setting) -> Found:
    """Two layers with their weights packed together, against packing at each forward."""
    _needs_fp8(config, setting)
    how = _with_engine(config, setting)
    m, k, n = setting.sizes
    first, second = build(setting, how, k, n, BF16), build(setting, how, n, k, BF16)
    model = nn.Sequential(first, second)
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(setting.whole(*parameter.shape, seed=seed, dtype=BF16, limit=2))
    x = setting.whole(m, k, seed=7, dtype=BF16, limit=2)
    expected = _model_step(model, x)
    packed = PackedWeights(model)
    packed.pack()
    if packed.layers != len(model):
        why = next(iter(packed.fallbacks.values()), "16-bit weights are packed on CUDA alone")
        raise NotHere(why)
    return same_bits(_model_step(model, x), expected, PER_STEP)


def _model_step(model: nn.Module, x: Tensor) -> Mapping[str, Tensor]:
    model.zero_grad(set_to_none=True)
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    y.backward(torch.ones_like(y))
    found = {"y": y.detach(), "dx": leaf.grad, **{name: one.grad for name, one in model.named_parameters()}}
    return {name: value for name, value in found.items() if value is not None}


def _native(config: SparseConfig, setting: Setting) -> Found:
    """The same step started by C++ and by Python."""
    status = native.status()
    if setting.device.type != "cuda" or not status.loaded:
        raise NotHere("nothing is launched on the CPU" if setting.device.type != "cuda" else status.reason)
    _needs_fp8(config, setting)
    step: Step = whole_step(setting, _with_engine(config, setting))
    with _by_python():
        expected = step.run()
    step.run()  # asks Python, which hands over what it prepared
    before = native.started() + native.started_dense()
    ours = step.run()
    if native.started() + native.started_dense() == before:
        raise NotHere("the native library started no product: the choices of these sizes were not measured")
    return same_bits(ours, expected, NATIVE)


@contextmanager
def _by_python() -> Iterator[None]:
    native.watch(1)
    try:
        yield
    finally:
        native.watch(-1)


def _with_engine(config: SparseConfig, setting: Setting) -> SparseConfig:
    """The settings with sparse products that may not fall back, where there are any."""
    if not config.prunes:
        return config
    return SparseConfig(
        weight=config.weight,
        activation=config.activation,
        grad_output=config.grad_output,
        precision=config.precision,
        backend=setting.backend,
    )


def _needs_fp8(config: SparseConfig, setting: Setting) -> None:
    if config.precision is not None:
        reason = why_not_fp8(torch.empty(32, 32, device=setting.device), BF16)
        if reason:
            raise NotHere(reason)
