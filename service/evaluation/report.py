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

from service.evaluation.metrics import CHANGES, MEASURES, SCORES
from service.kit import plotting
from service.kit.plotting import INK, PAPER, RULE, SOFT, Draw, Sheet, cut, visible

Result = dict[str, Any]
Cell = str | float | int | None

COLOURS = ("#6a51a3", "#238b45", "#cb181d", "#2171b5", "#d94801", "#636363", "#b8860b", "#17a398")
BARS = ("ES", "PS", "NS", "S")
SHARES = ("rewrite", "paraphrase", "neighbour")  # in place of BARS where nothing new is written
#: a panel of a sequence -> what stands on it
PANELS = {
    "S": "S: all three, %",
    "ES": "ES: the edits hold, %",
    "PS": "PS: so do their paraphrases, %",
    "NS": "NS: neighbours are kept, %",
    "loss": "rise of the loss on plain texts, %",
    "norm": "change of a weight, in its norms",
}
MODES = {"single": "one at a time", "sequence": "one after another"}
MISSED = 40  # edits that did not hold, shown on the page

MEASURE_COLUMNS = ("measure", "before", "after", "95 % interval", "records", "what it is")
CHECKPOINT_COLUMNS = (
    "edits", "ES", "PS", "NS", "S", "95 % interval", "exact", "first 10", "first 100", "still hold", "loss", "drift", "norm",
)  # fmt: skip


# In words and tables


def label(result: Result) -> str:
    """What tells one result from another: the method, what was asked of it, and how."""
    plan = result["plan"]
    asked = [f"{name}={value}" for name, value in (plan["hparams"] or {}).items()]
    parts = [plan["method"], *asked]
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
    how = MODES[modes.pop()] if len(modes) == 1 else "one at a time and one after another"
    return f"{number} of {visible(names)}, {how}"


def sentences(result: Result) -> list[str]:
    """What was done, what was left out, and how long it took."""
    plan, records = result["plan"], result["records"]
    layers = ", ".join(map(str, result["parameters"]["layers"]))
    lines = [f"{label(result)}: {records['measured']} edits at layers {layers} of {result['model']['name']}."]
    if result["strengthened"]:
        lines.append(f"{result['strengthened']} did not take at first and were strengthened.")
    if left := records["left_out"]:
        lines.append(f"{len(left)} records were left out; of {left[0]['record']}: {left[0]['reason']}")
    if lacking := records["lacking"]:
        lines.append("Lacking: " + "; ".join(f"{what} in {n}" for what, n in sorted(lacking.items())) + ".")
    if result["plain"]:
        lines.append(
            f"Damage is measured on {result['plain']['texts']} plain texts: {result['plain']['source']}."
        )
    minutes, seconds = result["edits_per_minute"], result["seconds"]
    spent = ", ".join(f"{kind} {s:.1f}" for kind, s in seconds.items())
    speed = ", ".join(f"{name} {n:.1f}" for name, n in minutes.items())
    lines.append(f"Seconds: {spent}. Edits per minute: {speed}. Seed {plan['seed']}.")
    return lines


