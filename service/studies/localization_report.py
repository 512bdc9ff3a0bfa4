"""The localization study as figures, a page, and rows of tables. Takes the study's JSON and needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from service.kit import plotting
from service.kit.plotting import FOREGROUND, GRID_COLOUR, MUTED, DrawFunction, FigureBuilder
from service.studies.edit_objectives import STUDY_OBJECTIVES
from service.studies.localization_stats import (
    BEST_FOR_OTHERS,
    EDIT_SCORES,
    EFFECT_READINGS,
    RANDOM_LAYER,
    STRONGEST_TRACE,
)
from service.studies.regression import REGRESSION_MODELS
from service.studies.trace_report import interval_text
from service.tracing.heatmap import Box

Study = dict[str, Any]

#: change score of an edit -> colour and label
SCORE_STYLES = {
    "rewrite": ("#6a51a3", "own prompt"),
    "paraphrase": ("#2171b5", "paraphrases"),
    "neighbour": ("#7f7f8a", "neighbours preserved"),
}
#: reading of the tracing effect -> colour
EFFECT_COLOURS = dict(zip(EFFECT_READINGS, ("#238b45", "#74c476"), strict=True))
#: regression model -> colour and label of its bars
MODEL_BARS = {
    "layer": ("#6a51a3", "the layer"),
    "effect": ("#238b45", "the tracing effect"),
    "both": ("#a8a8b3", "both"),
}
REGRESSION_COLUMNS = (
    "method", "objective", "score", "effect", "facts", "R² layer", "R² effect", "R² both", "gain", "by chance", "p", "p of F test",
)  # fmt: skip
CHOICE_COLUMNS = (
    "method",
    "objective",
    "score",
    "best layer",
    "best layer of the others",
    "layer of the strongest trace",
    "random layer",
    "trace - best",
)


def title(study: Study) -> str:
    """Return the title of the report."""
    return f"Localization and editing of {study['facts']} facts in {study['model']['name']}"


def figures(study: Study) -> dict[str, DrawFunction]:
    """Return every figure by the name of its file."""
    return {"layers": partial(_layer_panels, study), "explained": partial(_explained_variance, study)}


# Drawing


def _draw_heading(builder: FigureBuilder, study: Study) -> None:
    builder.add_text(0.2, 0.3, title(study), fontsize=12.5, weight="bold", va="center")
    builder.add_text(0.2, 0.58, _conditions_text(study), fontsize=8.5, va="center", color=MUTED)


def _layer_panels(study: Study) -> FigureBuilder:
    """Draw a row of panels for each method: the tracing effect by layer, then the scores of every objective."""
    methods, objectives = _distinct(study, "method"), _distinct(study, "objective")
    wide, tall, gap, left, top, foot = 2.7, 1.9, 0.4, 0.62, 1.65, 0.75
    columns = 1 + len(objectives)
    builder = FigureBuilder(
        left + columns * (wide + gap) + 0.1, top + len(methods) * (tall + foot) + (len(methods) - 1) * 0.35
    )
    _draw_heading(builder, study)
    for row, method in enumerate(methods):
        y = top + row * (tall + foot + 0.35)
        traced = builder.add_axes(left, y, wide, tall)
        of_effects = {
            name: _select_layers(study["effects"][name], study["layers"]) for name in EFFECT_READINGS
        }
        _draw_curves(traced, study["layers"], of_effects, EFFECT_COLOURS)
        _draw_panel_title(builder, (left, y, wide, tall), "tracing effect", row == 0 and traced, 1)
        for column, objective in enumerate(objectives, 1):
            box = (left + column * (wide + gap), y, wide, tall)
            axes = builder.add_axes(*box)
            scores = _scores(study, method, objective)
            lines = {m: scores[m]["by_layer"] for m in EDIT_SCORES if scores[m]}
            _draw_curves(axes, study["layers"], lines, {m: colour for m, (colour, _) in SCORE_STYLES.items()})
            axes.tick_params(labelleft=False)
            _draw_panel_title(builder, box, f"{method}: {objective}", row == 0 and column == 1 and axes, 3)
    return builder


def _select_layers(row: Mapping[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    return {end: row[end] and [row[end][m] for m in layers] for end in ("mean", "low", "high")}


def _draw_curves(
    axes: Axes, layers: Sequence[int], rows: Mapping[str, Mapping[str, Any]], colours: Mapping[str, str]
) -> None:
    """Draw a curve with its interval for each row. All are shares, so that all panels have one scale."""
    for name, row in rows.items():
        label = SCORE_STYLES[name][1] if name in SCORE_STYLES else name
        axes.plot(
            layers, row["mean"], color=colours[name], linewidth=1.6, marker="o", markersize=2.6, label=label
        )
        if row["low"]:
            axes.fill_between(layers, row["low"], row["high"], color=colours[name], alpha=0.15, lw=0)
    axes.set_ylim(-0.03, 1.05)
    axes.set_xticks(layers[:: math.ceil(len(layers) / 12)])
    axes.margins(x=0.03)
    axes.grid(axis="y", color=GRID_COLOUR, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_panel_title(
    builder: FigureBuilder, box: Box, text: str, legend_of: Axes | bool, columns: int
) -> None:
    """Draw the title of a panel, and the legend if the panel's axes are given."""
    left, top, wide, tall = box
    middle = left + wide / 2
    builder.add_text(middle, top - 0.17, text, ha="center", va="center", fontsize=10)
    builder.add_text(middle, top + tall + 0.34, "layer", ha="center", va="center", fontsize=8, color=MUTED)
    if isinstance(legend_of, Axes):
        legend_of.legend(
            frameon=False, fontsize=7.5, ncols=columns, labelcolor=FOREGROUND, borderpad=0, handlelength=1.2, columnspacing=0.8,
            loc="lower left", bbox_to_anchor=(0.0, 1 + 0.3 / tall),
        )  # fmt: skip


