"""Figures with a layout in inches, and self-contained HTML pages.

Free of torch. Figures use matplotlib's objects and not its global state. No text is parsed as mathematics or markup.
A character that the installed fonts lack is drawn as its code in a PNG, and kept in an SVG, because the reader's
fonts may have it.
"""

from __future__ import annotations

import html
import io
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from threading import Lock
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font, get_font_names
from matplotlib.text import Text

FOREGROUND, MUTED, BACKGROUND, GRID_COLOUR = "#2b2b33", "#63636f", "#ffffff", "#d9d9e0"
SVG_NAMESPACE = "http://www.w3.org/2000/svg"
_matplotlib_lock = Lock()  # matplotlib's font objects are shared and not thread-safe


@dataclass
class FigureBuilder:
    """A figure under construction.

    Positions and sizes are in inches, so that they do not depend on the size of the figure.
    """

    width: float
    height: float
    figure: Figure = field(default_factory=lambda: Figure(facecolor=BACKGROUND))
    escaped: list[tuple[Text, str]] = field(
        default_factory=list
    )  #: texts with escaped glyphs, and their originals

    def __post_init__(self) -> None:
        self.figure.set_size_inches(self.width, self.height)

    def add_axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Add axes at a distance from the upper left corner."""
        bottom = self.height - top - height
        box = (left / self.width, bottom / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(box)
        axes.tick_params(length=2.5, width=0.6, color=FOREGROUND, labelcolor=FOREGROUND, labelsize=8)
        for spine in axes.spines.values():
            spine.set(color=GRID_COLOUR, linewidth=0.8)
        return axes

    def add_text(self, left: float, top: float, text: str, **style: Any) -> None:
        """Add text at a distance from the upper left corner. Characters without a glyph are escaped."""
        drawable_text = escape_missing_glyphs(text)
        position = (left / self.width, 1 - top / self.height)
        artist = self.figure.text(
            *position, drawable_text, parse_math=False, **({"color": FOREGROUND} | style)
        )
        if drawable_text != text:
            self.escaped.append((artist, text))


DrawFunction = Callable[[], FigureBuilder]


def render_svg(draw: DrawFunction, title: str) -> str:
    """Return a drawing as SVG. Text remains text, shown in the reader's fonts."""
    out = io.StringIO()
    settings = {**_fonts(), "svg.fonttype": "none", "svg.hashsalt": "palimpsest"}
    with _matplotlib_lock, mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", r"Glyph \d+ .* missing"
        )  # of the originals, which are not drawn here
        builder = draw()
        for artist, original in builder.escaped:
            artist.set_text(original)
        FigureCanvasSVG(builder.figure).print_svg(out, metadata={"Date": None, "Title": title})
    return out.getvalue()


def render_png(draw: DrawFunction, dpi: int = 160) -> bytes:
    """Return a drawing as PNG."""
    out = io.BytesIO()
    with _matplotlib_lock, mpl.rc_context(_fonts()):
        figure = draw().figure
        figure.set_dpi(dpi)
        FigureCanvasAgg(figure).print_png(out)
    return out.getvalue()


# Pages


def html_page(title: str, body: str) -> str:
    """Return a self-contained page. `title` is text and `body` is HTML."""
    # the escaped title cannot contain the second placeholder
    return PAGE_TEMPLATE.replace("<!--title-->", html.escape(title)).replace("<!--body-->", body)


def html_paragraphs(lines: list[str]) -> str:
    """Return each line as a paragraph."""
    return "".join(f"<p>{html.escape(line)}</p>\n" for line in lines)


def inline_svg(svg_source: str) -> str:
    """Return an SVG as an HTML figure."""
    return f"<figure>{svg_source[svg_source.index('<svg') :]}</figure>\n"


def html_table(columns: Sequence[str], rows: Sequence[Sequence[str | float | None]]) -> str:
    """Return an HTML table. None is shown as a dash."""
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
    """Return text on one line: line ends and tabs as symbols, other control characters as codes."""
    text = text.strip(" ") or text.replace(" ", "␣")
    symbols = {"\n": "↵", "\t": "⇥"}
    return "".join(
        symbols.get(c) or (f"U+{ord(c):04X}" if unicodedata.category(c)[0] == "C" else c) for c in text
    )


def shorten(text: str, length: int) -> str:
    """Return text cut to a number of characters as they are drawn."""
    if len(escape_missing_glyphs(text)) <= length:
        return text
    ends = accumulate(len(escape_missing_glyphs(c)) for c in text)
    return text[: sum(end < length for end in ends)] + "…"


def escape_missing_glyphs(text: str) -> str:
    """Return text with the codes of characters that no installed font has."""
    return "".join(c if ord(c) in _glyphs() else f"\\u{ord(c):04x}" for c in text)


def _fonts() -> dict[str, Any]:
    return {"font.family": list(_families()), "text.usetex": False}


@lru_cache
def _families() -> tuple[str, ...]:
    """Return DejaVu, which matplotlib ships, and the installed fonts for other scripts."""
    installed = set(get_font_names())
    return (
        "DejaVu Sans",
        *(f for f in ("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans Arabic") if f in installed),
    )


@lru_cache
def _glyphs() -> frozenset[int]:
    return frozenset(code for family in _families() for code in get_font(findfont(family)).get_charmap())


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
