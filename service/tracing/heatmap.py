"""A trace as a picture, in the manner of the paper's figures: tokens down, layers across, a map per kind.

Takes the JSON of a trace and needs no torch. Figures are made of matplotlib's objects, not its global state.
Tokens are any text: nothing in them is read as mathematics or markup, and a character that the fonts lack is
written as its code in the PNG, and as itself in the SVG, whose reader may have it.
"""

from __future__ import annotations

import html
import io
import math
import unicodedata
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
from matplotlib.ticker import MaxNLocator

Trace = dict[str, Any]

#: kind -> colour map, what is restored, what that is called on the axis
STYLES = {
    "hidden": ("Purples", "state", "single restored layer"),
    "mlp": ("Greens", "MLP", "centre of the interval of {} restored MLP layers"),
    "attn": ("Reds", "attention", "centre of the interval of {} restored attention layers"),
}
#: path that is cut -> colour and name of its bars
BARS = {
    "none": ("#6a51a3", "single state restored"),
    "attn": ("#cb181d", "with attention severed"),
    "mlp": ("#238b45", "with MLP severed"),
}
INK, SOFT, PAPER, RULE = "#2b2b33", "#63636f", "#ffffff", "#d9d9e0"
LONGEST = 22  # characters of a token that are shown
SVG = "http://www.w3.org/2000/svg"
_drawing = Lock()  # matplotlib's fonts are shared and not safe between threads


def svg(trace: Trace) -> str:
    """The maps as SVG with real text, in the reader's fonts."""
    out = io.StringIO()
    with _drawing, mpl.rc_context({**_fonts(), "svg.fonttype": "none", "svg.hashsalt": "palimpsest"}):
        sheet = _sheet(trace)
        FigureCanvasSVG(sheet.figure).print_svg(out, metadata={"Date": None, "Title": _title(trace)})
    return _respoken(out.getvalue(), sheet.spoken)


def png(trace: Trace, dpi: int = 160) -> bytes:
    """The maps as PNG."""
    out = io.BytesIO()
    with _drawing, mpl.rc_context(_fonts()):
        figure = _sheet(trace).figure
        figure.set_dpi(dpi)
        FigureCanvasAgg(figure).print_png(out)
    return out.getvalue()


def page(trace: Trace) -> str:
    """A page that needs nothing else: the maps, and the figures in words."""
    picture = svg(trace)
    words = "".join(f"<p>{html.escape(line)}</p>\n" for line in _sentences(trace))
    figure = f"<figure>{picture[picture.index('<svg') :]}</figure>\n"
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in r) + "</tr>\n" for r in _rows(trace)
    )
    body = words + figure + TABLE.replace("<!--rows-->", rows)
    # filled in text is escaped and cannot hold the other mark
    return PAGE.replace("<!--title-->", html.escape(_title(trace))).replace("<!--body-->", body)


# Drawing: sizes are in inches, so that cells and letters keep their size whatever the trace's


@dataclass
class Sheet:
    """A figure under construction, and the texts of its SVG that the fonts here cannot draw."""

    figure: Figure
    width: float
    height: float
    spoken: dict[str, str] = field(default_factory=dict)

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
        drawn = _drawable(text)
        name = f"text-{len(self.figure.texts)}"
        at = (left / self.width, 1 - top / self.height)
        self.figure.text(*at, drawn, parse_math=False, gid=name, **({"color": INK} | style))
        if drawn != text:
            self.spoken[name] = text


