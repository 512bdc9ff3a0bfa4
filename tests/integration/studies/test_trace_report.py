"""The report of the tracing study: service.studies.trace_report."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from service.kit import plotting
from service.kit.plotting import SVG_NAMESPACE
from service.studies import trace_report
from service.studies.trace_averages import TOKEN_ROWS, average_traces


def study(facts: int = 3, layers: int = 4, severed: bool = True, kinds: str = "hidden mlp attn") -> Any:
    rng = np.random.default_rng(0)
    traces = []
    for i in range(facts):
        scores = rng.random((5 + i, layers)).tolist()
        cuts = dict.fromkeys(("none", "mlp", "attn"), scores[2]) if severed else None
        traces.append(
            {
                "tokens": ["x"] * len(scores),
                "subject": {"text": "x", "tokens": [1, 3]},
                "high": 0.9,
                "low": 0.05,
                "kinds": {k: {"scores": scores} for k in kinds.split()},
                "severed": cuts and {"token": 2, "scores": cuts},
            }
        )
    return {
        "model": {"name": "tiny <b>", "fingerprint": "f", "layers": layers},
        "scored": facts + 2,
        "left_out": {"unknown": 2, "unscorable": 0},
        "noise": {"level": 0.3, "factor": 3.0, "sigma": 0.1, "subjects": 9},
        "window": 2,
        "samples": 4,
        "seed": 1,
        **average_traces(traces, rounds=50),
    }


def texts(drawn: str) -> str:
    return " ".join(e.text or "" for e in ElementTree.fromstring(drawn).iter(f"{{{SVG_NAMESPACE}}}text"))


def test_figures_are_labelled() -> None:
    """Figures name every row, kind and severed path, and state the conditions."""
    drawn = {n: texts(plotting.render_svg(d, "t")) for n, d in trace_report.figures(study()).items()}
    assert sorted(drawn) == ["lines", "maps", "severed"]
    assert all(row in drawn["maps"] for row in TOKEN_ROWS)
    assert all(f"Impact of restoring {what}" in drawn["maps"] for what in ("state", "MLP", "attention"))
    assert all(path in drawn["severed"] for path in ("with MLP severed", "with attention severed"))
    assert all("ATE 0.850" in said for said in drawn.values())


@pytest.mark.parametrize(
    "shape", [{"facts": 1}, {"layers": 1}, {"layers": 48, "kinds": "mlp"}, {"severed": False}]
)
def test_any_study_has_figures(shape: Any) -> None:
    """A study of one fact, one layer or many, or without severed paths has figures, a table and a page."""
    made = study(**shape)
    for draw in trace_report.figures(made).values():
        assert plotting.render_png(draw, 40).startswith(b"\x89PNG")
    assert len(trace_report.table_rows(made)) == len(made["kinds"]) * len(TOKEN_ROWS)
    assert "NaN" not in trace_report.page(made)


def test_sentences_and_table_have_the_results() -> None:
    """Sentences state what was left out and the total effect, the table has the peak of each row, and the page
    escapes names.
    """
    made = study()
    words = " ".join(trace_report.sentences(made))
    assert "5 facts were scored and 3 traced" in words and "2 unknown" in words
    assert "average total effect is 0.850" in words
    row = next(r for r in trace_report.table_rows(made) if r[:2] == ("MLP", "last subject token"))
    peak = made["kinds"]["mlp"]["last subject token"]["peak"]
    assert row[2:5] == (3, 3, peak["mean"]) and row[6] == peak["layer"]
    html_text = trace_report.page(made)
    assert html_text.count("<svg") == 3 and "tiny &lt;b&gt;" in html_text and "<b>" not in html_text
