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

INK, SOFT, PAPER, RULE = "#2b2b33", "#63636f", "#ffffff", "#d9d9e0"
SVG = "http://www.w3.org/2000/svg"
_drawing = Lock()  # matplotlib's fonts are shared and not safe between threads


@dataclass
class Sheet:
    """A figure under construction, and the texts of its SVG that the fonts here cannot draw.

    Sizes are in inches, so that cells and letters keep their size whatever the sheet's.
    """

    width: float
    height: float
    figure: Figure = field(default_factory=lambda: Figure(facecolor=PAPER))
    spoken: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.figure.set_size_inches(self.width, self.height)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes at inches from the upper left corner."""
        bottom = self.height - top - height
        box = (left / self.width, bottom / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(box)
        axes.tick_params(length=2.5, width=0.6, color=INK, labelcolor=INK, labelsize=8)
        for spine in axes.spines.values():
            spine.set(color=RULE, linewidth=0.8)
        return axes

    def write(self, left: float, top: float, text: str, **style: Any) -> None:
        """Text at inches from the upper left corner. Nothing in it is read as mathematics."""
        drawn = drawable(text)
        name = f"text-{len(self.figure.texts)}"
        at = (left / self.width, 1 - top / self.height)
        self.figure.text(*at, drawn, parse_math=False, gid=name, **({"color": INK} | style))
        if drawn != text:
            self.spoken[name] = text


Draw = Callable[[], Sheet]


def svg(draw: Draw, title: str) -> str:
    """What `draw` draws as SVG with real text, in the reader's fonts."""
    out = io.StringIO()
    with _drawing, mpl.rc_context({**_fonts(), "svg.fonttype": "none", "svg.hashsalt": "palimpsest"}):
        sheet = draw()
        FigureCanvasSVG(sheet.figure).print_svg(out, metadata={"Date": None, "Title": title})
    return _respoken(out.getvalue(), sheet.spoken)


def png(draw: Draw, dpi: int = 160) -> bytes:
    """What `draw` draws as PNG."""
    out = io.BytesIO()
    with _drawing, mpl.rc_context(_fonts()):
        figure = draw().figure
        figure.set_dpi(dpi)
        FigureCanvasAgg(figure).print_png(out)
    return out.getvalue()


# Pages


def page(title: str, body: str) -> str:
    """A page that needs nothing else; `body` is markup, `title` is text."""
    # filled in text is escaped and cannot hold the other mark
    return PAGE.replace("<!--title-->", html.escape(title)).replace("<!--body-->", body)


def paragraphs(lines: list[str]) -> str:
    return "".join(f"<p>{html.escape(line)}</p>\n" for line in lines)


def inline(drawing: str) -> str:
    """An SVG as a figure of a page."""
    return f"<figure>{drawing[drawing.index('<svg') :]}</figure>\n"


def table(columns: Sequence[str], rows: Sequence[Sequence[str | float | None]]) -> str:
    """A table as markup; what is not known is a dash."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    lines = ("".join(f"<td>{html.escape(_cell(value))}</td>" for value in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n"


def _cell(value: str | float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else visible(str(value))


# Texts


def visible(text: str) -> str:
    """On one line and without what steers a display: line ends and tabs as signs, other controls as codes."""
    text = text.strip(" ") or text.replace(" ", "␣")
    signs = {"\n": "↵", "\t": "⇥"}
    return "".join(
        signs.get(c) or (f"U+{ord(c):04X}" if unicodedata.category(c)[0] == "C" else c) for c in text
    )


def cut(text: str, length: int) -> str:
    """At most so many characters as they are drawn."""
    if len(drawable(text)) <= length:
        return text
    ends = accumulate(len(drawable(c)) for c in text)
    return text[: sum(end < length for end in ends)] + "…"


def drawable(text: str) -> str:
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


def _respoken(drawing: str, spoken: dict[str, str]) -> str:
    """An SVG with some texts exchanged, by the names of their groups."""
    if not spoken:
        return drawing
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(drawing)
    for name, text in spoken.items():
        for element in root.iterfind(f".//{{{SVG}}}g[@id='{name}']//{{{SVG}}}text"):
            element.text = text
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True)


PAGE = """<!doctype html>
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