def _sheet(trace: Trace) -> Sheet:
    kinds: dict[str, Any] = trace["kinds"]
    rows, layers = len(trace["tokens"]), len(next(iter(kinds.values()))["scores"][0])
    labels = _labels(trace)
    margin = 0.35 + 0.078 * max(len(_drawable(label)) for label in labels)
    wide, tall = min(6.0, max(2.9, 0.115 * layers)), min(40.0, max(1.2, 0.235 * rows))
    gap, top, foot = 0.42, 1.28, 1.12
    width = max(margin + len(kinds) * (wide + gap), 6.4)
    bars = 2.5 if trace["severed"] else 0.0
    sheet = Sheet(Figure(facecolor=PAPER), width, top + tall + foot + bars)
    sheet.figure.set_size_inches(sheet.width, sheet.height)
    _head(sheet, trace)
    every = math.ceil(rows * 0.15 / tall)
    for token in range(0, rows, every):
        b, e = trace["subject"]["tokens"]
        weight = "bold" if b <= token < e else "normal"
        y = top + tall * (token + 0.5) / rows
        sheet.write(margin - 0.09, y, labels[token], ha="right", va="center", fontsize=8.5, weight=weight)
    high = max(max(map(max, kind["scores"])) for kind in kinds.values())
    limits = (trace["low"], max(high, trace["low"] + 1e-9))
    for i, kind in enumerate(kinds):
        left = margin + i * (wide + gap)
        _map(sheet, trace, kind, limits, (left, top, wide, tall))
    if trace["severed"]:
        _bars(sheet, trace, (margin, top + tall + foot + 0.3, width - margin - gap, bars - 0.85))
    return sheet


def _head(sheet: Sheet, trace: Trace) -> None:
    letters = int(
        (sheet.width - 0.4) / 0.13
    )  # of the title's size; what is too long is cut before the answer
    answer = f" → {_cut(_visible(trace['answer']['text']), letters // 3)}"
    title = _cut(_visible(trace["prompt"]), letters - len(_drawable(answer))) + answer
    sheet.write(0.2, 0.3, title, fontsize=12.5, weight="bold", va="center")
    sheet.write(0.2, 0.58, _conditions(trace), fontsize=8.5, va="center", color=SOFT)


def _map(
    sheet: Sheet, trace: Trace, kind: str, limits: tuple[float, float], box: tuple[float, float, float, float]
) -> None:
    """One map: p(answer) with a token's state restored, light where nothing comes back, dark at the best."""
    colours, what, axis = STYLES[kind]
    left, top, wide, tall = box
    scores = trace["kinds"][kind]["scores"]
    rows, layers = len(scores), len(scores[0])
    axes = sheet.axes(*box)
    mesh = axes.pcolormesh(
        scores, cmap=colours, vmin=limits[0], vmax=limits[1], edgecolors=PAPER, linewidth=0.5,
        rasterized=rows * layers > 5000,
    )  # fmt: skip
    axes.invert_yaxis()
    axes.set_yticks([])
    step = math.ceil(layers / 10)
    axes.set_xticks([m + 0.5 for m in range(0, layers, step)], [str(m) for m in range(0, layers, step)])
    middle = left + wide / 2
    sheet.write(middle, top - 0.2, f"Impact of restoring {what}", ha="center", va="center", fontsize=10)
    below = top + tall
    label = axis.replace("{}", str(trace["window"]))
    sheet.write(middle, below + 0.34, label, ha="center", va="center", fontsize=8, color=SOFT)
    scale = sheet.axes(left + 0.2 * wide, below + 0.56, 0.6 * wide, 0.09)
    sheet.figure.colorbar(mesh, cax=scale, orientation="horizontal")
    scale.xaxis.set_major_locator(MaxNLocator(4))
    scale.tick_params(length=2, width=0.6, labelsize=7.5, labelcolor=INK)
    for spine in scale.spines.values():
        spine.set_visible(False)
    answer = f"p({_cut(_visible(trace['answer']['text']), 18)})"
    sheet.write(middle, below + 0.95, answer, ha="center", va="center", fontsize=8.5)


def _bars(sheet: Sheet, trace: Trace, box: tuple[float, float, float, float]) -> None:
    """The severed paths: what restoring the subject's last token brings back, by layer and path cut."""
    left, top, wide, tall = box
    axes = sheet.axes(*box)
    scores = trace["severed"]["scores"]
    for i, (path, (colour, name)) in enumerate(BARS.items()):
        effects = [score - trace["low"] for score in scores[path]]
        axes.bar(
            [m + 0.27 * (i - 1) for m in range(len(effects))],
            effects,
            0.25,
            color=colour,
            alpha=0.85,
            label=name,
        )
    step = math.ceil(len(scores["none"]) / 30)
    axes.set_xticks(range(0, len(scores["none"]), step))
    axes.margins(x=0.01)
    axes.axhline(0, color=INK, linewidth=0.6)
    axes.grid(axis="y", color=RULE, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        frameon=False, fontsize=8, ncols=3, loc="lower right", bbox_to_anchor=(1.0, 1.0), labelcolor=INK
    )
    last = _labels(trace)[trace["severed"]["token"]]
    sheet.write(left, top - 0.15, f"Indirect effect at {last}", va="center", fontsize=10)
    sheet.write(
        left + wide / 2, top + tall + 0.36, "restored layer", ha="center", va="center", fontsize=8, color=SOFT
    )


