"""Figures and pages: paper to draw on in inches, any text on it, and a page that needs nothing else.

Free of torch. Figures are made of matplotlib's objects, not of its global state. Texts are any: nothing in them is read as
mathematics or markup, and a character that the fonts lack is written as its code in the PNG, and as itself in the SVG, whose
reader may have it.
"""

from __future__ import annotations

import html
import io
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from threading import Lock
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font, get_font_names

FOREGROUND, MUTED, BACKGROUND, GRID_COLOUR = "#2b2b33", "#63636f", "#ffffff", "#d9d9e0"
SVG_NAMESPACE = "http://www.w3.org/2000/svg"
_matplotlib_lock = Lock()  # matplotlib's fonts are shared and not safe between threads


@dataclass
class FigureBuilder:
    """A figure under construction, and the texts of its SVG that the fonts here cannot draw.

    Sizes are in inches, so that cells and letters keep their size whatever the sheet's.
    """

    width: float
    height: float
    figure: Figure = field(default_factory=lambda: Figure(facecolor=BACKGROUND))
    svg_text: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.figure.set_size_inches(self.width, self.height)

    def add_axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes at inches from the upper left corner."""
        bottom = self.height - top - height
        box = (left / self.width, bottom / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(box)
        axes.tick_params(length=2.5, width=0.6, color=FOREGROUND, labelcolor=FOREGROUND, labelsize=8)
        for spine in axes.spines.values():
            spine.set(color=GRID_COLOUR, linewidth=0.8)
        return axes

    def add_text(self, left: float, top: float, text: str, **style: Any) -> None:
        """Text at inches from the upper left corner. Nothing in it is read as mathematics."""
        drawable_text = escape_missing_glyphs(text)
        name = f"text-{len(self.figure.texts)}"
        position = (left / self.width, 1 - top / self.height)
        self.figure.text(
            *position, drawable_text, parse_math=False, gid=name, **({"color": FOREGROUND} | style)
        )
        if drawable_text != text:
            self.svg_text[name] = text


DrawFunction = Callable[[], FigureBuilder]


def render_svg(draw: DrawFunction, title: str) -> str:
    """What `draw` draws as SVG with real text, in the reader's fonts."""
    out = io.StringIO()
    with _matplotlib_lock, mpl.rc_context({**_fonts(), "svg.fonttype": "none", "svg.hashsalt": "palimpsest"}):
        builder = draw()
        FigureCanvasSVG(builder.figure).print_svg(out, metadata={"Date": None, "Title": title})
    return _restore_svg_text(out.getvalue(), builder.svg_text)


def render_png(draw: DrawFunction, dpi: int = 160) -> bytes:
    """What `draw` draws as PNG."""
    out = io.BytesIO()
    with _matplotlib_lock, mpl.rc_context(_fonts()):
        figure = draw().figure
        figure.set_dpi(dpi)
        FigureCanvasAgg(figure).print_png(out)
    return out.getvalue()


# Pages


def html_page(title: str, body: str) -> str:
    """A page that needs nothing else; `body` is markup, `title` is text."""
    # filled in text is escaped and cannot hold the other mark
    return PAGE_TEMPLATE.replace("<!--title-->", html.escape(title)).replace("<!--body-->", body)


def html_paragraphs(lines: list[str]) -> str:
    return "".join(f"<p>{html.escape(line)}</p>\n" for line in lines)


def inline_svg(svg_source: str) -> str:
    """An SVG as a figure of a page."""
    return f"<figure>{svg_source[svg_source.index('<svg') :]}</figure>\n"


def html_table(columns: Sequence[str], rows: Sequence[Sequence[str | float | None]]) -> str:
    """A table as markup; what is not known is a dash."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    lines = ("".join(f"<td>{html.escape(_cell_text(value))}</td>" for value in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n"


def _cell_text(value: str | float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else show_control_characters(str(value))


# Texts


def show_control_characters(text: str) -> str:
    """On one line and without what steers a display: line ends and tabs as signs, other controls as codes."""
    text = text.strip(" ") or text.replace(" ", "␣")
    symbols = {"\n": "↵", "\t": "⇥"}
    return "".join(
        symbols.get(c) or (f"U+{ord(c):04X}" if unicodedata.category(c)[0] == "C" else c) for c in text
    )


def truncate(text: str, length: int) -> str:
    """At most so many characters as they are drawn."""
    if len(escape_missing_glyphs(text)) <= length:
        return text
    ends = accumulate(len(escape_missing_glyphs(c)) for c in text)
    return text[: sum(end < length for end in ends)] + "…"


def escape_missing_glyphs(text: str) -> str:
    """With the codes of characters that no font at hand has."""
    return "".join(c if ord(c) in _glyphs() else f"\\u{ord(c):04x}" for c in text)


def _fonts() -> dict[str, Any]:
    return {"font.family": list(_families()), "text.usetex": False}


@lru_cache
def _families() -> tuple[str, ...]:
    """DejaVu comes with matplotlib; those after it serve other scripts where they are installed."""
    installed = set(get_font_names())
    return (
        "DejaVu Sans",
        *(f for f in ("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans Arabic") if f in installed),
    )


@lru_cache
def _glyphs() -> frozenset[int]:
    return frozenset(code for family in _families() for code in get_font(findfont(family)).get_charmap())


def _restore_svg_text(svg_source: str, svg_text: dict[str, str]) -> str:
    """An SVG with some texts exchanged, by the names of their groups."""
    if not svg_text:
        return svg_source
    ElementTree.register_namespace("", SVG_NAMESPACE)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(svg_source)
    for name, text in svg_text.items():
        for element in root.iterfind(f".//{{{SVG_NAMESPACE}}}g[@id='{name}']//{{{SVG_NAMESPACE}}}text"):
            element.text = text
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True)


PAGE_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title><!--title--></title>
<style>
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #2b2b33; background: #fff; }
body { max-width: 72rem; margin: 2.5rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.35rem; line-height: 1.3; margin: 0 0 1rem; }
p { max-width: 46rem; }
figure { margin: 2rem 0; overflow-x: auto; }
figure svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem 1.4rem .35rem 0; border-bottom: 1px solid #d9d9e0; }
th { font-weight: 600; }
</style>
</head>
<body>
<h1><!--title--></h1>
<!--body-->
</body>
</html>
"""
