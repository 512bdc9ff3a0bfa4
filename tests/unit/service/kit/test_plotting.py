"""Figures and pages: service.kit.plotting. What any text does to a figure is tested with the heat map's."""

from __future__ import annotations

from xml.etree import ElementTree

from service.kit.plotting import SVG, Sheet, inline, page, svg, table


def drawn(text: str) -> Sheet:
    sheet = Sheet(2.0, 1.0)
    sheet.write(0.5, 0.25, text)
    return sheet


def test_inches_are_counted_from_the_upper_left_corner() -> None:
    """A text half an inch from the left and a quarter from the top of a sheet of two by one."""
    assert drawn("x").figure.texts[0].get_position() == (0.25, 0.75)
    box = Sheet(2.0, 1.0).axes(0.5, 0.25, 1.0, 0.5).get_position()
    assert (box.x0, box.y0, box.width, box.height) == (0.25, 0.25, 0.5, 0.5)


def test_a_drawing_holds_its_texts_as_text() -> None:
    """The SVG has what was written, even where no font at hand has the letters."""
    root = ElementTree.fromstring(svg(lambda: drawn("5 < 6 🗼"), "t"))
    assert "5 < 6 🗼" in [e.text for e in root.iter(f"{{{SVG}}}text")]


def test_a_page_takes_its_title_as_text() -> None:
    """Markup in the title is shown, not followed; the drawing stands in the page without its own header."""
    said = page("<b>", inline(svg(lambda: drawn("x"), "t")))
    assert "<title>&lt;b&gt;</title>" in said and "<figure><svg" in said and "<?xml" not in said


def test_a_table_takes_its_cells_as_text() -> None:
    """Markup in a cell is shown; numbers have four digits, and what is not known is a dash."""
    said = table(("a", "b"), [("<b>", 0.123456), (None, 12)])
    assert "<td>&lt;b&gt;</td><td>0.1235</td>" in said and "<td>–</td><td>12</td>" in said
