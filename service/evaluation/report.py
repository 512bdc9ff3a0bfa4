"""Results of evaluations as figures, as a page, and as the rows of tables; several beside each other, to compare methods.

Takes the JSON of results and needs no torch.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

from service.evaluation.metrics import CHANGE_SCORES, COMBINED_SCORES, MEASURES
from service.kit import plotting
from service.kit.plotting import (
    BACKGROUND,
    FOREGROUND,
    GRID_COLOUR,
    MUTED,
    DrawFunction,
    FigureBuilder,
    show_control_characters,
    truncate,
)

Result = dict[str, Any]
Cell = str | float | int | None

COLOURS = ("#6a51a3", "#238b45", "#cb181d", "#2171b5", "#d94801", "#636363", "#b8860b", "#17a398")
BAR_MEASURES = ("ES", "PS", "NS", "S")
BAR_CHANGES = ("rewrite", "paraphrase", "neighbour")  # in place of BARS where nothing new is written
#: a panel of a sequence -> what stands on it
PANELS = {
    "S": "S: all three, %",
    "ES": "ES: the edits hold, %",
    "PS": "PS: so do their paraphrases, %",
    "NS": "NS: neighbours are kept, %",
    "loss": "rise of the loss on plain texts, %",
    "norm": "change of a weight, in its norms",
}
MODE_LABELS = {"single": "one at a time", "sequence": "one after another"}
MAX_FAILED_EDITS_SHOWN = 40  # edits that did not hold, shown on the page

MEASURE_COLUMNS = ("measure", "before", "after", "95 % interval", "records", "what it is")
CHECKPOINT_COLUMNS = (
    "edits", "ES", "PS", "NS", "S", "95 % interval", "exact", "first 10", "first 100", "still hold", "loss", "drift", "norm",
)  # fmt: skip


# In words and tables


def label(result: Result) -> str:
    """What tells one result from another: the method, what was asked of it, and how."""
    plan = result["plan"]
    hparams = [f"{name}={value}" for name, value in (plan["hparams"] or {}).items()]
    parts = [plan["method"], *hparams]
    if plan["objective"] != "write":
        parts.append(plan["objective"])
    if plan["mode"] == "sequence":
        parts.append(f"found on the {plan['found_on']} model")
    if len(plan["strengths"]) > 1:
        parts.append("strengthened")
    return ", ".join(parts)


def title(results: Sequence[Result]) -> str:
    names = ", ".join(dict.fromkeys(r["model"]["name"] for r in results))
    counts = {r["records"]["measured"] for r in results}
    modes = {r["plan"]["mode"] for r in results}
    number = f"{counts.pop()} edits" if len(counts) == 1 else "Edits"
    how = MODE_LABELS[modes.pop()] if len(modes) == 1 else "one at a time and one after another"
    return f"{number} of {show_control_characters(names)}, {how}"


def sentences(result: Result) -> list[str]:
    """What was done, what was left out, and how long it took."""
    plan, records = result["plan"], result["records"]
    layers = ", ".join(map(str, result["parameters"]["layers"]))
    lines = [f"{label(result)}: {records['measured']} edits at layers {layers} of {result['model']['name']}."]
    if result["strengthened"]:
        lines.append(f"{result['strengthened']} did not take at first and were strengthened.")
    if left_out := records["left_out"]:
        lines.append(
            f"{len(left_out)} records were left out; of {left_out[0]['record']}: {left_out[0]['reason']}"
        )
    if missing_fields := records["lacking"]:
        lines.append(
            "Lacking: " + "; ".join(f"{what} in {n}" for what, n in sorted(missing_fields.items())) + "."
        )
    if result["plain"]:
        lines.append(
            f"Damage is measured on {result['plain']['texts']} plain texts: {result['plain']['source']}."
        )
    minutes, seconds = result["edits_per_minute"], result["seconds"]
    seconds_text = ", ".join(f"{kind} {s:.1f}" for kind, s in seconds.items())
    rates_text = ", ".join(f"{name} {n:.1f}" for name, n in minutes.items())
    lines.append(f"Seconds: {seconds_text}. Edits per minute: {rates_text}. Seed {plan['seed']}.")
    return lines


def measure_rows(result: Result) -> list[tuple[Cell, ...]]:
    """Every measure before and after: the rows of MEASURE_COLUMNS."""
    rows: list[tuple[Cell, ...]] = []
    descriptions = {
        "S": "harmonic mean of ES, PS, NS",
        "S_accuracy": "harmonic mean of the three accuracies",
        **MEASURES,
    }
    for name in (*COMBINED_SCORES, *MEASURES):
        if estimate := result["after"].get(name):
            figures = (
                _mean_or_none(result["before"].get(name)),
                estimate["mean"],
                _interval_text(estimate),
                estimate["n"],
            )
            rows.append((name, *figures, descriptions[name]))
    rows += [
        (
            f"share: {name}",
            None,
            estimate["mean"],
            _interval_text(estimate),
            estimate["n"],
            CHANGE_SCORES[name],
        )
        for name, estimate in result["changes"].items()
        if estimate
    ]
    if damage := result["damage"]:
        rows += _damage_rows(damage)
    return rows


def _damage_rows(damage: dict[str, Any]) -> list[tuple[Cell, ...]]:
    """Of a sequence the figures, of single edits their means."""
    mean = {name: x["mean"] if isinstance(x, dict) else x for name, x in damage.items()}
    return [
        ("loss", mean["loss_before"], mean["loss_after"], None, None, "on plain texts, nats a token"),
        ("drift", 0.0, mean["drift"], None, None, "KL of the next token on plain texts, nats"),
    ]


def checkpoint_rows(result: Result) -> list[tuple[Cell, ...]]:
    """After how many edits what holds: the rows of CHECKPOINT_COLUMNS; none for single edits."""
    rows: list[tuple[Cell, ...]] = []
    for table in result.get("checkpoints", ()):
        measures, damage, still = table["measures"], table["damage"] or {}, table["still"]
        first = {r["first"]: _mean_or_none(r["ES"]) for r in table["retention"]}
        rows.append(
            (
                table["edits"],
                *(_mean_or_none(measures.get(name)) for name in BAR_MEASURES),
                _interval_text(measures["S"]) if measures.get("S") else None,
                _mean_or_none(measures["exact"]),
                first.get(10),
                first.get(100),
                f"{still['hold']} of {still['held_before']}" if still["held_before"] else None,
                damage.get("loss_after"),
                damage.get("drift"),
                max(table["norm"].values(), default=0.0),
            )
        )
    return rows


def _mean_or_none(estimate: dict[str, float] | None) -> float | None:
    return None if estimate is None else estimate["mean"]


def _interval_text(estimate: dict[str, float]) -> str:
    return f"{estimate['low']:.3f} to {estimate['high']:.3f}"


def page(results: Sequence[Result]) -> str:
    """A page that needs nothing else: figures of all results together, then each in words and tables."""
    body = "".join(
        plotting.inline_svg(plotting.render_svg(draw, name)) for name, draw in figures(results).items()
    )
    for result in results:
        body += (
            f"<h2>{html.escape(show_control_characters(label(result)))}</h2>\n"
            + plotting.html_paragraphs(sentences(result))
        )
        if rows := checkpoint_rows(result):
            body += plotting.html_table(CHECKPOINT_COLUMNS, rows)
        body += plotting.html_table(MEASURE_COLUMNS, measure_rows(result)) + _failed_edits(result)
    return plotting.html_page(title(results), body)


def _failed_edits(result: Result) -> str:
    """The edits that did not hold, with their prompts."""
    if result["plan"]["objective"] != "write":
        return ""
    failed = [
        r
        for r in result["rows"]
        if not (r["after"]["exact"] if r["target_true"] is None else r["after"]["ES"])
    ]
    if not failed:
        return ""
    shown = [
        (
            r["record"],
            r["subject"],
            r["prompt"],
            r["target_true"],
            r["target_new"],
            r["after"]["p_new"],
            r["loss"],
        )
        for r in failed[:MAX_FAILED_EDITS_SHOWN]
    ]
    heading = f"{len(failed)} edits did not hold" + (
        f"; the first {MAX_FAILED_EDITS_SHOWN}:" if len(failed) > MAX_FAILED_EDITS_SHOWN else ":"
    )
    columns = ("record", "subject", "prompt", "true object", "new object", "p(new)", "loss when found")
    return plotting.html_paragraphs([heading]) + plotting.html_table(columns, shown)


# Drawing


def figures(results: Sequence[Result]) -> dict[str, DrawFunction]:
    """Every figure by its name: bars of all results, curves of those that have checkpoints."""
    drawings: dict[str, DrawFunction] = {"bars": partial(_bar_chart, results)}
    if with_checkpoints := [r for r in results if len(r.get("checkpoints", ())) > 1]:
        drawings["curves"] = partial(_curve_panels, with_checkpoints)
    return drawings


def _bar_chart(results: Sequence[Result]) -> FigureBuilder:
    """A group for each measure, a bar for each result with its interval, and a line where the base stood."""
    writes_object = any(r["plan"]["objective"] == "write" for r in results)
    names = BAR_MEASURES if writes_object else BAR_CHANGES
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
        "; dotted: before the edits" if writes_object else " of what was possible"
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
    """A panel for each of PANELS against the number of edits, a curve for each result with its interval."""
    wide, tall, left, top, gap, foot = 3.0, 1.9, 0.6, 0.8 + 0.21 * len(results), 0.62, 0.75
    lines = math.ceil(len(PANELS) / 2)
    builder = FigureBuilder(left + 2 * (wide + gap), top + lines * (tall + foot))
    _draw_heading(builder, results)
    for place, (name, caption) in enumerate(PANELS.items()):
        x, y = left + (place % 2) * (wide + gap), top + (place // 2) * (tall + foot)
        axes = _add_panel(builder, (x, y, wide, tall))
        for i, result in enumerate(results):
            _draw_curve(axes, name, result["checkpoints"], COLOURS[i % len(COLOURS)])
        if name in BAR_MEASURES:
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
    """Numbers of edits on a logarithmic axis, as many as have room."""
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
    """What a checkpoint has for a panel: mean, low and high; one figure where there is no interval."""
    if name in BAR_MEASURES:
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
    """The title, and a line for each result in its colour."""
    builder.add_text(
        0.2,
        0.28,
        truncate(title(results), int(builder.width / 0.12)),
        fontsize=12,
        weight="bold",
        va="center",
    )
    several = len({r["records"]["measured"] for r in results}) > 1
    models = len({r["model"]["name"] for r in results}) > 1
    for i, result in enumerate(results):
        number = f"{result['records']['measured']} edits, " if several else ""
        model = f"{result['model']['name']}: " if models else ""
        caption = truncate(
            show_control_characters(model + number + label(result)), int(builder.width / 0.085)
        )
        colour = COLOURS[i % len(COLOURS)]
        builder.add_text(0.2, 0.58 + 0.21 * i, f"■ {caption}", fontsize=8.5, va="center", color=colour)
