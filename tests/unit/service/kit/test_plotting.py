"""Figures and pages: service.kit.plotting. Unusual texts are tested with the heat map."""

from __future__ import annotations

from xml.etree import ElementTree

from service.kit.plotting import SVG_NAMESPACE, FigureBuilder, html_page, html_table, inline_svg, render_svg


def figure_with_text(text: str) -> FigureBuilder:
    builder = FigureBuilder(2.0, 1.0)
    builder.add_text(0.5, 0.25, text)
    return builder


def test_positions_are_from_the_upper_left_corner() -> None:
    """Text and axes half an inch from the left and a quarter from the top have the right place in the figure."""
    assert figure_with_text("x").figure.texts[0].get_position() == (0.25, 0.75)
    box = FigureBuilder(2.0, 1.0).add_axes(0.5, 0.25, 1.0, 0.5).get_position()
    assert (box.x0, box.y0, box.width, box.height) == (0.25, 0.25, 0.5, 0.5)


def test_svg_keeps_its_texts() -> None:
    """An SVG has the original text even if the installed fonts lack a glyph."""
    root = ElementTree.fromstring(render_svg(lambda: figure_with_text("5 < 6 🗼"), "t"))
    assert "5 < 6 🗼" in [e.text for e in root.iter(f"{{{SVG_NAMESPACE}}}text")]


def test_page_escapes_its_title() -> None:
    """Markup in the title is escaped, and an inline SVG has no XML declaration."""
    page = html_page("<b>", inline_svg(render_svg(lambda: figure_with_text("x"), "t")))
    assert "<title>&lt;b&gt;</title>" in page and "<figure><svg" in page and "<?xml" not in page


def test_table_escapes_its_cells() -> None:
    """Markup in a cell is escaped, numbers have four significant digits, and None is a dash."""
    table = html_table(("a", "b"), [("<b>", 0.123456), (None, 12)])
    assert "<td>&lt;b&gt;</td><td>0.1235</td>" in table and "<td>–</td><td>12</td>" in table
