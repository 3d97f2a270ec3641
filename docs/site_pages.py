"""What the site adds to the Markdown pages while Sphinx reads them, so that the files stay plain Markdown.

The order of the pages and the names in the sidebar are those of the lists in index.md; the names of the reference are
those of public.md.
"""

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from posixpath import normpath
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECTION = re.compile(r"^## (.+)$", re.MULTILINE)
ENTRY = re.compile(r"^- \[([^\]]+)\]\(([^)]+)\.md\)", re.MULTILINE)
PUBLIC = re.compile(r"^\| `(semisparse\.[\w.]+)` \| (\S.*?) \|$", re.MULTILINE)
LINK = re.compile(r"\[([^\]]+)\]\(([^)#:\s]+)\)")
CARDS = "```{toctree}\n:maxdepth: 1\n:glob:\n\n../benchmarks/cards/*\n```\n"


def sidebar(index: str) -> str:
    """Hidden tables of contents: one per section of index.md, with its heading as caption and its links as entries."""
    parts = SECTION.split(index)
    blocks = []
    for caption, text in zip(parts[1::2], parts[2::2], strict=True):
        entries = "\n".join(f"{title} <{page}>" for title, page in ENTRY.findall(text))
        blocks.append(f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```\n")
    return "\n".join(blocks)


def reference(public: str, stand_ins: list[str]) -> str:
    """autodoc's directives for the names of public.md, a section per section there."""
    from sphinx.ext.autodoc.mock import mock  # here, so that tests of the pages need no Sphinx

    parts = SECTION.split(public)
    blocks = []
    for title, text in zip(parts[1::2], parts[2::2], strict=True):
        if rows := PUBLIC.findall(text):
            with mock(stand_ins):
                directives = "".join(_directives(rows))
            blocks.append(f"## {title}\n\n```{{eval-rst}}\n{directives}```\n")
    return "\n".join(blocks)


def _directives(rows: list[tuple[str, str]]) -> Iterator[str]:
    for name, what in rows:
        module, _, last = name.rpartition(".")
        value = getattr(import_module(module), last)
        if inspect.ismodule(value):  # has a section of its own
            continue
        if inspect.isclass(value):
            bases = "" if value.__bases__ == (object,) else "   :show-inheritance:\n"
            yield f".. autoclass:: {name}\n   :members:\n{bases}\n"
        elif callable(value):
            yield f".. autofunction:: {name}\n\n"
        else:  # a constant has no docstring at run time
            yield f".. py:data:: {name}\n\n   {what}\n\n"


def without_folders(page: str, text: str) -> str:
    """The text with links to folders, which no site has, as plain names."""
    here = Path(page).parent.as_posix()

    def plain(link: re.Match[str]) -> str:
        return link[1] if (ROOT / normpath(f"{here}/{link[2]}")).is_dir() else link[0]

    return LINK.sub(plain, text)


def read(app: Any, page: str, source: list[str]) -> None:
    """Sphinx's event source-read: source holds the text of the page and may be changed in place."""
    text = without_folders(page, source[0])
    if page == "docs/index":
        text += "\n" + sidebar(text)
    elif page == "docs/tutorial":
        text += '\n<p><a href="tutorial.ipynb" download>This page as a notebook</a></p>\n'
    elif page == "docs/measurements":
        text += "\n" + CARDS
    elif page == "docs/reference":
        text += "\n" + reference((ROOT / "docs" / "public.md").read_text(), app.config.autodoc_mock_imports)
    source[0] = text


def escape(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Event autodoc-process-docstring: docstrings are plain text, where a star or a bar stands for itself."""
    lines[:] = [re.sub(r"[*|](?=[^`]*(?:`[^`]*`[^`]*)*$)", r"\\\g<0>", line) for line in lines]


def add_entrance(app: Any, error: Exception | None) -> None:
    """Sphinx's event build-finished: the site's folder opens at the first page."""
    if error is None and app.builder.name == "html":
        target = f"{app.config.root_doc}.html"
        page = (
            f'<!doctype html><meta http-equiv="refresh" content="0; url={target}"><a href="{target}">semisparse</a>\n'
        )
        (Path(app.outdir) / "index.html").write_text(page)


def add_notebook(app: Any, error: Exception | None) -> None:
    """Sphinx's event build-finished: the tutorial as a file for Jupyter, beside its page."""
    if error is None and app.builder.name == "html":
        import jupytext  # here, so that tests of the pages need no jupytext

        jupytext.write(jupytext.read(ROOT / "docs" / "tutorial.md"), Path(app.outdir) / "docs" / "tutorial.ipynb")


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls this for an extension."""
    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", escape, priority=400)  # before napoleon's, which has 500
    app.connect("build-finished", add_entrance)
    app.connect("build-finished", add_notebook)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
