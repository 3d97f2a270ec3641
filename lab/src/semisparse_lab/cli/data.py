"""`semisparse-lab data`: text for training, prepared once."""

from pathlib import Path
from typing import Annotated

import typer

from semisparse.cli.common import typed_errors

LINUX = Path("linux-tokens")
"""Where the commands put the tokens of the kernel's source."""

_PARTS = 10
"""Lines of progress per step, at most."""


def linux(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for texts, tokenizer and tokens.")] = LINUX,
    archive: Annotated[
        Path | None, typer.Option(help="A linux-source-6.1.tar.xz, or a .deb with it (default: apt-get download).")
    ] = None,
    share: Annotated[
        float | None, typer.Option(min=0.001, max=1, help="Of the files to train on (default: what a bundle holds).")
    ] = None,
    bundle: Annotated[Path | None, typer.Option(help="Also pack the tokens here, for another machine.")] = None,
) -> None:
    """Source and documentation of the Linux kernel as tokens. Three minutes, 1 GB; a second call only checks."""
    with typed_errors(context):
        from semisparse_lab.data.bundle import pack
        from semisparse_lab.data.tokens import SHARE, prepare

        progress = _Progress()
        manifest = prepare(out, archive, share=SHARE if share is None else share, say=typer.echo, on_progress=progress)
        for part, count in manifest["tokens"].items():
            size = manifest["bytes"][part]
            typer.echo(f"{part}: {manifest['source_files'][part]:,} files, {size:,} bytes, {count:,} tokens, "
                       f"{size / count:.3f} bytes per token")  # fmt: skip
        if bundle is not None:
            typer.echo(f"{bundle}: {pack(out, bundle, progress, typer.echo) / 2**20:.1f} MiB")


def unpack(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(help="A folder that `data linux --bundle` made.")],
    out: Annotated[Path, typer.Option(help="Folder for the tokens.")] = LINUX,
) -> None:
    """Unpack a bundle of tokens. Ten seconds."""
    with typed_errors(context):
        from semisparse_lab.data.bundle import unpack as unpack_bundle

        unpack_bundle(bundle, out, typer.echo)


def build_group() -> typer.Typer:
    """The commands under `data`."""
    group = typer.Typer(no_args_is_help=True, help="Prepare text to train on.")
    group.command("linux")(linux)
    group.command("unpack")(unpack)
    return group


class _Progress:
    """Prints a line at each tenth of a step."""

    def __init__(self) -> None:
        self._told = ("", 0)

    def __call__(self, what: str, done: int, total: int) -> None:
        part = _PARTS * done // max(1, total)
        if self._told[0] != what:
            self._told = (what, 0)
        if part > self._told[1]:
            self._told = (what, part)
            typer.echo(f"  {what}: {done:,} of {total:,}")
