"""`semisparse plan`: which linear layers gain, measured here; without a GPU, what is known of others."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from semisparse.cli.common import console, typed_errors

if TYPE_CHECKING:
    from semisparse import Plan
    from semisparse.planning.packing import Packing
    from semisparse.planning.problems import LayerUse, LinearProblem

_LARGEST = 2**31


def plan(
    context: typer.Context,
    shapes: Annotated[list[str] | None, typer.Option(metavar="M,K,N", help="Layers: tokens, in, out features.")] = None,
    more: Annotated[list[str] | None, typer.Argument(metavar="[M,K,N]...", help="More layers, after --shapes.")] = None,
    timm: Annotated[str | None, typer.Option(metavar="NAME", help="A model of timm instead.")] = None,
    batch: Annotated[int, typer.Option(help="Images per step of the timm model.")] = 64,
    mode: Annotated[str, typer.Option(help="How you train: eager, graph (captured) or compiled.")] = "eager",
    pack: Annotated[str, typer.Option(help="When you pack: each_forward or per_step.")] = "each_forward",
    accumulation: Annotated[int, typer.Option(help="Micro-batches per optimizer step.")] = 1,
    candidates: Annotated[
        list[str] | None, typer.Option(help="What to compare with dense: 2:4, for example. Default: all.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Budget for measuring.")] = None,
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="Keep the plan, for Plan.load.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Measure which layers gain from 2:4 and fp8 on this GPU; without one, print what was measured on others."""
    with typed_errors(context):
        import torch

        from semisparse.arguments import check_budget, check_choice
        from semisparse.planning.candidates import as_candidates
        from semisparse.planning.packing import Packing
        from semisparse.planning.timing import Mode

        check_choice("mode", mode, Mode)
        check_budget(seconds)
        as_candidates(candidates)
        packing = Packing(cast(Any, pack), accumulation)
        uses = _uses([*(shapes or []), *(more or [])], timm, batch)
        if torch.cuda.is_available():
            _check_folder(save)
            made = _measured(uses, mode, packing, candidates, seconds)
            try:
                _keep(made, save)
            finally:  # what was measured is not lost with the file
                _print_plan(made, as_json)
        else:
            _refuse_save(save)
            _print_known(uses, mode, packing, as_json)


def _uses(shapes: list[str], timm: str | None, batch: int) -> "tuple[LayerUse, ...]":
    from semisparse.errors import ConfigError
    from semisparse.planning.problems import LayerUse

    if bool(shapes) == (timm is not None):
        raise ConfigError(
            "name either layers, as in shapes=16384,4096,11008, or a model, as in timm=vit_large_patch16_224"
        )
    if timm is not None:
        return _of_timm(timm, batch)
    problems = dict.fromkeys(_problem(text) for text in shapes)
    return tuple(LayerUse(one.size, one.in_features, one.out_features, ((one, 1.0),)) for one in problems)


def _problem(text: str) -> "LinearProblem":
    from semisparse.errors import ConfigError
    from semisparse.planning.problems import LinearProblem

    try:
        tokens, in_features, out_features = (int(part) for part in text.split(","))
    except ValueError:
        tokens = in_features = out_features = 0
    if not all(0 < size < _LARGEST for size in (tokens, in_features, out_features)):
        raise ConfigError(f"shapes={text!r} is not M,K,N, three positive sizes, as in 16384,4096,11008")
    return LinearProblem(tokens, in_features, out_features)


def _of_timm(name: str, batch: int) -> "tuple[LayerUse, ...]":
    """The layers of a model of timm, from a forward on the device meta."""
    import torch

    from semisparse.errors import ConfigError
    from semisparse.planning.collect import from_forward
    from semisparse.surgery.selection import closest

    if batch < 1:
        raise ConfigError(f"batch={batch} must be positive")
    try:
        import timm
    except ImportError as error:
        raise ConfigError(f"timm={name!r} needs the package timm ({error}): pip install timm") from None
    if not timm.is_model(name):
        near = ", ".join(closest(name, timm.list_models()))
        raise ConfigError(f"timm={name!r} is no model of timm {timm.__version__}; closest: {near}")
    with torch.device("meta"):
        model = timm.create_model(name).to(torch.bfloat16)
        images = torch.empty(batch, *model.pretrained_cfg["input_size"], dtype=torch.bfloat16)
        return from_forward(model, (images,), {})


def _measured(
    uses: "tuple[LayerUse, ...]",
    mode: Any,
    packing: "Packing",
    candidates: list[str] | None,
    seconds: float | None,
) -> "Plan":
    import torch

    from semisparse._plan import planned
    from semisparse.planning.candidates import as_candidates
    from semisparse.planning.measuring import Measurer
    from semisparse.planning.store import PlanStore

    def tell(line: str) -> None:
        typer.echo(line, err=True)

    device = torch.device("cuda", torch.cuda.current_device())
    return planned(uses, Measurer(as_candidates(candidates), mode, device, PlanStore(), seconds, tell, packing))