def measure_rows(result: Result) -> list[tuple[Cell, ...]]:
    """Every measure before and after: the rows of MEASURE_COLUMNS."""
    rows: list[tuple[Cell, ...]] = []
    words = {
        "S": "harmonic mean of ES, PS, NS",
        "S_accuracy": "harmonic mean of the three accuracies",
        **MEASURES,
    }
    for name in (*SCORES, *MEASURES):
        if found := result["after"].get(name):
            figures = (_figure(result["before"].get(name)), found["mean"], _interval(found), found["n"])
            rows.append((name, *figures, words[name]))
    rows += [
        (f"share: {name}", None, found["mean"], _interval(found), found["n"], CHANGES[name])
        for name, found in result["changes"].items()
        if found
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
        found, damage, still = table["measures"], table["damage"] or {}, table["still"]
        first = {r["first"]: _figure(r["ES"]) for r in table["retention"]}
        rows.append(
            (
                table["edits"],
                *(_figure(found.get(name)) for name in BARS),
                _interval(found["S"]) if found.get("S") else None,
                _figure(found["exact"]),
                first.get(10),
                first.get(100),
                f"{still['hold']} of {still['held_before']}" if still["held_before"] else None,
                damage.get("loss_after"),
                damage.get("drift"),
                max(table["norm"].values(), default=0.0),
            )
        )
    return rows


def _figure(found: dict[str, float] | None) -> float | None:
    return None if found is None else found["mean"]


def _interval(found: dict[str, float]) -> str:
    return f"{found['low']:.3f} to {found['high']:.3f}"


def page(results: Sequence[Result]) -> str:
    """A page that needs nothing else: figures of all results together, then each in words and tables."""
    body = "".join(plotting.inline(plotting.svg(draw, name)) for name, draw in figures(results).items())
    for result in results:
        body += f"<h2>{html.escape(visible(label(result)))}</h2>\n" + plotting.paragraphs(sentences(result))
        if rows := checkpoint_rows(result):
            body += plotting.table(CHECKPOINT_COLUMNS, rows)
        body += plotting.table(MEASURE_COLUMNS, measure_rows(result)) + _missed(result)
    return plotting.page(title(results), body)


def _missed(result: Result) -> str:
    """The edits that did not hold, with their prompts."""
    if result["plan"]["objective"] != "write":
        return ""
    missed = [
        r
        for r in result["rows"]
        if not (r["after"]["exact"] if r["target_true"] is None else r["after"]["ES"])
    ]
    if not missed:
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
        for r in missed[:MISSED]
    ]
    said = f"{len(missed)} edits did not hold" + (f"; the first {MISSED}:" if len(missed) > MISSED else ":")
    columns = ("record", "subject", "prompt", "true object", "new object", "p(new)", "loss when found")
    return plotting.paragraphs([said]) + plotting.table(columns, shown)


# Drawing


def figures(results: Sequence[Result]) -> dict[str, Draw]:
    """Every figure by its name: bars of all results, curves of those that have checkpoints."""
    found: dict[str, Draw] = {"bars": partial(_bars, results)}
    if curved := [r for r in results if len(r.get("checkpoints", ())) > 1]:
        found["curves"] = partial(_curves, curved)
    return found


def _bars(results: Sequence[Result]) -> Sheet:
    """A group for each measure, a bar for each result with its interval, and a line where the base stood."""
    written = any(r["plan"]["objective"] == "write" for r in results)
    names = BARS if written else SHARES
    left, top, wide, tall = 0.6, 0.85 + 0.21 * len(results), max(5.4, 0.55 * len(results) * len(names)), 2.6
    sheet = Sheet(left + wide + 0.3, top + tall + 0.55)
    _head(sheet, results)
    axes = _axes(sheet, (left, top, wide, tall))
    width = 0.8 / len(results)
    for i, result in enumerate(results):
        for place, name in enumerate(names):
            found = result["after" if written else "changes"].get(name)
            if found:
                x = place + width * (i - (len(results) - 1) / 2)
                _bar(axes, x, width, found, COLOURS[i % len(COLOURS)])
                _base(axes, x, width, result["before"].get(name))
    axes.set_ylim(0, 105)
    axes.set_xticks(range(len(names)), names, fontsize=9)
    axes.tick_params(axis="x", length=0)
    words = "%, with 95 % intervals" + ("; dotted: before the edits" if written else " of what was possible")
    sheet.write(left, top - 0.14, words, va="center", fontsize=8, color=SOFT)
    return sheet


def _bar(axes: Axes, x: float, width: float, found: dict[str, float], colour: str) -> None:
    mean, low, high = (100 * found[k] for k in ("mean", "low", "high"))
    axes.bar(x, mean, 0.9 * width, color=colour, alpha=0.85)
    ends = [[max(0.0, mean - low)], [max(0.0, high - mean)]]
    axes.errorbar(x, mean, yerr=ends, color=INK, linewidth=0.9, capsize=2.5)
    axes.text(x, 2.5, f"{mean:.1f}", ha="center", va="bottom", fontsize=7.5, color=PAPER)


