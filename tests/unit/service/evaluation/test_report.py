"""Results as figures, page and tables: service.evaluation.report."""

from __future__ import annotations

import io
from typing import Any

import pytest
from matplotlib.image import imread

from service.evaluation import report
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


def result(mode: str = "single", method: str = "rome", **plan: Any) -> dict[str, Any]:
    asked = {
        "method": method,
        "hparams": None,
        "objective": "write",
        "mode": mode,
        "found_on": "base",
        "strengths": [1.0],
        "seed": 0,
    }
    made: dict[str, Any] = {
        "model": {"name": "tiny <&> $x_1$"},
        "plan": asked | plan,
        "parameters": {"layers": [1, 2]},
        "records": {"measured": 4, "left_out": [], "lacking": {"paraphrases": 2}},
        "plain": {"source": "a file", "texts": 9},
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
        made["checkpoints"] = [checkpoint(n) for n in (1, 10, 25)]
    return made


def checkpoint(edits: int) -> dict[str, Any]:
    return {
        "edits": edits,
        "measures": MEASURES,
        "retention": [{"first": k} | MEASURES for k in (1, 10) if k < edits],
        "still": {"held_before": edits - 1, "hold": edits - 1},
        "damage": DAMAGE,
        "norm": {"1.mlp": 0.2, "2.mlp": 0.5},
    }


def test_the_table_of_measures_has_what_was_measured() -> None:
    """A row for each measure that some record has, before and after, with interval and number of records."""
    rows = {r[0]: r for r in report.measure_rows(result())}
    assert rows["ES"][:5] == ("ES", 0.25, 0.75, "0.500 to 1.000", 4)
    assert "exact_paraphrase" not in rows and "share: neighbour" not in rows
    assert rows["share: rewrite"][1:3] == (None, 0.75)
    assert rows["loss"][1:3] == (2.0, 2.2) and rows["drift"][2] == 0.03
    assert all(len(r) == len(report.MEASURE_COLUMNS) for r in rows.values())


def test_the_table_of_checkpoints_has_a_row_for_each() -> None:
    """After 1, 10 and 25 edits: scores, what the first ten still do, and the largest change of a weight."""
    rows = report.checkpoint_rows(result("sequence"))
    assert [r[0] for r in rows] == [1, 10, 25]
    last = dict(zip(report.CHECKPOINT_COLUMNS, rows[-1], strict=True))
    assert (last["first 10"], last["first 100"], last["norm"], last["loss"]) == (0.75, None, 0.5, 2.2)
    assert last["still hold"] == "24 of 24" and rows[0][report.CHECKPOINT_COLUMNS.index("still hold")] is None
    assert report.checkpoint_rows(result()) == []


def test_labels_distinguish_results() -> None:
    """The label says what differs: method, hyperparameters, objective, where edits are found, strengthening."""
    assert report.label(result()) == "rome"
    assert report.label(result(hparams={"layers": [3]}, objective="erase")) == "rome, layers=[3], erase"
    many = result("sequence", "memit", found_on="edited", strengths=[1.0, 2.0])
    assert report.label(many) == "memit, found on the edited model, strengthened"
    assert "4 edits of" in report.title([result(), result()]) and "one at a time" in report.title([result()])
    assert report.title([result(), result("sequence")]).endswith("one at a time and one after another")


def test_a_page_needs_nothing_else_and_runs_nothing() -> None:
    """All texts are escaped; figures stand in the page; the edits that did not hold are named."""
    page = report.page([result("sequence"), result("sequence", "memit")])
    assert "<script>" not in page and "&lt;script&gt;" in page and "tiny &lt;&amp;&gt;" in page
    assert page.count("<svg") == 2 and "src=" not in page and "1 edits did not hold" in page
    assert "paraphrases in 2" in page and "1 did not take at first" in page


@pytest.mark.parametrize("mode", ["single", "sequence"])
@pytest.mark.parametrize("number", [1, 3])
def test_figures_are_drawn_for_any_number_of_results(mode: str, number: int) -> None:
    """Bars for every result, curves where there are checkpoints; a name is never read as mathematics."""
    results = [result(mode, method) for method in ("rome", "memit", "ft")[:number]]
    drawn = report.figures(results)
    assert list(drawn) == (["bars"] if mode == "single" else ["bars", "curves"])
    for draw in drawn.values():
        picture = imread(io.BytesIO(plotting.render_png(draw, 40)))
        assert picture.shape[0] > 100 and picture.min() < 0.5 < picture.max()
        svg = plotting.render_svg(draw, "t")
        assert "$x_1$" in svg and all(m in svg for m in ("rome", "memit", "ft")[:number])


def test_what_erases_is_drawn_by_its_shares() -> None:
    """Where nothing new is written ES says nothing: the bars are the shares of what was possible, and no edit is missed."""
    erased = result(objective="erase")
    svg = plotting.render_svg(report.figures([erased])["bars"], "t")
    assert "rewrite" in svg and ">ES<" not in svg
    assert "did not hold" not in report.page([erased])


def test_missing_measures_leave_gaps() -> None:
    """A result without neighbours, damage or several checkpoints is drawn and told all the same."""
    bare = result("sequence")
    bare["checkpoints"] = [
        checkpoint(n) | {"damage": None, "measures": MEASURES | {"NS": None, "S": None}} for n in (1, 2)
    ]
    bare |= {"damage": None, "plain": None, "after": MEASURES | {"NS": None, "S": None}}
    assert report.checkpoint_rows(bare)[0][3:5] == (None, None)
    assert "<svg" in report.page([bare])
    assert list(report.figures([result("sequence") | {"checkpoints": [checkpoint(1)]}])) == ["bars"]
