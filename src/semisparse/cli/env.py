"""`semisparse env`: versions, and the path that each capability takes."""

import typer

from semisparse.cli.common import console, typed_errors


def env(context: typer.Context) -> None:
    """Print GPU, driver and package versions, and which path each capability will take and why."""
    with typed_errors(context):
        _print_environment()


def _print_environment() -> None:
    from rich.table import Table

    from semisparse.environment import environment

    found = environment()
    facts = Table(show_header=False, box=None)
    for name, value in found.facts.items():
        facts.add_row(name, value)
    paths = Table("capability", "path", "reason", box=None, header_style="bold")
    for capability in found.capabilities:
        paths.add_row(capability.name, capability.path, capability.reason)
    out = console()
    out.print(facts)
    out.print(f"\nOn this machine's {found.device.upper()}:")
    out.print(paths)
