"""The neuron study as figures, as a page, and as rows of a table. Takes the study's JSON and needs no torch."""

from __future__ import annotations

from functools import partial
from typing import Any

from service.kit import plotting
from service.kit.plotting import FOREGROUND, GRID_COLOUR, MUTED, DrawFunction, FigureBuilder
from service.studies.trace_report import interval_text

Study = dict[str, Any]

COLOURS = {"attribution": "#238b45", "layers": "#6a51a3", "own": "#6a51a3", "other": "#a8a8b3"}
PANEL_TITLES = {"attribution": "share of positive attribution", "layers": "share of chosen neurons"}
TABLE_COLUMNS = ("layer", "neuron", "facts", "relations")


def title(study: Study) -> str:
    """Return the title of the report."""
    return f"Neurons of {study['facts']} facts in {study['model']['name']}"


def figures(study: Study) -> dict[str, DrawFunction]:
    """Return every figure by the name of its file."""
    return {"layers": partial(_layer_bars, study), "switches": partial(_switch_bars, study)}


def _draw_heading(builder: FigureBuilder, study: Study) -> None:
    builder.add_text(0.2, 0.3, title(study), fontsize=12.5, weight="bold", va="center")
    text = f"{study['nodes']} midpoints, up to {study['wordings']} wordings, threshold {study['threshold']:g}"
    builder.add_text(0.2, 0.58, text, fontsize=8.5, va="center", color=MUTED)


def _error_bars(row: dict[str, Any]) -> list[list[float]] | None:
    """Return the distances from the means to the ends of the intervals."""
    if row["low"] is None:
        return None
    return [
        [max(0.0, m - low) for m, low in zip(row["mean"], row["low"], strict=True)],
        [max(0.0, high - m) for m, high in zip(row["mean"], row["high"], strict=True)],
    ]


def _layer_bars(study: Study) -> FigureBuilder:
    """Draw where the attribution and the chosen neurons are, by layer."""
    layers, tall, left, top, gap = study["model"]["layers"], 2.1, 0.62, 1.3, 0.5
    wide = max(2.8, min(6.0, 0.2 * layers))
    builder = FigureBuilder(left + 2 * (wide + gap), top + tall + 0.75)
    _draw_heading(builder, study)
    for i, name in enumerate(PANEL_TITLES):
        x, row = left + i * (wide + gap), study[name]
        axes = builder.add_axes(x, top, wide, tall)
        axes.bar(
            range(layers),
            row["mean"],
            color=COLOURS[name],
            yerr=_error_bars(row),
            ecolor=FOREGROUND,
            width=0.7,
        )
        axes.set_xticks(range(0, layers, -(-layers // 12)))
        axes.grid(axis="y", color=GRID_COLOUR, linewidth=0.5)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        middle = x + wide / 2
        builder.add_text(middle, top - 0.2, PANEL_TITLES[name], ha="center", va="center", fontsize=10)
        builder.add_text(
            middle, top + tall + 0.36, "layer", ha="center", va="center", fontsize=8, color=MUTED
        )
    return builder


def _switch_bars(study: Study) -> FigureBuilder:
    """Draw by how much the probability of an object changes when the neurons of its fact, or of another, are
    switched."""
    builder = FigureBuilder(5.6, 1.55 + 2.1 + 0.6)
    _draw_heading(builder, study)
    axes = builder.add_axes(0.8, 1.55, 4.4, 2.1)
    switches = study["switches"]
    for i, (of, label) in enumerate((("own", "the fact itself"), ("other", "another fact"))):
        rows = [switches[s][of] for s in switches]
        means: dict[str, Any] = {"mean": [r["mean"] for r in rows]} | {
            end: None if rows[0][end] is None else [r[end] for r in rows] for end in ("low", "high")
        }
        axes.bar(
            [x + 0.38 * i for x in range(len(rows))], means["mean"], width=0.36, color=COLOURS[of], label=label,
            yerr=_error_bars(means), ecolor=FOREGROUND,
        )  # fmt: skip
    axes.set_xticks([x + 0.19 for x in range(len(switches))], list(switches))
    axes.axhline(0, color=FOREGROUND, linewidth=0.6)
    axes.grid(axis="y", color=GRID_COLOUR, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        frameon=False,
        fontsize=8,
        ncols=2,
        labelcolor=FOREGROUND,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.02),
    )
    return builder


def sentences(study: Study) -> list[str]:
    """Return sentences on what was measured and what came of it."""
    out = "; ".join(f"{n} {reason}" for reason, n in study["left_out"].items() if n) or "none"
    means, shared = study["attribution"]["mean"], study["shared"]
    strongest = max(range(len(means)), key=lambda layer: means[layer])
    shares = ", ".join(
        f"{shared[name]:.2f} for {label}"
        for name, label in (("same_relation", "one relation"), ("other_relation", "different relations"))
        if shared[name] is not None
    )
    return [
        (
            f"{study['scored']} facts were scored and {study['facts']} attributed: those whose object is the model's own greedy "
            f"answer. Left out: {out}. A fact has {study['neurons']['mean']:.1f} neurons ({interval_text(study['neurons'])}). "
            f"The attributions of a layer add up to the change of probability within {study['completeness_error']:.1e} of it."
        ),
        f"Layer {strongest} has the greatest share of the positive attribution, {means[strongest]:.2f}.",
        *(_switch_sentence(study, switch) for switch in study["switches"]),
        *([f"Neurons that two facts share, on average: {shares}."] if shares else []),
    ]


def _switch_sentence(study: Study, switch: str) -> str:
    own, other = study["switches"][switch]["own"], study["switches"][switch]["other"]
    return (
        f"With its neurons {switch}, the probability of a fact's object changes by {own['mean']:+.3f} of itself "
        f"({interval_text(own)}), that of another fact's by {other['mean']:+.3f} ({interval_text(other)})."
    )


def neuron_rows(study: Study) -> list[tuple[Any, ...]]:
    """Return the rows of TABLE_COLUMNS: the neurons of most facts."""
    return [
        (row["layer"], row["neuron"], row["facts"], ", ".join(row["relations"]) or None)
        for row in study["frequent"]
    ]


def page(study: Study) -> str:
    """Return the report as a self-contained HTML page."""
    pictures = "".join(
        plotting.inline_svg(plotting.render_svg(draw, title(study))) for draw in figures(study).values()
    )
    words = plotting.html_paragraphs(sentences(study))
    return plotting.html_page(
        title(study), words + pictures + plotting.html_table(TABLE_COLUMNS, neuron_rows(study))
    )
