"""Every file that README and docs link to exists."""

import re
from pathlib import Path

import pytest

from tests.arch.source import ROOT

LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
LINKS = [
    (page, link)
    for page in PAGES
    for link in LINK.findall(page.read_text())
    if not link.startswith(("http://", "https://", "mailto:"))
]


def test_readme_links_to_the_other_pages() -> None:
    linked = {(page.parent / link).resolve() for page, link in LINKS if page == ROOT / "README.md"}
    assert {path for path in PAGES if path.parent.name == "docs"} <= linked


@pytest.mark.parametrize(("page", "link"), LINKS, ids=[f"{page.name} {link}" for page, link in LINKS])
def test_a_link_leads_to_a_file(page: Path, link: str) -> None:
    assert (page.parent / link).exists()