def _base(axes: Axes, x: float, width: float, found: dict[str, float] | None) -> None:
    if found:
        y = 100 * found["mean"]
        axes.plot([x - 0.45 * width, x + 0.45 * width], [y, y], color=INK, linewidth=1.1, linestyle=":")


def _curves(results: Sequence[Result]) -> Sheet:
    """A panel for each of PANELS against the number of edits, a curve for each result with its interval."""
    wide, tall, left, top, gap, foot = 3.0, 1.9, 0.6, 0.8 + 0.21 * len(results), 0.62, 0.75
    lines = math.ceil(len(PANELS) / 2)
    sheet = Sheet(left + 2 * (wide + gap), top + lines * (tall + foot))
    _head(sheet, results)
    for place, (name, words) in enumerate(PANELS.items()):
        x, y = left + (place % 2) * (wide + gap), top + (place // 2) * (tall + foot)
        axes = _axes(sheet, (x, y, wide, tall))
        for i, result in enumerate(results):
            _curve(axes, name, result["checkpoints"], COLOURS[i % len(COLOURS)])
        if name in BARS:
            axes.set_ylim(-2, 102)
        else:
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        _counts(axes, {t["edits"] for r in results for t in r["checkpoints"]})
        sheet.write(x, y - 0.13, words, va="center", fontsize=9)
        sheet.write(x + wide / 2, y + tall + 0.36, "edits", ha="center", va="center", fontsize=8, color=SOFT)
    return sheet


def _counts(axes: Axes, counts: set[int]) -> None:
    """Numbers of edits on a logarithmic axis, as many as have room."""
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    shown: list[int] = []
    for count in sorted(counts):
        if not shown or count >= 2 * shown[-1]:
            shown.append(count)
    axes.set_xticks(shown, [str(n) for n in shown])


def _curve(axes: Axes, name: str, tables: Sequence[dict[str, Any]], colour: str) -> None:
    points = [(t["edits"], *found) for t in tables if (found := _point(name, t)) is not None]
    if not points:
        return
    edits, means, lows, highs = zip(*points, strict=True)
    axes.plot(edits, means, color=colour, linewidth=1.5, marker="o", markersize=3)
    axes.fill_between(edits, lows, highs, color=colour, alpha=0.15, linewidth=0)


def _point(name: str, table: dict[str, Any]) -> tuple[float, float, float] | None:
    """What a checkpoint has for a panel: mean, low and high; one figure where there is no interval."""
    if name in BARS:
        found = table["measures"].get(name)
        return None if found is None else (100 * found["mean"], 100 * found["low"], 100 * found["high"])
    if name == "loss":
        rise = (table["damage"] or {}).get("loss_rise")
        return None if rise is None else (100 * rise,) * 3
    return (max(table["norm"].values(), default=0.0),) * 3


def _axes(sheet: Sheet, box: tuple[float, float, float, float]) -> Axes:
    axes = sheet.axes(*box)
    axes.grid(axis="y", color=RULE, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    return axes


def _head(sheet: Sheet, results: Sequence[Result]) -> None:
    """The title, and a line for each result in its colour."""
    sheet.write(
        0.2, 0.28, cut(title(results), int(sheet.width / 0.12)), fontsize=12, weight="bold", va="center"
    )
    several = len({r["records"]["measured"] for r in results}) > 1
    models = len({r["model"]["name"] for r in results}) > 1
    for i, result in enumerate(results):
        number = f"{result['records']['measured']} edits, " if several else ""
        model = f"{result['model']['name']}: " if models else ""
        words = cut(visible(model + number + label(result)), int(sheet.width / 0.085))
        colour = COLOURS[i % len(COLOURS)]
        sheet.write(0.2, 0.58 + 0.21 * i, f"■ {words}", fontsize=8.5, va="center", color=colour)
