"""Semi-sparse layers whose weights tensor parallelism shards over two processes. Imported by spawned workers."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from semisparse import Phase, SparseConfig, SparseSchedule, sparsify
from semisparse.errors import SemiSparseError
from semisparse.testing import small_integers

WORLD = 2
CONFIGS = {
    "transposable": SparseConfig(),
    "row": SparseConfig(weight="row"),
    "activation": SparseConfig(weight=None, activation="transposable"),
}
EXACT = {"fp8": SparseConfig(precision="fp8"), "mvue": SparseConfig(grad_output="mvue")}


def net(config: SparseConfig, hidden: int = 24) -> nn.Sequential:
    """Weights are small integers, so that sums are exact in any order."""
    model = nn.Sequential(nn.Linear(16, hidden), nn.ReLU(), nn.Linear(hidden, 8)).double()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-9, 10, parameter.shape, generator=generator))
    sparsify(model, config, select="*")
    return model


def parallel(model: nn.Module) -> nn.Module:
    return parallelize_module(
        model, init_device_mesh("cpu", (WORLD,)), {"0": ColwiseParallel(), "2": RowwiseParallel()}
    )


def once(model: nn.Module) -> list[Tensor]:
    """Output and all gradients of one forward and backward."""
    x, grad = (small_integers((4, 3, size), seed=size, dtype=torch.float64) for size in (16, 8))
    x.requires_grad_()
    y = model(x)
    y.backward(grad)
    gradients = [parameter.grad for parameter in model.parameters()]
    whole = [one.full_tensor() if isinstance(one, DTensor) else one for one in gradients]
    return [one.detach().clone() for one in (y, x.grad, *whole)]


def steps(model: nn.Module) -> list[Tensor]:
    """Losses of a schedule that ends dense."""
    schedule = SparseSchedule(model, [Phase("sparse", 2), Phase("dense", 1)])
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0**-10)
    losses = []
    for _ in range(3):
        loss = model(torch.ones(4, 16, dtype=torch.float64)).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.detach().clone())
    return losses


def layer(style: type[ColwiseParallel] | type[RowwiseParallel] | None, config: SparseConfig) -> list[Tensor]:
    """Output and gradients of one layer whose numbers e4m3 holds exactly; the weight's gradient last."""
    model = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(small_integers(parameter.shape, seed=seed, limit=9))
    if style is not None:
        parallelize_module(model, init_device_mesh("cpu", (WORLD,)), {"0": style()})
    sparsify(model, config, select="*")
    x, grad = (small_integers((16, 64), seed=seed) for seed in (7, 8))
    x.requires_grad_()
    y = model(x if style is not RowwiseParallel else x.chunk(WORLD, dim=1)[torch.distributed.get_rank()])
    if style is ColwiseParallel:  # the output is this rank's part
        y.backward(grad.chunk(WORLD, dim=1)[torch.distributed.get_rank()])
    else:
        y.backward(grad)
    weight, bias = (one.full_tensor() if isinstance(one, DTensor) else one for one in
                    (parameter.grad for parameter in model.parameters()))  # fmt: skip
    return [one.detach().clone() for one in (y, x.grad, bias, weight)]


def ended(hidden: int, called: str) -> str:
    """The error of a model whose parts do not hold whole tiles, or of a call around what prepares inputs."""
    model = parallel(net(SparseConfig(), hidden))
    try:
        if called == "forward":
            model[0].forward(torch.ones(4, 16, dtype=torch.float64))
        else:
            model(torch.ones(4, 16, dtype=torch.float64))
    except SemiSparseError as error:
        return type(error).__name__
    return ""


def compiled() -> tuple[list[Tensor], int]:
    """As once, of a compiled model, and how often its graph breaks."""
    model = parallel(net(SparseConfig()))
    model.compile(backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    return once(model), sum(torch._dynamo.utils.counters["graph_break"].values())


def checks() -> dict[str, object]:
    """What one process of two sees."""
    return {
        "once": {name: once(parallel(net(config))) for name, config in CONFIGS.items()},
        "compiled": compiled(),
        "steps": steps(parallel(net(SparseConfig()))),
        "layers": {
            f"{style.__name__} {name}": layer(style, config)
            for style in (ColwiseParallel, RowwiseParallel)
            for name, config in EXACT.items()
        },
        "straddled": ended(20, "model"),
        "plain input": ended(24, "forward"),
        "fits": ended(24, "model"),
    }
