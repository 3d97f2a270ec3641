"""Writes docs/errors.md from the docstrings of semisparse.errors: one heading, so one anchor, per class."""

import inspect
from pathlib import Path

from semisparse import errors

PAGE = Path(__file__).with_name("errors.md")
HEAD = """# Errors

What each error means and what to do. Every message names the argument, the value that was given and a way out; the
classes tell kinds of mistakes apart, for handlers. All are in `semisparse.errors`, and each is also the builtin
exception that is named with it. A traceback names the section of this page. `python docs/errors_page.py` writes the
page from their docstrings.
"""


def entries() -> dict[str, type]:
    """The classes of semisparse.errors by name, in the order of the file."""
    return {name: value for name, value in vars(errors).items() if inspect.isclass(value)}


def section(name: str, cls: type) -> str:
    """The heading of one class, what it is besides, and the paragraphs of its docstring, one line each."""
    builtin = next(base for base in cls.__mro__ if base.__module__ == "builtins")
    paragraphs = [" ".join(text.split()) for text in (inspect.getdoc(cls) or "").split("\n\n")]
    body = "\n\n".join(paragraphs)
    return f"## {name}\n\nAlso: `{builtin.__name__}`\n\n{body}\n"


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *(section(name, cls) for name, cls in entries().items())])


if __name__ == "__main__":
    PAGE.write_text(page())
