"""A localisation study as figures, a page, and the rows of its tables.

Takes the study's JSON and needs no torch. Everything that is said in words is read from its figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from service.kit import plotting
from service.kit.plotting import INK, RULE, SOFT, Draw, Sheet
from service.studies.edit_objectives import PROBLEMS
from service.studies.localization_stats import EFFECTS, MEASURES
from service.studies.regression import MODELS
from service.studies.trace_report import ends
from service.tracing.heatmap import Box

Study = dict[str, Any]

#: score of an edit -> colour, and what it is of
SCORES = {
    "rewrite": ("#6a51a3", "own prompt"),
    "paraphrase": ("#2171b5", "paraphrases"),
    "neighbour": ("#7f7f8a", "neighbours kept"),
}
#: reading of the tracing effect -> its colour
TRACED = dict(zip(EFFECTS, ("#238b45", "#74c476"), strict=True))
#: model -> colour of its bars, and what explains
BARS = {
    "layer": ("#6a51a3", "the layer"),
    "effect": ("#238b45", "the tracing effect"),
    "both": ("#a8a8b3", "both"),
}
REGRESSIONS = (
    "method", "objective", "score", "effect", "facts", "R² layer", "R² effect", "R² both", "gain", "by chance", "p", "F test's p",
)  # fmt: skip
CHOICES = (
    "method",
    "objective",
    "score",
    "best layer",
    "best for the others",
    "where the trace is strongest",
    "any layer",
    "trace - best",
)


def title(study: Study) -> str:
    return f"Does tracing say where to edit? {study['facts']} facts in {study['model']['name']}"


def figures(study: Study) -> dict[str, Draw]:
    """Every figure by the name of its file."""
    return {"layers": partial(_layers, study), "explained": partial(_explained, study)}


# Drawing


def _head(sheet: Sheet, study: Study) -> None:
    sheet.write(0.2, 0.3, title(study), fontsize=12.5, weight="bold", va="center")
    sheet.write(0.2, 0.58, _conditions(study), fontsize=8.5, va="center", color=SOFT)


def _layers(study: Study) -> Sheet:
    """The tracing effect by layer, and beside it the scores of every kind of edit; a line of panels for each method."""
    methods, objectives = _names(study, "method"), _names(study, "objective")
    wide, tall, gap, left, top, foot = 2.7, 1.9, 0.4, 0.62, 1.65, 0.75
    columns = 1 + len(objectives)
    sheet = Sheet(
        left + columns * (wide + gap) + 0.1, top + len(methods) * (tall + foot) + (len(methods) - 1) * 0.35
    )
    _head(sheet, study)
    for row, method in enumerate(methods):
        y = top + row * (tall + foot + 0.35)
        traced = sheet.axes(left, y, wide, tall)
        of_effects = {name: _picked(study["effects"][name], study["layers"]) for name in EFFECTS}
        _curves(traced, study["layers"], of_effects, TRACED)
        _entitle(sheet, (left, y, wide, tall), "tracing effect", row == 0 and traced, 1)
        for column, objective in enumerate(objectives, 1):
            box = (left + column * (wide + gap), y, wide, tall)
            axes = sheet.axes(*box)
            found = _scores(study, method, objective)
            lines = {m: found[m]["by_layer"] for m in MEASURES if found[m]}
            _curves(axes, study["layers"], lines, {m: colour for m, (colour, _) in SCORES.items()})
            axes.tick_params(labelleft=False)
            _entitle(sheet, box, f"{method}: {objective}", row == 0 and column == 1 and axes, 3)
    return sheet


def _picked(row: Mapping[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    return {end: row[end] and [row[end][m] for m in layers] for end in ("mean", "low", "high")}


def _curves(
    axes: Axes, layers: Sequence[int], rows: Mapping[str, Mapping[str, Any]], colours: Mapping[str, str]
) -> None:
    """A line for each row, with its interval; all are shares, so that all panels have one scale."""
    for name, row in rows.items():
        label = SCORES[name][1] if name in SCORES else name
        axes.plot(
            layers, row["mean"], color=colours[name], linewidth=1.6, marker="o", markersize=2.6, label=label
        )
        if row["low"]:
            axes.fill_between(layers, row["low"], row["high"], color=colours[name], alpha=0.15, lw=0)
    axes.set_ylim(-0.03, 1.05)
    axes.set_xticks(layers[:: math.ceil(len(layers) / 12)])
    axes.margins(x=0.03)
    axes.grid(axis="y", color=RULE, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _entitle(sheet: Sheet, box: Box, text: str, legend_of: Axes | bool, columns: int) -> None:
    """What a panel shows, and above the first of its sort what its colours mean."""
    left, top, wide, tall = box
    middle = left + wide / 2
    sheet.write(middle, top - 0.17, text, ha="center", va="center", fontsize=10)
    sheet.write(middle, top + tall + 0.34, "layer", ha="center", va="center", fontsize=8, color=SOFT)
    if isinstance(legend_of, Axes):
        legend_of.legend(
            frameon=False, fontsize=7.5, ncols=columns, labelcolor=INK, borderpad=0, handlelength=1.2, columnspacing=0.8,
            loc="lower left", bbox_to_anchor=(0.0, 1 + 0.3 / tall),
        )  # fmt: skip


def _explained(study: Study) -> Sheet:
    """R2 of the layer, of the tracing effect, and of both, for every kind of edit; a panel for each reading of the effect."""
    left, top, tall, foot = 0.62, 1.6, 1.9, 1.15
    wide = max(5.8, 1.1 * len(study["studies"]))
    sheet = Sheet(left + wide + 0.3, top + len(EFFECTS) * (tall + foot) - 0.35)
    _head(sheet, study)
    for i, effect in enumerate(EFFECTS):
        axes = _panel(sheet, study, effect, (left, top + i * (tall + foot), wide, tall))
        if i == 0:
            axes.legend(
                handles=[Patch(color=colour, alpha=0.85, label=label) for colour, label in BARS.values()],
                frameon=False, fontsize=8, ncols=3, labelcolor=INK, borderpad=0,
                loc="lower left", bbox_to_anchor=(0.0, 1 + 0.42 / tall),
            )  # fmt: skip
    return sheet


def _panel(sheet: Sheet, study: Study, effect: str, box: Box) -> Axes:
    """Three bars for every kind of edit; what the trace adds stands above them."""
    left, top, wide, tall = box
    axes = sheet.axes(*box)
    for place, kind in enumerate(study["studies"]):
        found = kind["scores"]["rewrite"]["regression"][effect]
        x = left + wide * (place + 0.5) / len(study["studies"])
        sheet.write(x, top + tall + 0.2, kind["method"], ha="center", va="center", fontsize=8.5)
        style = {"ha": "center", "va": "center", "color": SOFT}
        sheet.write(x, top + tall + 0.38, kind["objective"], fontsize=8.5, **style)
        if found:
            _triple(axes, place, found)
            gain = found["gain"]
            sheet.write(x, top - 0.02, f"+{gain['value']:.3f}, p {_p(gain['p'])}", fontsize=7.5, **style)
    axes.set_xlim(-0.5, len(study["studies"]) - 0.5)
    axes.set_ylim(0, 1.05)
    axes.set_xticks([])
    axes.grid(axis="y", color=RULE, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    sheet.write(left, top - 0.28, f"R² of the rewrite score; effect: {effect}", va="center", fontsize=9.5)
    return axes


def _triple(axes: Axes, place: int, found: Mapping[str, Any]) -> None:
    """Three bars with their intervals."""
    for i, name in enumerate(MODELS):
        colour, _ = BARS[name]
        figure, x = found["r2"][name], place + 0.24 * (i - 1)
        axes.bar([x], [figure["value"]], 0.22, color=colour, alpha=0.85)
        if figure["low"] is not None:
            axes.vlines([x], figure["low"], figure["high"], color=INK, linewidth=0.8)


def _names(study: Study, what: str) -> list[str]:
    return list(dict.fromkeys(s[what] for s in study["studies"]))


def _scores(study: Study, method: str, objective: str) -> dict[str, Any]:
    found = next(s for s in study["studies"] if (s["method"], s["objective"]) == (method, objective))
    return found["scores"]  # type: ignore[no-any-return]


# Words


def _conditions(study: Study) -> str:
    noise = study["noise"]
    times = f"{noise['factor']:g}σ = " if noise["factor"] is not None else ""
    return (
        f"{len(study['layers'])} layers, each fact edited at every one; traces: windows of {study['window']} MLP layers, "
        f"{study['samples']} samples, noise {times}{noise['level']:.3g}"
    )


def _p(p: float) -> str:
    return f"{p:.3f}".lstrip("0")


def sentences(study: Study) -> list[str]:
    """What was done, and what came of it."""
    out = "; ".join(f"{n} {why}" for why, n in study["left_out"].items() if n) or "none"
    lines = [
        (
            f"{study['asked']} facts were asked; {study['facts']} that the model knows were traced, and edited alone at "
            f"{len(study['layers'])} layers. Left out: {out}. A score is the share of the possible change that an edit "
            "made: of a neighbour, the share that it left alone. The tracing effect at a layer is the share of the object's "
            f"probability that comes back when {study['window']} MLP outputs around it are put back."
        ),
        (
            "R² says how much of the scores' variance is explained. Intervals are of 95 % and draw whole facts again. "
            "By chance means: when facts exchange their traces; p is how often that gains as much as the facts' own. The F "
            "test takes each row for a new fact, and so finds too much."
        ),
    ]
    return lines + [line for s in study["studies"] for line in _said(s)]


def _said(study: Mapping[str, Any]) -> Iterator[str]:
    """Of one kind of edit, on the edit's own prompt."""
    found, what = study["scores"]["rewrite"], PROBLEMS[study["objective"]].words
    regression, choice = found["regression"][EFFECTS[0]], found["choice"]
    if regression:
        r2, gain = regression["r2"], regression["gain"]
        yield (
            f"{study['method']}, to {what} ({study['facts']} facts): the layer explains {r2['layer']['value']:.3f}, the "
            f"tracing effect {r2['effect']['value']:.3f}, both {r2['both']['value']:.3f}. The trace adds {gain['value']:.3f}; "
            f"chance adds {gain['chance']:.3f} (p {_p(gain['p'])})."
        )
    if choice:
        ways = {name: way["mean"] for name, way in choice["ways"].items()}
        yield (
            f"Edited where its own trace is strongest, a fact scores {ways['where the trace is strongest']:.3f}; at the layer "
            f"that is best for the other facts {ways['best for others']:.3f}; the difference is {choice['gained']['mean']:.3f} "
            f"({ends(choice['gained'])})."
        )


