"""A trace as a picture, in the manner of the paper's figures: tokens down, layers across, a map per kind.

Takes the JSON of a trace and needs no torch. `service.kit.plotting` has the paper, the letters and the page.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.ticker import MaxNLocator

from service.kit import plotting
from service.kit.plotting import INK, PAPER, RULE, SOFT, Sheet, cut, drawable, visible

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
LONGEST = 22  # characters of a token that are shown


def svg(trace: Trace) -> str:
    """The maps as SVG with real text, in the reader's fonts."""
    return plotting.svg(partial(_sheet, trace), _title(trace))


def png(trace: Trace, dpi: int = 160) -> bytes:
    """The maps as PNG."""
    return plotting.png(partial(_sheet, trace), dpi)


def page(trace: Trace) -> str:
    """A page that needs nothing else: the maps, and the figures in words."""
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in r) + "</tr>\n" for r in _rows(trace)
    )
    words, figure = plotting.paragraphs(_sentences(trace)), plotting.inline(svg(trace))
    return plotting.page(_title(trace), words + figure + TABLE.replace("<!--rows-->", rows))


# Drawing


def _sheet(trace: Trace) -> Sheet:
    kinds: dict[str, Any] = trace["kinds"]
    rows, layers = len(trace["tokens"]), len(next(iter(kinds.values()))["scores"][0])
    labels = _labels(trace)
    margin = 0.35 + 0.078 * max(len(drawable(label)) for label in labels)
    wide, tall = min(6.0, max(2.9, 0.115 * layers)), min(40.0, max(1.2, 0.235 * rows))
    gap, top, foot = 0.42, 1.28, 1.12
    width = max(margin + len(kinds) * (wide + gap), 6.4)
    bars = 2.5 if trace["severed"] else 0.0
    sheet = Sheet(width, top + tall + foot + bars)
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
        box, scores = (left, top, wide, tall), kinds[kind]["scores"]
        draw_map(sheet, box, kind, scores, limits, trace["window"], f"p({_answer(trace)})")
    if trace["severed"]:
        box = (margin, top + tall + foot + 0.3, width - margin - gap, bars - 0.85)
        paths = {path: [s - trace["low"] for s in trace["severed"]["scores"][path]] for path in BARS}
        draw_bars(sheet, box, paths, f"Indirect effect at {labels[trace['severed']['token']]}")
    return sheet


def _head(sheet: Sheet, trace: Trace) -> None:
    letters = int(
        (sheet.width - 0.4) / 0.13
    )  # of the title's size; what is too long is cut before the answer
    answer = f" → {cut(visible(trace['answer']['text']), letters // 3)}"
    title = cut(visible(trace["prompt"]), letters - len(drawable(answer))) + answer
    sheet.write(0.2, 0.3, title, fontsize=12.5, weight="bold", va="center")
    sheet.write(0.2, 0.58, _conditions(trace), fontsize=8.5, va="center", color=SOFT)


Box = tuple[float, float, float, float]


def draw_map(
    sheet: Sheet,
    box: Box,
    kind: str,
    scores: Sequence[Sequence[float]],
    limits: tuple[float, float],
    window: int,
    unit: str,
) -> None:
    """One map, rows down and layers across: light where nothing comes back, dark at the best; `unit` is below its scale."""
    colours, what, axis = STYLES[kind]
    left, top, wide, tall = box
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
    label = axis.replace("{}", str(window))
    sheet.write(middle, below + 0.34, label, ha="center", va="center", fontsize=8, color=SOFT)
    scale = sheet.axes(left + 0.2 * wide, below + 0.56, 0.6 * wide, 0.09)
    sheet.figure.colorbar(mesh, cax=scale, orientation="horizontal")
    scale.xaxis.set_major_locator(MaxNLocator(4))
    scale.tick_params(length=2, width=0.6, labelsize=7.5, labelcolor=INK)
    for spine in scale.spines.values():
        spine.set_visible(False)
    sheet.write(middle, below + 0.95, unit, ha="center", va="center", fontsize=8.5)


def draw_bars(
    sheet: Sheet,
    box: Box,
    paths: Mapping[str, Sequence[float]],
    title: str,
    ends: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
) -> None:
    """The severed paths: what restoring the subject's last token brings back, by layer and path cut.

    `ends` are the lower and upper ends of intervals around them.
    """
    left, top, wide, tall = box
    axes = sheet.axes(*box)
    layers = len(paths["none"])
    for i, (path, (colour, name)) in enumerate(BARS.items()):
        at, effects = [m + 0.27 * (i - 1) for m in range(layers)], paths[path]
        axes.bar(at, effects, 0.25, color=colour, alpha=0.85, label=name)
        if ends:
            axes.vlines(at, *ends[path], color=INK, linewidth=0.8)
    step = math.ceil(layers / 30)
    axes.set_xticks(range(0, layers, step))
    axes.margins(x=0.01)
    axes.axhline(0, color=INK, linewidth=0.6)
    axes.grid(axis="y", color=RULE, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        frameon=False, fontsize=8, ncols=3, loc="lower right", bbox_to_anchor=(1.0, 1.0), labelcolor=INK
    )
    sheet.write(left, top - 0.15, title, va="center", fontsize=10)
    sheet.write(
        left + wide / 2, top + tall + 0.36, "restored layer", ha="center", va="center", fontsize=8, color=SOFT
    )


# Texts


def _title(trace: Trace) -> str:
    return f"{visible(trace['prompt'])} → {visible(trace['answer']['text'])}"


def _answer(trace: Trace) -> str:
    return cut(visible(trace["answer"]["text"]), 18)


def _conditions(trace: Trace) -> str:
    noise = trace["noise"]
    times = f"{noise['factor']:g}σ = " if noise["factor"] is not None else ""
    return (
        f"p = {trace['high']:.3f} clean, {trace['low']:.3f} with the subject (*) corrupted; "
        f"{trace['samples']} samples, noise {times}{noise['level']:.3g}"
    )


def _labels(trace: Trace) -> list[str]:
    b, e = trace["subject"]["tokens"]
    shown = [cut(visible(token), LONGEST) for token in trace["tokens"]]
    return [label + "*" if b <= i < e else label for i, label in enumerate(shown)]


def _sentences(trace: Trace) -> list[str]:
    """What the maps show, in words."""
    noise = trace["noise"]
    answer, subject = visible(trace["answer"]["text"]), visible(trace["subject"]["text"])
    measured = f", {noise['factor']:g} times that of the embeddings" if noise["factor"] is not None else ""
    return [
        (
            f"After “{visible(trace['prompt'])}” the model says “{answer}” with probability "
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


TABLE = """<table>
<thead><tr>
<th>restored</th><th>best cell</th><th>token</th><th>layer</th><th>probability</th><th>of the total effect</th>
</tr></thead>
<tbody>
<!--rows--></tbody>
</table>
"""
