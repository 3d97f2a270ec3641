"""`semisparse-lab experiment llama-linux` and `semisparse-lab card`: time to loss on the kernel's source."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from semisparse.cli.common import typed_errors
from semisparse.stopwatch import Stopwatch
from semisparse_lab.cli.common import Device, DeviceOption
from semisparse_lab.cli.data import LINUX


class Budget(StrEnum):
    """What the arms have in equal parts."""

    TOKENS = "tokens"
    SECONDS = "seconds"


def llama_linux(
    context: typer.Context,
    data_dir: Annotated[Path, typer.Option(help="Folder that `data linux` or `data unpack` made.")] = LINUX,
    out: Annotated[Path, typer.Option(help="Folder for results.")] = Path("results-llama-linux"),
    arms: Annotated[str, typer.Option(help="Slugs, most important first, with commas (default: all).")] = "",
    seeds: Annotated[str, typer.Option(help="Whole numbers, with commas.")] = "0",
    budget: Annotated[Budget, typer.Option(help="Equal tokens, or as many steps as bf16's seconds allow.")] = (
        Budget.TOKENS
    ),
    steps: Annotated[int | None, typer.Option(min=2, help="Steps of bf16, and of all with equal tokens.")] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1.4e-4,
    hold: Annotated[float, typer.Option(help="Share of the steps that it stays there, before half a cosine.")] = 0.67,
    sparse_fraction: Annotated[float, typer.Option(help="Share of the steps that is 2:4.")] = 0.7,
    dense_start: Annotated[float, typer.Option(help="Share of the steps that is dense before these.")] = 0.0,
    refresh_every: Annotated[int, typer.Option(min=1, help="Steps for which a mask is held.")] = 1,
    layers: Annotated[str, typer.Option(help="Layers that the arms differ in: part of their names.")] = "blocks",
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Start and train nothing after this long.")] = None,
    time_only: Annotated[int | None, typer.Option(min=20, help="Only time so many steps of each phase.")] = None,
    list_runs: Annotated[bool, typer.Option("--list", help="Only print the runs and their predicted seconds.")] = False,
    small: Annotated[bool, typer.Option("--small", help="A tiny model, to see it work.")] = False,
    device: DeviceOption = Device.AUTO,
) -> None:
    """Dense bf16, torchao float8, 2:4 and fp8 + 2:4 on the kernel's source: loss against tokens and seconds."""
    elapsed = Stopwatch()
    kept: list[Path] = []
    with typed_errors(context, kept):
        from semisparse_lab.data.tokens import load_tokens
        from semisparse_lab.studies import llama_linux as study
        from semisparse_lab.studies import llama_linux_runs as runs
        from semisparse_lab.train.float8 import missing

        chosen = study.settings(
            device.value, small=small, steps=steps, lr=lr, hold=hold, layers=layers,
            sparse_fraction=sparse_fraction, dense_start=dense_start, refresh_every=refresh_every,
        )  # fmt: skip
        found = study.chosen_arms(arms, sparse_fraction, refresh_every)
        tokens = load_tokens(data_dir, chosen.train.device)
        if time_only is not None:
            ready = elapsed()
            for arm in sorted(found, key=lambda arm: arm.float8):  # torchao changes how a process compiles
                if arm.float8 and (reason := missing()):
                    typer.echo(f"{arm.title}: not timed, {reason}")
                    continue
                kept.append(runs.measure(arm, time_only, chosen, tokens, out, ready, typer.echo))
            return
        todo = runs.jobs(found, study.numbers(seeds), budget.value, chosen, tokens, out)
        if list_runs:
            typer.echo(runs.listed(todo, tokens, chosen))
        else:
            whole = 60 * minutes if minutes else float("inf")
            kept += runs.run_jobs(todo, chosen, tokens, lambda: whole - elapsed(), typer.echo)


def card(
    context: typer.Context,
    results: Annotated[Path, typer.Argument(help="Folder with results of llama-linux.")],
    out: Annotated[Path | None, typer.Option(help="Folder for card and plot (default: the results').")] = None,
) -> None:
    """Make the card of time to loss from the results that are there, and that of schedules if study-* folders are."""
    with typed_errors(context):
        from semisparse_lab.report.schedule_study import write_study
        from semisparse_lab.report.time_to_loss_card import write_card

        place = results if out is None else out
        typer.echo(write_card(results, place))
        if (schedules := write_study(results, place)) is not None:
            typer.echo(schedules)
