"""Figures and pages: service.kit.plotting. What any text does to a figure is tested with the heat map's."""

from __future__ import annotations

from xml.etree import ElementTree

from service.kit.plotting import SVG_NAMESPACE, FigureBuilder, html_page, html_table, inline_svg, render_svg


def figure_with_text(text: str) -> FigureBuilder:
    builder = FigureBuilder(2.0, 1.0)
    builder.add_text(0.5, 0.25, text)
    return builder


def test_inches_are_counted_from_the_upper_left_corner() -> None:
    """A text half an inch from the left and a quarter from the top of a sheet of two by one."""
    assert figure_with_text("x").figure.texts[0].get_position() == (0.25, 0.75)
    box = FigureBuilder(2.0, 1.0).add_axes(0.5, 0.25, 1.0, 0.5).get_position()
    assert (box.x0, box.y0, box.width, box.height) == (0.25, 0.25, 0.5, 0.5)


def test_a_drawing_holds_its_texts_as_text() -> None:
    """The SVG has what was written, even where no font at hand has the letters."""
    root = ElementTree.fromstring(render_svg(lambda: figure_with_text("5 < 6 🗼"), "t"))
    assert "5 < 6 🗼" in [e.text for e in root.iter(f"{{{SVG_NAMESPACE}}}text")]


def test_a_page_takes_its_title_as_text() -> None:
    """Markup in the title is shown, not followed; the drawing stands in the page without its own header."""
    said = html_page("<b>", inline_svg(render_svg(lambda: figure_with_text("x"), "t")))
    assert "<title>&lt;b&gt;</title>" in said and "<figure><svg" in said and "<?xml" not in said


def test_a_table_takes_its_cells_as_text() -> None:
    """Markup in a cell is shown; numbers have four digits, and what is not known is a dash."""
    said = html_table(("a", "b"), [("<b>", 0.123456), (None, 12)])
    assert "<td>&lt;b&gt;</td><td>0.1235</td>" in said and "<td>–</td><td>12</td>" in said
