"""Results of evaluations as a self-contained page: figures of all results, then each one in words and tables."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

from service.evaluation import leaderboard
from service.evaluation.report_figures import figures
from service.evaluation.report_text import (
    AGE_COLUMNS,
    CHECKPOINT_COLUMNS,
    MEASURE_COLUMNS,
    Result,
    age_rows,
    checkpoint_rows,
    label,
    measure_rows,
    sentences,
    title,
)
from service.kit import plotting
from service.kit.plotting import show_control_characters

MAX_FAILED_EDITS_SHOWN = 40


def page(results: Sequence[Result]) -> str:
    """Return the page as HTML."""
    body = "".join(
        plotting.inline_svg(plotting.render_svg(draw, name)) for name, draw in figures(results).items()
    )
    if len(results) > 1:
        body += _comparison(results)
    for result in results:
        body += (
            f"<h2>{html.escape(show_control_characters(label(result)))}</h2>\n"
            + plotting.html_paragraphs(sentences(result))
        )
        if rows := checkpoint_rows(result):
            body += plotting.html_table(CHECKPOINT_COLUMNS, rows)
        if ages := age_rows(result):
            body += "<h3>By age, with all edits active</h3>\n" + plotting.html_table(AGE_COLUMNS, ages)
        body += plotting.html_table(MEASURE_COLUMNS, measure_rows(result)) + _failed_edits(result)
    return plotting.html_page(title(results), body)


def _comparison(results: Sequence[Result]) -> str:
    """Return the table of methods and measures as HTML, with a link to the same as CSV, and the paired differences."""
    data = base64.b64encode(leaderboard.csv_of(results).encode()).decode()
    body = "<h2>Methods and measures</h2>\n" + plotting.html_table(*leaderboard.leaderboard(results))
    body += f'<p><a download="evaluations.csv" href="data:text/csv;base64,{data}">Download all measures as CSV</a></p>\n'
    if differences := leaderboard.difference_rows(results):
        first = show_control_characters(label(results[0]))
        body += plotting.html_paragraphs(
            [f"Differences from {first}, on the records that both have. Intervals are paired bootstraps."]
        ) + plotting.html_table(leaderboard.DIFFERENCE_COLUMNS, differences)
    return body


def _failed_edits(result: Result) -> str:
    """Return the edits that do not hold as HTML, with their prompts."""
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
    heading = f"{len(failed)} edits do not hold" + (
        f"; the first {MAX_FAILED_EDITS_SHOWN}:" if len(failed) > MAX_FAILED_EDITS_SHOWN else ":"
    )
    columns = ("record", "subject", "prompt", "true object", "new object", "p(new)", "loss of the search")
    return plotting.html_paragraphs([heading]) + plotting.html_table(columns, shown)
