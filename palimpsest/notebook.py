"""Edits, traces and evaluations as HTML, for notebooks. Only inline styles, so that a stored notebook shows them, too.

All texts of the service are escaped: they come from models and from other people.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

Json = Mapping[str, Any]

INK, MUTED, TRACK = "#2b2b33", "#63636f", "#ececf1"
BEFORE, AFTER = "#9a9aa6", "#6a51a3"
BAR_WIDTH = 120  # pixels
#: the colour of a cell with the whole effect, of each kind of a trace (Meng et al. 2022, figure 1)
KIND_COLOURS = {"hidden": (106, 81, 163), "mlp": (35, 139, 69), "attn": (203, 24, 29)}
KIND_TITLES = {"hidden": "hidden states", "mlp": "MLPs", "attn": "attention"}
MAX_SHOWN = 8  # changed answers
MEASURES = ("ES", "PS", "NS", "S", "free_says", "free_says_paraphrase", "free_kept")
_CELL = "padding:2px 8px;text-align:left;vertical-align:top;border:0"


def edit_html(edit: Any) -> str:
    """Return an edit: its fact, its probabilities before and after as bars, what it says, and what else changed."""
    result = edit.result or {}
    fact = f"{edit.prompt.replace('{}', edit.subject)} \u2192 {edit.target_new or edit.objective}"
    version = f", version {edit.version}" if edit.version is not None else ""
    parts = [_heading(fact, f"{edit.id}, {edit.status}{version}")]
    if edit.reason:
        parts.append(_note(edit.reason))
    rewrite = result.get("rewrite")
    if rewrite:
        parts.append(_table(_probability_rows(result)))
        said = [rewrite.get("text_before"), rewrite.get("text_after")]
        if all(text is not None for text in said):
            parts.append(_note(f"says: {said[0]!r} before, {said[1]!r} after"))
    for change in edit.also_changed[:MAX_SHOWN]:
        what = change.get("subject") or change.get("prompt")
        parts.append(_note(f"also changed: {what}: {change['before']} to {change['after'] or 'no answer'}"))
    return _page(parts)


def _probability_rows(result: Json) -> Iterator[Sequence[str]]:
    yield _header("prompt", "object", "before", "after")
    paraphrases, neighbors = result.get("paraphrase") or (), result.get("neighborhood") or ()
    rows = [(result["rewrite"], "new"), (result["rewrite"], "true")]
    rows += [(probe, "new") for probe in paraphrases] + [(probe, "true") for probe in neighbors]
    for probe, kind in rows:
        if probe[kind] is not None:
            bars = (_bar(probe["before"][kind], BEFORE), _bar(probe["after"][kind], AFTER))
            yield (escape(str(probe["prompt"])), escape(str(probe[kind])), *bars)


def trace_html(trace: Any) -> str:
    """Return a trace: a heat map of each kind, tokens by layers, on one scale."""
    result = trace.result
    if result is None:
        return _page([_heading(str(trace.request.get("prompt", "")), f"{trace.id}, {trace.status}")])
    low, kinds, tokens = result["low"], result["kinds"], result["tokens"]
    highest = max(score for kind in kinds.values() for row in kind["scores"] for score in row)
    heading = f"{result['prompt']} \u2192 {result['answer']['text']}"
    about = f"p = {result['high']:.3f}, {low:.3f} with noise on the subject; darkest cell: {highest:.3f}"
    maps = [_heat_map(name, kind["scores"], tokens, low, highest) for name, kind in kinds.items()]
    columns = "".join(f'<div style="margin-right:18px">{one}</div>' for one in maps)
    return _page([_heading(heading, about), f'<div style="display:flex;flex-wrap:wrap">{columns}</div>'])


def _heat_map(
    name: str, scores: Sequence[Sequence[float]], tokens: Sequence[str], low: float, highest: float
) -> str:
    red, green, blue = KIND_COLOURS.get(name, KIND_COLOURS["hidden"])
    size = "width:11px;height:15px;padding:0;border:1px solid #fff"
    lines = []
    for token, row in zip(tokens, scores, strict=True):
        cells = []
        for layer, score in enumerate(row):
            share = min(1.0, max(0.0, (score - low) / max(highest - low, 1e-9)))
            colour = f"rgba({red},{green},{blue},{share:.3f})"
            title = f"{token.strip()!r}, layer {layer}: {score:.3f}"
            cells.append(f'<td title="{escape(title)}" style="{size};background:{colour}"></td>')
        label = f'<td style="{_CELL};font-family:monospace;white-space:pre">{escape(token)}</td>'
        lines.append(f"<tr>{label}{''.join(cells)}</tr>")
    layers = len(scores[0]) if scores else 0
    caption = f"{KIND_TITLES.get(name, name)}, layers 0 to {layers - 1}"
    title = f'<caption style="caption-side:top;color:{MUTED};text-align:left">{escape(caption)}</caption>'
    return f'<table style="border-collapse:collapse">{title}{"".join(lines)}</table>'


def evaluation_html(evaluation: Any) -> str:
    """Return an evaluation: its main measures with their intervals as bars, before and after."""
    request, result = evaluation.request, evaluation.result
    heading = f"{request.get('method', '')}, {request.get('mode', '')}"
    parts = [_heading(heading, f"{evaluation.id}, {evaluation.status}")]
    if result is not None:
        parts.append(_note(f"{result['records']['measured']} records"))
        parts.append(_table(_measure_rows(result)))
    return _page(parts)


def _measure_rows(result: Json) -> Iterator[Sequence[str]]:
    yield _header("measure", "before", "after", "95 % interval")
    for name in MEASURES:
        if after := result["after"].get(name):
            before = result["before"].get(name)
            bar = _bar(before["mean"], BEFORE) if before else ""
            interval = f"{100 * after['low']:.1f} to {100 * after['high']:.1f} %"
            yield escape(name.replace("_", " ")), bar, _bar(after["mean"], AFTER), interval


def _bar(value: float | None, colour: str) -> str:
    """Return a share as a bar and a percentage; an unknown one as a dash."""
    if value is None:
        return "\u2013"
    width = round(BAR_WIDTH * min(1.0, max(0.0, value)))
    track = f"display:inline-block;width:{BAR_WIDTH}px;height:9px;background:{TRACK};margin-right:6px"
    fill = f"display:block;width:{width}px;height:9px;background:{colour}"
    bar = f'<span style="{track}"><span style="{fill}"></span></span>'
    return f'<span style="white-space:nowrap">{bar}{100 * value:.1f} %</span>'


def _header(*names: str) -> Sequence[str]:
    return [f'<b style="color:{MUTED}">{escape(name)}</b>' for name in names]


def _table(rows: Iterator[Sequence[str]]) -> str:
    """Return a table. Its cells are HTML."""
    lines = "".join(f"<tr>{''.join(f'<td style={_CELL!r}>{c}</td>' for c in row)}</tr>" for row in rows)
    return f'<table style="border-collapse:collapse">{lines}</table>'


def _heading(text: str, detail: str) -> str:
    return f'<div><b>{escape(text)}</b> <span style="color:{MUTED}">{escape(detail)}</span></div>'


def _note(text: str) -> str:
    return f'<div style="color:{MUTED}">{escape(text)}</div>'


def _page(parts: Sequence[str]) -> str:
    return f'<div style="font-size:13px;color:{INK};background:#fff;padding:6px">{"".join(parts)}</div>'