def _explained_variance(study: Study) -> FigureBuilder:
    """Draw R2 of layer, tracing effect and both for every kind of edit, in a panel for each reading of the effect."""
    left, top, tall, foot = 0.62, 1.6, 1.9, 1.15
    wide = max(5.8, 1.1 * len(study["studies"]))
    builder = FigureBuilder(left + wide + 0.3, top + len(EFFECT_READINGS) * (tall + foot) - 0.35)
    _draw_heading(builder, study)
    for i, effect in enumerate(EFFECT_READINGS):
        axes = _draw_r2_panel(builder, study, effect, (left, top + i * (tall + foot), wide, tall))
        if i == 0:
            axes.legend(
                handles=[Patch(color=colour, alpha=0.85, label=label) for colour, label in MODEL_BARS.values()],
                frameon=False, fontsize=8, ncols=3, labelcolor=FOREGROUND, borderpad=0,
                loc="lower left", bbox_to_anchor=(0.0, 1 + 0.42 / tall),
            )  # fmt: skip
    return builder


def _draw_r2_panel(builder: FigureBuilder, study: Study, effect: str, box: Box) -> Axes:
    """Draw three bars for every kind of edit, with the gain of the trace above them."""
    left, top, wide, tall = box
    axes = builder.add_axes(*box)
    for place, kind in enumerate(study["studies"]):
        regression = kind["scores"]["rewrite"]["regression"][effect]
        x = left + wide * (place + 0.5) / len(study["studies"])
        builder.add_text(x, top + tall + 0.2, kind["method"], ha="center", va="center", fontsize=8.5)
        style = {"ha": "center", "va": "center", "color": MUTED}
        builder.add_text(x, top + tall + 0.38, kind["objective"], fontsize=8.5, **style)
        if regression:
            _draw_r2_bars(axes, place, regression)
            gain = regression["gain"]
            builder.add_text(
                x, top - 0.02, f"+{gain['value']:.3f}, p {_p_value_text(gain['p'])}", fontsize=7.5, **style
            )
    axes.set_xlim(-0.5, len(study["studies"]) - 0.5)
    axes.set_ylim(0, 1.05)
    axes.set_xticks([])
    axes.grid(axis="y", color=GRID_COLOUR, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    builder.add_text(
        left, top - 0.28, f"R² of the rewrite score; effect: {effect}", va="center", fontsize=9.5
    )
    return axes


def _draw_r2_bars(axes: Axes, place: int, regression: Mapping[str, Any]) -> None:
    """Draw three bars with their intervals."""
    for i, name in enumerate(REGRESSION_MODELS):
        colour, _ = MODEL_BARS[name]
        figure, x = regression["r2"][name], place + 0.24 * (i - 1)
        axes.bar([x], [figure["value"]], 0.22, color=colour, alpha=0.85)
        if figure["low"] is not None:
            axes.vlines([x], figure["low"], figure["high"], color=FOREGROUND, linewidth=0.8)


def _distinct(study: Study, what: str) -> list[str]:
    return list(dict.fromkeys(s[what] for s in study["studies"]))


def _scores(study: Study, method: str, objective: str) -> dict[str, Any]:
    study_entry = next(s for s in study["studies"] if (s["method"], s["objective"]) == (method, objective))
    return study_entry["scores"]  # type: ignore[no-any-return]


# Words


def _conditions_text(study: Study) -> str:
    noise = study["noise"]
    times = f"{noise['factor']:g}σ = " if noise["factor"] is not None else ""
    return (
        f"each fact edited at {len(study['layers'])} layers; traces: windows of {study['window']} MLP layers, "
        f"{study['samples']} samples, noise {times}{noise['level']:.3g}"
    )


def _p_value_text(p: float) -> str:
    return f"{p:.3f}".lstrip("0")


def sentences(study: Study) -> list[str]:
    """Return sentences on what was measured and what came of it."""
    out = "; ".join(f"{n} {reason}" for reason, n in study["left_out"].items() if n) or "none"
    lines = [
        (
            f"{study['scored']} facts were scored; {study['facts']} that the model knows were traced, and edited alone at "
            f"{len(study['layers'])} layers. Left out: {out}. A score is the share of the possible change that an edit "
            "made; of a neighbour, the share that it did not make. The tracing effect at a layer is the share of the total "
            f"effect that returns when {study['window']} MLP outputs around the layer are restored."
        ),
        (
            "R² is the explained share of the variance of the scores. Intervals are 95 % bootstrap intervals over facts. "
            "The gain by chance is the mean gain after permuting the traces of facts; p is the share of permutations with at least "
            "the observed gain. The F test treats each row as an independent fact, and its p is therefore too small."
        ),
    ]
    return lines + [line for s in study["studies"] for line in _edit_sentences(s)]


def _edit_sentences(study: Mapping[str, Any]) -> Iterator[str]:
    """Return sentences on one kind of edit, by its score on the edit's own prompt."""
    scores, action = study["scores"]["rewrite"], STUDY_OBJECTIVES[study["objective"]].description
    regression, choice = scores["regression"][EFFECT_READINGS[0]], scores["choice"]
    if regression:
        r2, gain = regression["r2"], regression["gain"]
        yield (
            f"{study['method']}, to {action} ({study['facts']} facts): the layer explains {r2['layer']['value']:.3f}, the "
            f"tracing effect {r2['effect']['value']:.3f}, both {r2['both']['value']:.3f} of the variance. The trace adds "
            f"{gain['value']:.3f}; chance adds {gain['chance']:.3f} (p {_p_value_text(gain['p'])})."
        )
    if choice:
        strategies = {name: way["mean"] for name, way in choice["ways"].items()}
        yield (
            f"The mean score is {strategies[STRONGEST_TRACE]:.3f} at the layer of each fact's strongest trace, and "
            f"{strategies[BEST_FOR_OTHERS]:.3f} at the layer that is best for the other facts; the difference is "
            f"{choice['gain']['mean']:.3f} ({interval_text(choice['gain'])})."
        )


def regression_rows(study: Study) -> list[tuple[Any, ...]]:
    """Return the rows of REGRESSION_COLUMNS."""
    table_rows: list[tuple[Any, ...]] = []
    for s, measure, scores in _iterate_scores(study):
        for effect, r in scores["regression"].items():
            if r:
                r2 = [r["r2"][name]["value"] for name in REGRESSION_MODELS]
                gain = f"{r['gain']['value']:.3f} ({interval_text(r['gain'])})"
                chance = (r["gain"]["chance"], r["gain"]["p"], r["f_test"]["p"])
                table_rows.append(
                    (s["method"], s["objective"], measure, effect, r["facts"], *r2, gain, *chance)
                )
    return table_rows


def choice_rows(study: Study) -> list[tuple[Any, ...]]:
    """Return the rows of CHOICE_COLUMNS."""
    return [
        (
            s["method"], s["objective"], measure, scores["choice"]["best_layer"],
            *(scores["choice"]["ways"][way]["mean"] for way in (BEST_FOR_OTHERS, STRONGEST_TRACE, RANDOM_LAYER)),
            f"{scores['choice']['gain']['mean']:.3f} ({interval_text(scores['choice']['gain'])})",
        )
        for s, measure, scores in _iterate_scores(study)
        if scores["choice"]
    ]  # fmt: skip


def _iterate_scores(study: Study) -> Iterator[tuple[Mapping[str, Any], str, Mapping[str, Any]]]:
    """Iterate over each kind of edit with each score that it has."""
    for s in study["studies"]:
        for measure in EDIT_SCORES:
            if s["scores"][measure]:
                yield s, measure, s["scores"][measure]


def page(study: Study) -> str:
    """Return the report as a self-contained HTML page."""
    pictures = "".join(
        plotting.inline_svg(plotting.render_svg(draw, title(study))) for draw in figures(study).values()
    )
    tables = (
        plotting.html_table(REGRESSION_COLUMNS, regression_rows(study))
        + "<p></p>\n"
        + plotting.html_table(CHOICE_COLUMNS, choice_rows(study))
    )
    return plotting.html_page(title(study), plotting.html_paragraphs(sentences(study)) + pictures + tables)
