"""The report of the localization study: service.studies.localization_report."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from service.kit import plotting
from service.kit.plotting import SVG_NAMESPACE
from service.studies import localization_report as report
from service.studies.localization_stats import EFFECT_READINGS, analyze_runs, mean_effects_by_layer


def study(
    facts: int = 5, layers: int = 3, kinds: Any = (("rome", "write"), ("ft", "write")), same: bool = False
) -> Any:
    rng = np.random.default_rng(0)
    effects = [{name: rng.random(layers).tolist() for name in EFFECT_READINGS} for _ in range(facts)]
    studies = []
    for method, objective in kinds:
        runs: Any = [
            [
                {"rewrite": 0.5 if same else rng.random(), "paraphrase": rng.random(), "neighbour": None}
                for _ in range(layers)
            ]
            for _ in range(facts)
        ]
        scores = analyze_runs(runs, effects, range(layers))
        studies.append(
            {"method": method, "objective": objective, "parameters": {}, "facts": facts, "scores": scores}
        )
    return {
        "model": {"name": "tiny <b>", "fingerprint": "f", "layers": layers},
        "scored": facts + 1,
        "facts": facts,
        "left_out": {"unknown": 1, "unscorable": 0},
        "noise": {"level": 0.3, "factor": 3.0, "sigma": 0.1, "subjects": 9},
        "window": 5,
        "samples": 2,
        "layers": list(range(layers)),
        "effects": mean_effects_by_layer(effects),
        "studies": studies,
    }


def texts(drawn: str) -> str:
    return " ".join(e.text or "" for e in ElementTree.fromstring(drawn).iter(f"{{{SVG_NAMESPACE}}}text"))


def test_figures_are_labelled() -> None:
    """Every kind of edit has a panel beside the effect, and bars with the gain and its p above them."""
    made = study(kinds=(("rome", "write"), ("rome", "reversal")))
    drawn = {n: texts(plotting.render_svg(d, "t")) for n, d in report.figures(made).items()}
    assert sorted(drawn) == ["explained", "layers"]
    assert all(
        words in drawn["layers"]
        for words in ("tracing effect", "rome: write", "rome: reversal", *EFFECT_READINGS)
    )
    gain = made["studies"][0]["scores"]["rewrite"]["regression"][EFFECT_READINGS[0]]["gain"]
    assert f"+{gain['value']:.3f}, p " in drawn["explained"]


@pytest.mark.parametrize(
    "shape", [{"facts": 1}, {"layers": 1}, {"same": True}, {"kinds": (("rome", "write"),)}]
)
def test_any_study_has_figures(shape: Any) -> None:
    """A study of one fact, one layer, equal scores or one kind of edit has figures, sentences and a page."""
    made = study(**shape)
    for draw in report.figures(made).values():
        assert plotting.render_png(draw, 40).startswith(b"\x89PNG")
    assert report.sentences(made) and "nan" not in report.page(made).lower().replace("dominant", "")


def test_sentences_and_tables_have_the_results() -> None:
    """Sentences state R2, each score has its rows, and the page escapes names."""
    made = study()
    found = made["studies"][0]["scores"]["rewrite"]
    r2 = found["regression"][EFFECT_READINGS[0]]["r2"]
    words = " ".join(report.sentences(made))
    assert f"the layer explains {r2['layer']['value']:.3f}" in words and "6 facts were scored" in words
    rows = report.regression_rows(made)
    assert len(rows) == 2 * 2 * len(EFFECT_READINGS) and rows[0][5] == r2["layer"]["value"]
    assert {len(r) for r in rows} == {len(report.REGRESSION_COLUMNS)}
    chosen = report.choice_rows(made)
    assert len(chosen) == 4 and {len(r) for r in chosen} == {len(report.CHOICE_COLUMNS)}
    assert chosen[0][4] == found["choice"]["ways"]["best_for_others"]["mean"]
    page = report.page(made)
    assert page.count("<svg") == 2 and page.count("<table>") == 2 and "tiny &lt;b&gt;" in page