def regressions(study: Study) -> list[tuple[Any, ...]]:
    """The rows of REGRESSIONS."""
    made: list[tuple[Any, ...]] = []
    for s, measure, found in _found(study):
        for effect, r in found["regression"].items():
            if r:
                r2 = [r["r2"][name]["value"] for name in MODELS]
                gain = f"{r['gain']['value']:.3f} ({ends(r['gain'])})"
                chance = (r["gain"]["chance"], r["gain"]["p"], r["f_test"]["p"])
                made.append((s["method"], s["objective"], measure, effect, r["facts"], *r2, gain, *chance))
    return made


def choices(study: Study) -> list[tuple[Any, ...]]:
    """The rows of CHOICES."""
    return [
        (
            s["method"], s["objective"], measure, found["choice"]["best_layer"],
            *(way["mean"] for way in found["choice"]["ways"].values()),
            f"{found['choice']['gained']['mean']:.3f} ({ends(found['choice']['gained'])})",
        )
        for s, measure, found in _found(study)
        if found["choice"]
    ]  # fmt: skip


def _found(study: Study) -> Iterator[tuple[Mapping[str, Any], str, Mapping[str, Any]]]:
    """Each kind of edit with each score that it has."""
    for s in study["studies"]:
        for measure in MEASURES:
            if s["scores"][measure]:
                yield s, measure, s["scores"][measure]


def page(study: Study) -> str:
    """A page that needs nothing else: the words, the figures, the tables."""
    pictures = "".join(plotting.inline(plotting.svg(draw, title(study))) for draw in figures(study).values())
    tables = (
        plotting.table(REGRESSIONS, regressions(study))
        + "<p></p>\n"
        + plotting.table(CHOICES, choices(study))
    )
    return plotting.page(title(study), plotting.paragraphs(sentences(study)) + pictures + tables)
