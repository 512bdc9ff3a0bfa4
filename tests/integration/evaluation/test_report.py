"""Results as figures, page and tables: service.evaluation.report, report_text and report_figures."""

from __future__ import annotations

import io
from typing import Any

import pytest
from matplotlib.image import imread

from service.evaluation import report, report_figures, report_text
from service.kit import plotting

INTERVAL = {"mean": 0.75, "low": 0.5, "high": 1.0, "n": 4}
LOW = INTERVAL | {"mean": 0.25}
MEASURES: dict[str, Any] = {
    **dict.fromkeys(("ES", "PS", "NS", "S", "EM", "PM", "NM", "p_new", "exact"), INTERVAL),
    "exact_paraphrase": None,
    "GE": INTERVAL | {"mean": 6.2},
}
SHARES: dict[str, Any] = {"rewrite": INTERVAL, "paraphrase": INTERVAL, "neighbour": None}
DAMAGE = {"loss_before": 2.0, "loss_after": 2.2, "loss_rise": 0.1, "drift": 0.03}


def row(name: str, holds: bool, subject: str = "Eiffel Tower") -> dict[str, Any]:
    return {
        "record": name,
        "subject": subject,
        "prompt": "The {} is in",
        "target_new": "Rome",
        "target_true": "Paris",
        "after": {"ES": float(holds), "p_new": 0.125, "exact": float(holds)},
        "loss": 0.04,
    }


def make_result(mode: str = "single", method: str = "rome", **plan: Any) -> dict[str, Any]:
    defaults = {
        "method": method,
        "hparams": None,
        "objective": "write",
        "mode": mode,
        "search_model": "base",
        "strengths": [1.0],
        "seed": 0,
    }
    result: dict[str, Any] = {
        "model": {"name": "tiny <&> $x_1$"},
        "plan": defaults | plan,
        "parameters": {"layers": [1, 2]},
        "records": {"measured": 4, "left_out": [], "missing_fields": {"paraphrases": 2}},
        "damage_texts": {"source": "a file", "count": 9},
        "strengthened": 1,
        "seconds": {"find": 2.0, "measure": 1.0},
        "edits_per_minute": {"find": 120.0},
        "before": MEASURES | {"ES": LOW},
        "after": MEASURES,
        "changes": SHARES,
        "damage": {k: INTERVAL | {"mean": v} for k, v in DAMAGE.items()} if mode == "single" else DAMAGE,
        "rows": [row("record 1", True), row("record 2", False, "<script>")],
    }
    if mode == "sequence":
        result["checkpoints"] = [checkpoint(n) for n in (1, 10, 25)]
    return result


def checkpoint(edits: int) -> dict[str, Any]:
    return {
        "edits": edits,
        "measures": MEASURES,
        "retention": [{"first": k} | MEASURES for k in (1, 10) if k < edits],
        "still_holding": {"held_before": edits - 1, "hold": edits - 1},
        "damage": DAMAGE,
        "norm": {"1.mlp": 0.2, "2.mlp": 0.5},
    }


def test_measure_rows() -> None:
    """There is a row for each measure that some record has, with its values before and after, its interval and the
    number of records.
    """
    rows = {r[0]: r for r in report_text.measure_rows(make_result())}
    assert rows["ES"][:5] == ("ES", 0.25, 0.75, "0.500 to 1.000", 4)
    assert "exact_paraphrase" not in rows and "share: neighbour" not in rows
    assert rows["share: rewrite"][1:3] == (None, 0.75)
    assert rows["loss"][1:3] == (2.0, 2.2) and rows["drift"][2] == 0.03
    assert all(len(r) == len(report_text.MEASURE_COLUMNS) for r in rows.values())


def test_checkpoint_rows() -> None:
    """There is a row for each checkpoint: scores, retention of the first edits, and the largest change of a weight."""
    rows = report_text.checkpoint_rows(make_result("sequence"))
    assert [r[0] for r in rows] == [1, 10, 25]
    last = dict(zip(report_text.CHECKPOINT_COLUMNS, rows[-1], strict=True))
    assert (last["first 10"], last["first 100"], last["norm"], last["loss"]) == (0.75, None, 0.5, 2.2)
    assert (
        last["still hold"] == "24 of 24"
        and rows[0][report_text.CHECKPOINT_COLUMNS.index("still hold")] is None
    )
    assert report_text.checkpoint_rows(make_result()) == []


def test_labels_distinguish_results() -> None:
    """The label names method, hyperparameters, objective, the model of the search, and strengthening."""
    assert report_text.label(make_result()) == "rome"
    assert (
        report_text.label(make_result(hparams={"layers": [3]}, objective="erase"))
        == "rome, layers=[3], erase"
    )
    many = make_result("sequence", "memit", search_model="edited", strengths=[1.0, 2.0])
    assert report_text.label(many) == "memit, found on the edited model, strengthened"
    assert "4 edits of" in report_text.title(
        [make_result(), make_result()]
    ) and "one at a time" in report_text.title([make_result()])
    assert report_text.title([make_result(), make_result("sequence")]).endswith(
        "one at a time and in sequence"
    )


def test_page_is_self_contained_and_escaped() -> None:
    """Texts are escaped, figures are inline, and edits that do not hold are listed."""
    page = report.page([make_result("sequence"), make_result("sequence", "memit")])
    assert "<script>" not in page and "&lt;script&gt;" in page and "tiny &lt;&amp;&gt;" in page
    assert page.count("<svg") == 2 and "src=" not in page and "1 edits do not hold" in page
    assert "paraphrases in 2" in page and "1 were not effective at the first strength" in page


@pytest.mark.parametrize("mode", ["single", "sequence"])
@pytest.mark.parametrize("number", [1, 3])
def test_figures_are_drawn_for_any_number_of_results(mode: str, number: int) -> None:
    """Bars show every result, curves those with checkpoints, and a name is never parsed as mathematics."""
    results = [make_result(mode, method) for method in ("rome", "memit", "ft")[:number]]
    figures = report_figures.figures(results)
    assert list(figures) == (["bars"] if mode == "single" else ["bars", "curves"])
    for draw in figures.values():
        picture = imread(io.BytesIO(plotting.render_png(draw, 40)))
        assert picture.shape[0] > 100 and picture.min() < 0.5 < picture.max()
        svg = plotting.render_svg(draw, "t")
        assert "$x_1$" in svg and all(m in svg for m in ("rome", "memit", "ft")[:number])


def test_figures_of_erasing_edits_show_change_scores() -> None:
    """Without a new object the bars show the shares of the possible change, and no edit counts as failed."""
    erased = make_result(objective="erase")
    svg = plotting.render_svg(report_figures.figures([erased])["bars"], "t")
    assert "rewrite" in svg and ">ES<" not in svg
    assert "do not hold" not in report.page([erased])


def test_missing_measures_leave_gaps() -> None:
    """A result without neighbours, damage or several checkpoints has figures and a page."""
    bare = make_result("sequence")
    bare["checkpoints"] = [
        checkpoint(n) | {"damage": None, "measures": MEASURES | {"NS": None, "S": None}} for n in (1, 2)
    ]
    bare |= {"damage": None, "damage_texts": None, "after": MEASURES | {"NS": None, "S": None}}
    assert report_text.checkpoint_rows(bare)[0][3:5] == (None, None)
    assert "<svg" in report.page([bare])
    assert list(report_figures.figures([make_result("sequence") | {"checkpoints": [checkpoint(1)]}])) == [
        "bars"
    ]