# Texts


def _title(trace: Trace) -> str:
    return f"{_visible(trace['prompt'])} → {_visible(trace['answer']['text'])}"


def _conditions(trace: Trace) -> str:
    noise = trace["noise"]
    times = f"{noise['factor']:g}σ = " if noise["factor"] is not None else ""
    return (
        f"p = {trace['high']:.3f} clean, {trace['low']:.3f} with the subject (*) corrupted; "
        f"{trace['samples']} samples, noise {times}{noise['level']:.3g}"
    )


def _labels(trace: Trace) -> list[str]:
    b, e = trace["subject"]["tokens"]
    shown = [_cut(_visible(token), LONGEST) for token in trace["tokens"]]
    return [label + "*" if b <= i < e else label for i, label in enumerate(shown)]


def _sentences(trace: Trace) -> list[str]:
    """What the maps show, in words."""
    noise = trace["noise"]
    answer, subject = _visible(trace["answer"]["text"]), _visible(trace["subject"]["text"])
    measured = f", {noise['factor']:g} times that of the embeddings" if noise["factor"] is not None else ""
    return [
        (
            f"After “{_visible(trace['prompt'])}” the model says “{answer}” with probability "
            f"{trace['high']:.3f}. "
            f"With the embeddings of “{subject}” corrupted it does so with {trace['low']:.3f} (mean of "
            f"{trace['samples']} samples of noise with deviation {noise['level']:.3g}{measured}). "
            f"The difference, {trace['total_effect']:.3f}, is the total effect."
        ),
        (
            "Each cell of a map shows the probability when, in the corrupted run, one token's state is put back as "
            "it was in the clean run: darker brings back more. Corrupted tokens carry an asterisk."
        ),
    ]


def _rows(trace: Trace) -> list[tuple[str, ...]]:
    """For each kind the best cell within the subject, then of all: what, token, layer, probability, share."""
    b, e = trace["subject"]["tokens"]
    rows: list[tuple[str, ...]] = []
    for kind, found in trace["kinds"].items():
        for where, tokens in (("in the subject", range(b, e)), ("anywhere", range(len(trace["tokens"])))):
            cells = ((score, t, m) for t in tokens for m, score in enumerate(found["scores"][t]))
            score, token, layer = max(cells, key=lambda cell: cell[0])
            share = _share(score - trace["low"], trace["total_effect"])
            rows.append((STYLES[kind][1], where, _labels(trace)[token], str(layer), f"{score:.3f}", share))
    return rows


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole > 0 else "–"


def _visible(text: str) -> str:
    """On one line and without what steers a display: line ends and tabs as signs, other controls as codes."""
    text = text.strip(" ") or text.replace(" ", "␣")
    signs = {"\n": "↵", "\t": "⇥"}
    return "".join(
        signs.get(c) or (f"U+{ord(c):04X}" if unicodedata.category(c)[0] == "C" else c) for c in text
    )


def _cut(text: str, length: int) -> str:
    """At most so many characters as they are drawn."""
    if len(_drawable(text)) <= length:
        return text
    ends = accumulate(len(_drawable(c)) for c in text)
    return text[: sum(end < length for end in ends)] + "…"


def _drawable(text: str) -> str:
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


TABLE = """<table>
<thead><tr>
<th>restored</th><th>best cell</th><th>token</th><th>layer</th><th>probability</th><th>of the total effect</th>
</tr></thead>
<tbody>
<!--rows--></tbody>
</table>
"""
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
