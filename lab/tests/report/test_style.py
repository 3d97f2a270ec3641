"""Pictures can be read on light and dark pages."""

import pytest

from semisparse_lab.report import style

GRAPHICS = 3.0
"""Least contrast of graphics and large text by WCAG 2.1 (1.4.11 and 1.4.3)."""


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2.1 defines it."""
    shares = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return sum(weight * share for weight, share in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted(map(luminance, (one, other)))
    return (lighter + 0.05) / (darker + 0.05)


def test_contrast_is_that_of_the_definition() -> None:
    assert contrast("#FFFFFF", "#000000") == pytest.approx(21)


@pytest.mark.parametrize("page", style.PAGES)
@pytest.mark.parametrize("colour", [style.INK, *style.COLOURS[:3]])
def test_ink_and_the_first_colours_are_seen_on_light_and_dark_pages(colour: str, page: str) -> None:
    assert contrast(colour, page) >= GRAPHICS


def test_ink_is_as_far_from_light_as_from_dark_pages() -> None:
    one, other = (contrast(style.INK, page) for page in style.PAGES)
    next_grey = abs(contrast("#787878", style.PAGES[0]) - contrast("#7A7A7A", style.PAGES[0]))
    assert abs(one - other) < 2 * next_grey


def test_a_legend_has_a_panel_for_itself() -> None:
    with style.figure(4) as figure:
        curves, place = figure.subplots(1, 2)
        curves.plot([0, 1], label="a line")
        style.legend_in(place, curves)
        figure.canvas.draw()
        assert [text.get_text() for text in place.get_legend().get_texts()] == ["a line"]
        assert not place.get_legend().get_window_extent().overlaps(curves.get_window_extent())
