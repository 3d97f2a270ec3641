"""Every file and every heading that README and docs link to exists."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from docs.site_pages import ENTRY
from tests.arch.source import ROOT

LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
HEADING = re.compile(r"^#+ (.+?)\s*$", re.MULTILINE)
README_LINES = 115
"""Two screens."""
INDEX = ROOT / "docs" / "index.md"
SITE = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "lab" / "README.md"]
PAGES = [*SITE, *sorted((ROOT / "benchmarks" / "cards").glob("*.md"))]
LINKS = [
    (page, link)
    for page in PAGES
    for link in LINK.findall(CODE.sub("", FENCED.sub("", page.read_text())))
    if not link.startswith(("http://", "https://", "mailto:"))
]


def anchors(text: str) -> Iterator[str]:
    """Those that code hosts and the site give the headings of a page; of equal headings the second gets -1."""
    seen: dict[str, int] = {}
    for heading in HEADING.findall(FENCED.sub("", text)):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        seen[slug] = seen.get(slug, -1) + 1
        yield f"{slug}-{seen[slug]}" if seen[slug] else slug


@cache
def anchors_of(page: Path) -> frozenset[str]:
    return frozenset(anchors(page.read_text()))


def test_anchors_are_those_of_code_hosts() -> None:
    page = "# torch.export and ONNX\n```bash\n# no heading\n```\n## A `name`, too\n## Fast\n## Fast\n"
    assert list(anchors(page)) == ["torchexport-and-onnx", "a-name-too", "fast", "fast-1"]


def test_the_index_of_the_site_lists_each_page_once() -> None:
    listed = [(INDEX.parent / f"{page}.md").resolve() for _, page in ENTRY.findall(INDEX.read_text())]
    assert sorted(listed) == sorted(set(SITE) - {INDEX})


def test_readme_links_to_the_index_of_the_other_pages_and_fits_two_screens() -> None:
    assert (ROOT / "README.md", "docs/index.md") in LINKS
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


@pytest.mark.parametrize(("page", "link"), LINKS, ids=[f"{page.name} {link}" for page, link in LINKS])
def test_a_link_leads_to_a_file_and_a_heading(page: Path, link: str) -> None:
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    assert target.exists()
    if anchor:
        assert anchor in anchors_of(target)
