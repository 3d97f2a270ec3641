"""Marked places in Markdown pages, <!-- generated: NAME --> ... <!-- end -->, filled with generated text."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

_PLACE = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)


def with_blocks(text: str, blocks: Mapping[str, str]) -> str:
    """The text of a page with every marked place filled.

    Raises:
        ValueError: The page marks a place that has no block.
    """

    def block(found: re.Match[str]) -> str:
        if found[2] not in blocks:
            raise ValueError(f"<!-- generated: {found[2]} -->: there is no block of this name, only {sorted(blocks)}")
        return f"{found[1]}{blocks[found[2]]}\n{found[3]}"

    return _PLACE.sub(block, text)


def filled(pages: Iterable[Path], blocks: Mapping[str, str]) -> dict[Path, str]:
    """Path -> filled text of each page.

    Raises:
        ValueError: None of the pages has a place for a block, or a place has no block.
    """
    texts = {page: page.read_text() for page in pages}
    placed = {found[2] for text in texts.values() for found in _PLACE.finditer(text)}
    if missing := sorted(blocks.keys() - placed):
        raise ValueError(f"no page has a place for {missing}: write <!-- generated: {missing[0]} --> ... <!-- end -->")
    return {page: with_blocks(text, blocks) for page, text in texts.items()}
