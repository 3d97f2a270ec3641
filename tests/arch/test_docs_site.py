"""What the site adds to the pages, and the page of errors. Without Sphinx: `make docs` checks the rest."""

import inspect
import re

import pytest

import semisparse
from docs import errors_page, site_pages
from semisparse import errors
from tests.arch.source import ROOT
from tests.arch.test_docs_links import anchors

CLASSES = errors_page.entries()


def test_the_page_of_errors_is_what_their_docstrings_say() -> None:
    assert errors_page.PAGE.read_text() == errors_page.page(), "run: python docs/errors_page.py"


def test_each_error_has_an_anchor() -> None:
    assert {name.lower() for name in CLASSES} <= set(anchors(errors_page.PAGE.read_text()))
    assert set(CLASSES) == {name for name, value in vars(errors).items() if inspect.isclass(value)}


@pytest.mark.parametrize("cls", CLASSES.values(), ids=list(CLASSES))
def test_each_error_says_what_it_means_and_what_to_do(cls: type) -> None:
    assert len((inspect.getdoc(cls) or "").split("\n\n")) == 2


def test_the_sidebar_has_the_sections_and_entries_of_the_index_in_order() -> None:
    made = site_pages.sidebar("# T\n\n## B\n\n- [One](../x.md): `a`\n- [Two](y.md)\n\n## A\n\n- [Three](z.md)\n")
    assert re.findall(r"caption: (\w)|(\w+) <(.+)>", made) == [
        ("B", "", ""), ("", "One", "../x"), ("", "Two", "y"), ("A", "", ""), ("", "Three", "z"),
    ]  # fmt: skip


def test_links_to_folders_become_plain_names_and_others_stay() -> None:
    text = "[results](../benchmarks/results), [cards](cards.md), [fp8](fp8.md#beside)"
    plain = "results, [cards](cards.md), [fp8](fp8.md#beside)"
    assert site_pages.without_folders("docs/speed", text) == plain


def test_the_citation_names_this_version() -> None:
    assert f"\nversion: {semisparse.__version__}\n" in (ROOT / "CITATION.cff").read_text()
