"""Results of evaluations as figures, several beside each other to compare methods.

Takes their JSON and needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

from service.evaluation.report_text import MAIN_MEASURES, Result, label, title
from service.kit.plotting import (
    BACKGROUND,
    FOREGROUND,
    GRID_COLOUR,
    MUTED,
    DrawFunction,
    FigureBuilder,
    shorten,
    show_control_characters,
)

COLOURS = ("#6a51a3", "#238b45", "#cb181d", "#2171b5", "#d94801", "#636363", "#b8860b", "#17a398")
CHANGE_BARS = (
    "rewrite",
    "paraphrase",
    "neighbour",
)  #: drawn in place of MAIN_MEASURES if no result writes an object
#: panel of a sequence -> its caption
PANELS = {
    "S": "S: harmonic mean, %",
    "ES": "ES: efficacy, %",
    "PS": "PS: paraphrases, %",
    "NS": "NS: neighbours, %",
    "loss": "increase of the loss on plain texts, %",
    "norm": "largest change of a weight, as a multiple of its norm",
}


def figures(results: Sequence[Result]) -> dict[str, DrawFunction]:
    """Return every figure by name: bars of all results, and curves of those with several checkpoints."""
    drawings: dict[str, DrawFunction] = {"bars": partial(_bar_chart, results)}
    if with_checkpoints := [r for r in results if len(r.get("checkpoints", ())) > 1]:
        drawings["curves"] = partial(_curve_panels, with_checkpoints)
    return drawings


def _bar_chart(results: Sequence[Result]) -> FigureBuilder:
    """Draw a group for each measure: a bar with its interval for each result, and a line at the base model's value."""
    writes_object = any(r["plan"]["objective"] == "write" for r in results)
    names = MAIN_MEASURES if writes_object else CHANGE_BARS
    left, top, wide, tall = 0.6, 0.85 + 0.21 * len(results), max(5.4, 0.55 * len(results) * len(names)), 2.6
    builder = FigureBuilder(left + wide + 0.3, top + tall + 0.55)
    _draw_heading(builder, results)
    axes = _add_panel(builder, (left, top, wide, tall))
    width = 0.8 / len(results)
    for i, result in enumerate(results):
        for place, name in enumerate(names):
            estimate = result["after" if writes_object else "changes"].get(name)
            if estimate:
                x = place + width * (i - (len(results) - 1) / 2)
                _draw_bar(axes, x, width, estimate, COLOURS[i % len(COLOURS)])
                _draw_baseline(axes, x, width, result["before"].get(name))
    axes.set_ylim(0, 105)
    axes.set_xticks(range(len(names)), names, fontsize=9)
    axes.tick_params(axis="x", length=0)
    caption = "%, with 95 % intervals" + (
        "; dotted: before the edits" if writes_object else " of the possible change"
    )
    builder.add_text(left, top - 0.14, caption, va="center", fontsize=8, color=MUTED)
    return builder


def _draw_bar(axes: Axes, x: float, width: float, estimate: dict[str, float], colour: str) -> None:
    mean, low, high = (100 * estimate[k] for k in ("mean", "low", "high"))
    axes.bar(x, mean, 0.9 * width, color=colour, alpha=0.85)
    ends = [[max(0.0, mean - low)], [max(0.0, high - mean)]]
    axes.errorbar(x, mean, yerr=ends, color=FOREGROUND, linewidth=0.9, capsize=2.5)
    axes.text(x, 2.5, f"{mean:.1f}", ha="center", va="bottom", fontsize=7.5, color=BACKGROUND)


def _draw_baseline(axes: Axes, x: float, width: float, estimate: dict[str, float] | None) -> None:
    if estimate:
        y = 100 * estimate["mean"]
        axes.plot(
            [x - 0.45 * width, x + 0.45 * width], [y, y], color=FOREGROUND, linewidth=1.1, linestyle=":"
        )


def _curve_panels(results: Sequence[Result]) -> FigureBuilder:
    """Draw each of PANELS against the number of edits: a curve with its interval for each result."""
    wide, tall, left, top, gap, foot = 3.0, 1.9, 0.6, 0.8 + 0.21 * len(results), 0.62, 0.75
    lines = math.ceil(len(PANELS) / 2)
    builder = FigureBuilder(left + 2 * (wide + gap), top + lines * (tall + foot))
    _draw_heading(builder, results)
    for place, (name, caption) in enumerate(PANELS.items()):
        x, y = left + (place % 2) * (wide + gap), top + (place // 2) * (tall + foot)
        axes = _add_panel(builder, (x, y, wide, tall))
        for i, result in enumerate(results):
            _draw_curve(axes, name, result["checkpoints"], COLOURS[i % len(COLOURS)])
        if name in MAIN_MEASURES:
            axes.set_ylim(-2, 102)
        else:
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        _set_log_ticks(axes, {t["edits"] for r in results for t in r["checkpoints"]})
        builder.add_text(x, y - 0.13, caption, va="center", fontsize=9)
        builder.add_text(
            x + wide / 2, y + tall + 0.36, "edits", ha="center", va="center", fontsize=8, color=MUTED
        )
    return builder


def _set_log_ticks(axes: Axes, counts: set[int]) -> None:
    """Label a logarithmic axis with the numbers of edits, each at least twice the one before."""
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    shown: list[int] = []
    for count in sorted(counts):
        if not shown or count >= 2 * shown[-1]:
            shown.append(count)
    axes.set_xticks(shown, [str(n) for n in shown])


def _draw_curve(axes: Axes, name: str, tables: Sequence[dict[str, Any]], colour: str) -> None:
    points = [(t["edits"], *found) for t in tables if (found := _panel_point(name, t)) is not None]
    if not points:
        return
    edits, means, lows, highs = zip(*points, strict=True)
    axes.plot(edits, means, color=colour, linewidth=1.5, marker="o", markersize=3)
    axes.fill_between(edits, lows, highs, color=colour, alpha=0.15, linewidth=0)


def _panel_point(name: str, table: dict[str, Any]) -> tuple[float, float, float] | None:
    """Return mean, low and high of a checkpoint in a panel, all equal if there is no interval."""
    if name in MAIN_MEASURES:
        estimate = table["measures"].get(name)
        return (
            None
            if estimate is None
            else (100 * estimate["mean"], 100 * estimate["low"], 100 * estimate["high"])
        )
    if name == "loss":
        rise = (table["damage"] or {}).get("loss_rise")
        return None if rise is None else (100 * rise,) * 3
    return (max(table["norm"].values(), default=0.0),) * 3


def _add_panel(builder: FigureBuilder, box: tuple[float, float, float, float]) -> Axes:
    axes = builder.add_axes(*box)
    axes.grid(axis="y", color=GRID_COLOUR, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    return axes


def _draw_heading(builder: FigureBuilder, results: Sequence[Result]) -> None:
    """Draw the title, and a line for each result in its colour."""
    builder.add_text(
        0.2,
        0.28,
        shorten(title(results), int(builder.width / 0.12)),
        fontsize=12,
        weight="bold",
        va="center",
    )
    several = len({r["records"]["measured"] for r in results}) > 1
    models = len({r["model"]["name"] for r in results}) > 1
    for i, result in enumerate(results):
        number = f"{result['records']['measured']} edits, " if several else ""
        model = f"{result['model']['name']}: " if models else ""
        caption = shorten(show_control_characters(model + number + label(result)), int(builder.width / 0.085))
        colour = COLOURS[i % len(COLOURS)]
        builder.add_text(0.2, 0.58 + 0.21 * i, f"■ {caption}", fontsize=8.5, va="center", color=colour)