def _print_plan(made: "Plan", as_json: bool) -> None:
    from rich.table import Table

    from semisparse.planning.files import document
    from semisparse.planning.text import grouped, sums

    if as_json:
        typer.echo(json.dumps(document(made), indent=1))
        return
    names = ["dense", *made.candidates]
    table = Table("layer", "M x K x N", box=None, header_style="bold")
    for name in names:
        table.add_column(f"{name} ms", justify="right")
    table.add_column("choice, or why dense")
    for name, rows in grouped(made):
        row = rows[0]
        size = ", ".join(problem.size for problem, _ in row.calls)
        ms = [f"{len(rows) * made.time_of(row.times[one]):.3f}" if one in row.times else "" for one in names]
        table.add_row(name, size, *ms, row.choice if row.config else row.why)
    out = console()
    out.print(table)
    for line in sums(made):
        out.print(line)


def _check_folder(save: Path | None) -> None:
    """Before minutes are spent on measuring."""
    from semisparse.errors import PlanError

    if save is not None and (save.is_dir() or not save.parent.is_dir()):
        raise PlanError(f"save={str(save)!r} cannot be written: name a file in a folder that exists")


def _keep(made: "Plan", save: Path | None) -> None:
    from semisparse.errors import PlanError

    try:
        if save is not None:
            made.save(save)
    except OSError as error:
        raise PlanError(f"save={str(save)!r} cannot be written: {error.strerror or error}") from error


def _refuse_save(save: Path | None) -> None:
    from semisparse.errors import PlanError

    if save is not None:
        raise PlanError(f"save={str(save)!r}: there is no CUDA GPU here, so there is no plan to keep")


def _print_known(uses: "tuple[LayerUse, ...]", mode: Any, packing: "Packing", as_json: bool) -> None:
    """What we measured near these layers, by GPU, and published ratios of other GPUs."""
    from dataclasses import asdict

    from semisparse.planning import known
    from semisparse.planning.packing import EACH_FORWARD

    problems = list(dict.fromkeys(problem for use in uses if not use.stays for problem, _ in use.calls))
    gpus = list(dict.fromkeys(layer.gpu for layer in known.known_layers()))
    found = {gpu: {problem: known.near(problem, gpu, mode) for problem in problems} for gpu in gpus}
    if as_json:
        layers = [
            {"gpu": gpu, "problem": problem.to_record(), "measured": None if layer is None else asdict(layer)}
            for gpu, near in found.items()
            for problem, layer in near.items()
        ]
        published = [asdict(one) for one in known.PUBLISHED]
        content = {
            "gpu": None,
            "mode": mode,
            "packing": asdict(EACH_FORWARD),
            "layers": layers,
            "published": published,
            "source": known.SOURCE,
        }
        typer.echo(json.dumps(content, indent=1))
        return
    out = console()
    out.print("No CUDA GPU here: nothing was measured, and this is no plan.\n")
    if packing != EACH_FORWARD:
        out.print("What follows was measured with packing at each forward, for one micro-batch.\n")
    for gpu, near in found.items():
        versions = ", ".join(sorted({layer.torch for layer in known.known_layers() if layer.gpu == gpu}))
        out.print(
            f"{gpu}, measured by us: mode {mode}, torch {versions}, forward + backward of a bf16 layer with bias;"
        )
        out.print("how many times faster than dense:")
        out.print(_known_table(near))
        out.print("")
    out.print("Other GPUs, not run by us; no prediction per layer. Products alone, without pruning, packing and weight")
    out.print("gradient, so that a layer gains less; how many times faster than dense, median (p10 to p90):")
    out.print(_published_table())
    out.print(f"Source: {known.SOURCE}.")


def _known_table(near: "dict[LinearProblem, Any]") -> Any:
    from rich.table import Table

    from semisparse.planning.candidates import DENSE, default_candidates

    names = list(default_candidates())
    table = Table("M x K x N", "measured at M =", box=None, header_style="bold")
    for heading in ("dense ms", *names):
        table.add_column(heading, justify="right")
    for problem, layer in near.items():
        if layer is None:
            table.add_row(problem.size, "not measured", "", *("" for _ in names))
            continue
        dense = layer.ms[DENSE]
        ratios = (f"{dense / layer.ms[name]:.2f}" if name in layer.ms else "" for name in names)
        table.add_row(problem.size, str(layer.mkn[0]), f"{dense:.3f}", *ratios)
    return table


def _published_table() -> Any:
    from rich.table import Table

    from semisparse.planning.known import PUBLISHED

    table = Table("GPU", box=None, header_style="bold")
    for heading in ("bf16, 2:4", "fp8, 2:4 / dense fp8", "fp8 + 2:4 / dense bf16"):
        table.add_column(heading, justify="right")
    for one in PUBLISHED:
        table.add_row(one.gpu, *one.cells)
    return table
