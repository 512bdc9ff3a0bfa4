"""The tracing study as figures like Figures 2 and 3 of Meng et al. 2022, as a page, and as rows of a table.

Takes the study's JSON and needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from service.kit import plotting
from service.kit.plotting import FOREGROUND, GRID_COLOUR, MUTED, DrawFunction, FigureBuilder
from service.studies.trace_averages import LAST, LAST_SUBJECT, TOKEN_ROWS
from service.tracing.heatmap import KIND_STYLES, SEVERED_STYLES, draw_bars, draw_map

Study = dict[str, Any]

#: row that is drawn as a curve with its interval -> line style and width
LINE_STYLES = {LAST_SUBJECT: ("-", 1.8), LAST: ("--", 1.4), "first subsequent token": (":", 1.2)}
COLOURS = {"hidden": "#6a51a3", "mlp": "#238b45", "attn": "#cb181d"}
KIND_NAMES = {
    "hidden": "single hidden states",
    "mlp": "windows of MLP outputs",
    "attn": "windows of attention outputs",
}
TABLE_COLUMNS = ("restored", "token", "prompts", "tokens", "AIE", "95 % interval", "layer", "layers of 90 %")


def figures(study: Study) -> dict[str, DrawFunction]:
    """Return every figure by the name of its file."""
    drawings: dict[str, DrawFunction] = {
        "maps": partial(_map_panels, study),
        "lines": partial(_line_panels, study),
    }
    return drawings | ({"severed": partial(_severed_bars, study)} if study["severed"] else {})


def title(study: Study) -> str:
    """Return the title of the report."""
    return f"Causal traces of {study['facts']} facts in {study['model']['name']}"


# Drawing


def _draw_heading(builder: FigureBuilder, study: Study) -> None:
    builder.add_text(0.2, 0.3, title(study), fontsize=12.5, weight="bold", va="center")
    builder.add_text(0.2, 0.58, _conditions_text(study), fontsize=8.5, va="center", color=MUTED)


def _map_panels(study: Study) -> FigureBuilder:
    """Draw a map of rows of tokens by layers for each kind, all on one scale."""
    kinds, layers = study["kinds"], study["layers"]
    margin, top, foot, gap, tall = 1.95, 1.28, 1.12, 0.42, 0.3 * len(TOKEN_ROWS)
    wide = min(6.0, max(2.6, 0.115 * layers))
    builder = FigureBuilder(margin + len(kinds) * (wide + gap), top + tall + foot)
    _draw_heading(builder, study)
    for i, row in enumerate(TOKEN_ROWS):
        weight = "bold" if "subject" in row else "normal"
        y = top + tall * (i + 0.5) / len(TOKEN_ROWS)
        builder.add_text(margin - 0.09, y, row, ha="right", va="center", fontsize=8.5, weight=weight)
    maps = {kind: [_clipped(rows[row]["mean"], layers) for row in TOKEN_ROWS] for kind, rows in kinds.items()}
    high = max(max(map(max, scores)) for scores in maps.values())
    for i, (kind, scores) in enumerate(maps.items()):
        box = (margin + i * (wide + gap), top, wide, tall)
        draw_map(builder, box, kind, scores, (0.0, max(high, 1e-9)), study["window"], "AIE")
    return builder


def _clipped(means: Sequence[float] | None, layers: int) -> list[float]:
    """Return means with negative ones as 0, as in the paper. A row without tokens is NaN."""
    return [math.nan] * layers if means is None else [max(0.0, x) for x in means]


def _line_panels(study: Study) -> FigureBuilder:
    """Draw the AIE by layer at the rows of LINE_STYLES with intervals, in a panel for each kind."""
    kinds, layers = study["kinds"], study["layers"]
    wide, tall, left, top, gap = max(2.6, min(6.0, 0.115 * layers)), 2.1, 0.62, 1.55, 0.42
    builder = FigureBuilder(left + len(kinds) * (wide + gap), top + tall + 0.75)
    _draw_heading(builder, study)
    bounds = [
        kinds[k][row][end]
        for k in kinds
        for row in LINE_STYLES
        for end in ("low", "high", "mean")
        if kinds[k][row][end]
    ]
    floor, ceiling = min(map(min, bounds)), max(map(max, bounds))
    padding = 0.05 * (ceiling - floor) + 1e-9
    for i, (kind, rows) in enumerate(kinds.items()):
        x = left + i * (wide + gap)
        axes = builder.add_axes(x, top, wide, tall)
        for row, (dash, width) in LINE_STYLES.items():
            if (estimate := rows[row])["mean"]:
                axes.plot(estimate["mean"], dash, color=COLOURS[kind], linewidth=width, label=row)
            if estimate["low"]:
                axes.fill_between(
                    range(layers), estimate["low"], estimate["high"], color=COLOURS[kind], alpha=0.13, lw=0
                )
        axes.set_ylim(floor - padding, ceiling + padding)
        axes.set_xticks(range(0, layers, math.ceil(layers / 10)))
        axes.margins(x=0.02)
        axes.axhline(0, color=FOREGROUND, linewidth=0.6)
        axes.grid(axis="y", color=GRID_COLOUR, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelleft=i == 0)
        _, what, axis = KIND_STYLES[kind]
        middle = x + wide / 2
        builder.add_text(middle, top - 0.2, f"AIE of restoring {what}", ha="center", va="center", fontsize=10)
        label = axis.replace("{}", str(study["window"]))
        builder.add_text(middle, top + tall + 0.36, label, ha="center", va="center", fontsize=8, color=MUTED)
        if i == 0:
            legend = axes.legend(
                frameon=False, fontsize=8, ncols=3, labelcolor=FOREGROUND, borderpad=0, handlelength=2.4,
                loc="lower left", bbox_to_anchor=(0.0, 1 + 0.42 / tall),
            )  # fmt: skip
            for line in legend.get_lines():
                line.set_color(FOREGROUND)
    return builder


def _severed_bars(study: Study) -> FigureBuilder:
    """Draw bars by layer with intervals, ordinary and with each path severed, as in the paper's Figure 3."""
    wide = min(14.0, max(7.4, 0.34 * study["layers"]))
    builder = FigureBuilder(wide + 0.95, 1.35 + 2.2 + 0.7)
    _draw_heading(builder, study)
    paths = study["severed"]["paths"]
    intervals = (
        {p: (paths[p]["low"], paths[p]["high"]) for p in SEVERED_STYLES} if study["facts"] > 1 else None
    )
    means = {p: paths[p]["mean"] for p in SEVERED_STYLES}
    draw_bars(builder, (0.62, 1.35, wide, 2.2), means, f"AIE at the {LAST_SUBJECT}", intervals)
    return builder


