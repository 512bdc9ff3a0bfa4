"""Draw a trace as heat maps in the style of the paper's figures: tokens down, layers across, one map per kind.

The input is the JSON of a trace; torch is not needed. `service.kit.plotting` has the colours, fonts and page.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.ticker import MaxNLocator

from service.kit import plotting
from service.kit.plotting import (
    BACKGROUND,
    FOREGROUND,
    GRID_COLOUR,
    MUTED,
    FigureBuilder,
    escape_missing_glyphs,
    shorten,
    show_control_characters,
)

TraceJson = dict[str, Any]

#: kind -> colour map, what is restored, label of the axis
KIND_STYLES = {
    "hidden": ("Purples", "state", "single restored layer"),
    "mlp": ("Greens", "MLP", "centre of the interval of {} restored MLP layers"),
    "attn": ("Reds", "attention", "centre of the interval of {} restored attention layers"),
}
#: severed path -> colour and name of its bars
SEVERED_STYLES = {
    "none": ("#6a51a3", "single state restored"),
    "attn": ("#cb181d", "with attention severed"),
    "mlp": ("#238b45", "with MLP severed"),
}
MAX_TOKEN_CHARS = 22  # longer token labels are truncated


def trace_svg(trace: TraceJson) -> str:
    """Return the maps as SVG with text elements."""
    return plotting.render_svg(partial(_draw_figure, trace), _title(trace))


def trace_png(trace: TraceJson, dpi: int = 160) -> bytes:
    """Return the maps as PNG."""
    return plotting.render_png(partial(_draw_figure, trace), dpi)


def trace_page(trace: TraceJson) -> str:
    """Return a self-contained HTML page with the maps and a summary."""
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in r) + "</tr>\n" for r in _best_cell_rows(trace)
    )
    summary, figure = (
        plotting.html_paragraphs(_summary_sentences(trace)),
        plotting.inline_svg(trace_svg(trace)),
    )
    return plotting.html_page(_title(trace), summary + figure + TABLE_TEMPLATE.replace("<!--rows-->", rows))


# Drawing


def _draw_figure(trace: TraceJson) -> FigureBuilder:
    kinds: dict[str, Any] = trace["kinds"]
    rows, layers = len(trace["tokens"]), len(next(iter(kinds.values()))["scores"][0])
    labels = _token_labels(trace)
    margin = 0.35 + 0.078 * max(len(escape_missing_glyphs(label)) for label in labels)
    map_width, map_height = min(6.0, max(2.9, 0.115 * layers)), min(40.0, max(1.2, 0.235 * rows))
    gap, top, bottom = 0.42, 1.28, 1.12
    width = max(margin + len(kinds) * (map_width + gap), 6.4)
    bars = 2.5 if trace["severed"] else 0.0
    figure = FigureBuilder(width, top + map_height + bottom + bars)
    _draw_header(figure, trace)
    corrupted = _corrupted_tokens(trace)
    label_step = math.ceil(rows * 0.15 / map_height)
    for token in range(0, rows, label_step):
        weight = "bold" if token in corrupted else "normal"
        y = top + map_height * (token + 0.5) / rows
        figure.add_text(margin - 0.09, y, labels[token], ha="right", va="center", fontsize=8.5, weight=weight)
    high = max(max(map(max, kind["scores"])) for kind in kinds.values())
    limits = (trace["low"], max(high, trace["low"] + 1e-9))
    for i, kind in enumerate(kinds):
        left = margin + i * (map_width + gap)
        box, scores = (left, top, map_width, map_height), kinds[kind]["scores"]
        draw_map(figure, box, kind, scores, limits, trace["window"], f"p({_answer_label(trace)})")
    if trace["severed"]:
        box = (margin, top + map_height + bottom + 0.3, width - margin - gap, bars - 0.85)
        paths = {
            path: [s - trace["low"] for s in trace["severed"]["scores"][path]] for path in SEVERED_STYLES
        }
        draw_bars(figure, box, paths, f"Indirect effect at {labels[trace['severed']['token']]}")
    return figure


def _draw_header(figure: FigureBuilder, trace: TraceJson) -> None:
    max_chars = int((figure.width - 0.4) / 0.13)  # at the title's font size; a longer prompt is truncated
    answer = f" → {shorten(show_control_characters(trace['answer']['text']), max_chars // 3)}"
    title = (
        shorten(show_control_characters(trace["prompt"]), max_chars - len(escape_missing_glyphs(answer)))
        + answer
    )
    figure.add_text(0.2, 0.3, title, fontsize=12.5, weight="bold", va="center")
    figure.add_text(0.2, 0.58, _trace_settings_line(trace), fontsize=8.5, va="center", color=MUTED)


Box = tuple[float, float, float, float]


def draw_map(
    figure: FigureBuilder,
    box: Box,
    kind: str,
    scores: Sequence[Sequence[float]],
    limits: tuple[float, float],
    window: int,
    unit: str,
) -> None:
    """Draw one map, rows down and layers across, from light at the lower limit to dark at the upper limit.

    `unit` is the label of its colour scale.
    """
    colours, restored_name, axis_label = KIND_STYLES[kind]
    left, top, width, height = box
    rows, layers = len(scores), len(scores[0])
    axes = figure.add_axes(*box)
    mesh = axes.pcolormesh(
        scores, cmap=colours, vmin=limits[0], vmax=limits[1], edgecolors=BACKGROUND, linewidth=0.5,
        rasterized=rows * layers > 5000,
    )  # fmt: skip
    axes.invert_yaxis()
    axes.set_yticks([])
    step = math.ceil(layers / 10)
    axes.set_xticks([m + 0.5 for m in range(0, layers, step)], [str(m) for m in range(0, layers, step)])
    middle = left + width / 2
    figure.add_text(
        middle, top - 0.2, f"Impact of restoring {restored_name}", ha="center", va="center", fontsize=10
    )
    bottom = top + height
    label = axis_label.replace("{}", str(window))
    figure.add_text(middle, bottom + 0.34, label, ha="center", va="center", fontsize=8, color=MUTED)
    scale = figure.add_axes(left + 0.2 * width, bottom + 0.56, 0.6 * width, 0.09)
    figure.figure.colorbar(mesh, cax=scale, orientation="horizontal")
    scale.xaxis.set_major_locator(MaxNLocator(4))
    scale.tick_params(length=2, width=0.6, labelsize=7.5, labelcolor=FOREGROUND)
    for spine in scale.spines.values():
        spine.set_visible(False)
    figure.add_text(middle, bottom + 0.95, unit, ha="center", va="center", fontsize=8.5)


def draw_bars(
    figure: FigureBuilder,
    box: Box,
    paths: Mapping[str, Sequence[float]],
    title: str,
    intervals: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
) -> None:
    """Draw the severed paths: the effect of restoring the subject's last token, by layer and severed path.

    `intervals` are the lower and upper ends of intervals.
    """
    left, top, width, height = box
    axes = figure.add_axes(*box)
    layers = len(paths["none"])
    for i, (path, (colour, name)) in enumerate(SEVERED_STYLES.items()):
        xs, effects = [m + 0.27 * (i - 1) for m in range(layers)], paths[path]
        axes.bar(xs, effects, 0.25, color=colour, alpha=0.85, label=name)
        if intervals:
            axes.vlines(xs, *intervals[path], color=FOREGROUND, linewidth=0.8)
    step = math.ceil(layers / 30)
    axes.set_xticks(range(0, layers, step))
    axes.margins(x=0.01)
    axes.axhline(0, color=FOREGROUND, linewidth=0.6)
    axes.grid(axis="y", color=GRID_COLOUR, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        frameon=False,
        fontsize=8,
        ncols=3,
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        labelcolor=FOREGROUND,
    )
    figure.add_text(left, top - 0.15, title, va="center", fontsize=10)
    figure.add_text(
        left + width / 2,
        top + height + 0.36,
        "restored layer",
        ha="center",
        va="center",
        fontsize=8,
        color=MUTED,
    )


# Texts


def _title(trace: TraceJson) -> str:
    return f"{show_control_characters(trace['prompt'])} → {show_control_characters(trace['answer']['text'])}"


def _answer_label(trace: TraceJson) -> str:
    return shorten(show_control_characters(trace["answer"]["text"]), 18)


def _trace_settings_line(trace: TraceJson) -> str:
    noise = trace["noise"]
    times = f"{noise['factor']:g}σ = " if noise["factor"] is not None else ""
    return (
        f"p = {trace['high']:.3f} clean, {trace['low']:.3f} with the subject (*) corrupted; "
        f"{trace['samples']} samples, noise {times}{noise['level']:.3g}"
    )


def _corrupted_tokens(trace: TraceJson) -> set[int]:
    """Return the corrupted tokens: those of every corrupted mention of the subject."""
    subject = trace["subject"]
    return {token for span in subject.get("mentions", [subject["tokens"]]) for token in range(*span)}


def _token_labels(trace: TraceJson) -> list[str]:
    corrupted = _corrupted_tokens(trace)
    labels = [shorten(show_control_characters(token), MAX_TOKEN_CHARS) for token in trace["tokens"]]
    return [label + "*" if i in corrupted else label for i, label in enumerate(labels)]


def _summary_sentences(trace: TraceJson) -> list[str]:
    """Return sentences that describe the maps."""
    noise = trace["noise"]
    answer, subject = (
        show_control_characters(trace["answer"]["text"]),
        show_control_characters(trace["subject"]["text"]),
    )
    sigma_note = f", {noise['factor']:g} times that of the embeddings" if noise["factor"] is not None else ""
    return [
        (
            f"After “{show_control_characters(trace['prompt'])}” the model says “{answer}” with probability "
            f"{trace['high']:.3f}. "
            f"With the embeddings of “{subject}” corrupted it does so with {trace['low']:.3f} (mean of "
            f"{trace['samples']} samples of noise with deviation {noise['level']:.3g}{sigma_note}). "
            f"The difference, {trace['total_effect']:.3f}, is the total effect."
        ),
        (
            "Each cell of a map shows the probability when one token's state in the corrupted run is restored to "
            "its state in the clean run. Darker cells restore more. Corrupted tokens have an asterisk."
        ),
    ]


def _best_cell_rows(trace: TraceJson) -> list[tuple[str, ...]]:
    """Return, for each kind, the best cell in the subject and of all: kind, place, token, layer, probability, share."""
    b, e = trace["subject"]["tokens"]
    rows: list[tuple[str, ...]] = []
    for kind, kind_json in trace["kinds"].items():
        for where, tokens in (("in the subject", range(b, e)), ("anywhere", range(len(trace["tokens"])))):
            cells = ((score, t, m) for t in tokens for m, score in enumerate(kind_json["scores"][t]))
            score, token, layer = max(cells, key=lambda cell: cell[0])
            share = _percent(score - trace["low"], trace["total_effect"])
            rows.append(
                (KIND_STYLES[kind][1], where, _token_labels(trace)[token], str(layer), f"{score:.3f}", share)
            )
    return rows


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole > 0 else "–"


TABLE_TEMPLATE = """<table>
<thead><tr>
<th>restored</th><th>best cell</th><th>token</th><th>layer</th><th>probability</th><th>of the total effect</th>
</tr></thead>
<tbody>
<!--rows--></tbody>
</table>
"""