# Words


def _conditions_text(study: Study) -> str:
    noise = study["noise"]
    times = f"{noise['factor']:g}σ = " if noise["factor"] is not None else ""
    return (
        f"ATE {study['total_effect']['mean']:.3f}: p {study['high']['mean']:.3f} clean, {study['low']['mean']:.3f} "
        f"corrupted; {study['samples']} samples, noise {times}{noise['level']:.3g}"
    )


def interval_text(estimate: dict[str, Any]) -> str:
    """Return an interval as text, a dash if there is none."""
    return "–" if estimate["low"] is None else f"{estimate['low']:.3f} to {estimate['high']:.3f}"


def sentences(study: Study) -> list[str]:
    """Return sentences on what was measured and what came of it."""
    out = "; ".join(f"{n} {reason}" for reason, n in study["left_out"].items() if n) or "none"
    noise, total = study["noise"], study["total_effect"]
    times = (
        f", {noise['factor']:g} times the deviation of the embeddings of {noise['subjects']} subjects"
        if noise["factor"] is not None
        else ""
    )
    lines = [
        (
            f"{study['scored']} facts were scored and {study['facts']} traced: those whose object is the model's own greedy "
            f"answer. Left out: {out}. Noise of deviation {noise['level']:.4g}{times} was added to the embeddings of the "
            f"subject, with {study['samples']} samples per fact. The probability of the object falls from {study['high']['mean']:.3f} "
            f"to {study['low']['mean']:.3f}: the average total effect is {total['mean']:.3f} ({interval_text(total)})."
        ),
        (
            "A cell shows the average indirect effect (AIE): how much of that probability returns when one state is restored "
            "from the clean run. Intervals are 95 % bootstrap intervals over prompts, not tokens."
        ),
    ]
    lines += [_peak_sentence(study, kind) for kind in study["kinds"]]
    lines += [_severed_sentence(study, path) for path in study["severed"]["lost"]] if study["severed"] else []
    return [*lines, _coinciding_sentence(study)]


def _peak_sentence(study: Study, kind: str) -> str:
    """Return the peaks of a kind at the last token of the subject and of the prompt.

    The last hidden state of the prompt is the answer itself, and is left out.
    """
    rows = (LAST_SUBJECT,) if kind == "hidden" else (LAST_SUBJECT, LAST)
    peaks = {row: peak for row in rows if (peak := study["kinds"][kind][row]["peak"])}
    peak_texts = [
        f"{peak['mean']:.3f} ({interval_text(peak)}) around layer {peak['layer']} at the {row}"
        for row, peak in peaks.items()
    ]
    return f"The AIE of {KIND_NAMES[kind]} peaks with {' and '.join(peak_texts)}."


def _severed_sentence(study: Study, path: str) -> str:
    """Return the loss from severing a path at the subject's last token, at the layer of the greatest loss."""
    losses, whole = study["severed"]["lost"][path], study["severed"]["paths"]["none"]
    layer = max(range(study["layers"]), key=lambda m: losses["mean"][m])
    bounds = {end: None if losses[end] is None else losses[end][layer] for end in ("low", "high")}
    return (
        f"Severing the {KIND_STYLES[path][1]} path at the {LAST_SUBJECT} loses most at layer {layer}: {losses['mean'][layer]:.3f} "
        f"({interval_text(bounds)}), where the ordinary effect is {whole['mean'][layer]:.3f}."
    )


def _coinciding_sentence(study: Study) -> str:
    counts_text = "; ".join(f"{rows}: {n}" for rows, n in study["coinciding_rows"].items())
    return f"Prompts in which one token belongs to two rows, and counts in both: {counts_text}."


def table_rows(study: Study) -> list[tuple[Any, ...]]:
    """Return the rows of TABLE_COLUMNS: the peak of each kind and row."""
    table: list[tuple[Any, ...]] = []
    for kind, kind_rows in study["kinds"].items():
        for name, row in kind_rows.items():
            peak = row["peak"]
            figures: tuple[Any, ...] = (None,) * 4
            if peak:
                spread = peak["layers"] and "–".join(map(str, dict.fromkeys(peak["layers"])))
                figures = (peak["mean"], interval_text(peak), peak["layer"], spread)
            table.append((KIND_STYLES[kind][1], name, row["n"], row["tokens"], *figures))
    return table


def page(study: Study) -> str:
    """Return the report as a self-contained HTML page."""
    pictures = "".join(
        plotting.inline_svg(plotting.render_svg(draw, title(study))) for draw in figures(study).values()
    )
    words = plotting.html_paragraphs(sentences(study))
    return plotting.html_page(
        title(study), words + pictures + plotting.html_table(TABLE_COLUMNS, table_rows(study))
    )
