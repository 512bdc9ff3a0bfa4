"""Results of evaluations beside each other: service.evaluation.leaderboard."""

from __future__ import annotations

import base64
import csv
import io
import random
import re
from typing import Any

from service.evaluation import report
from service.evaluation.leaderboard import csv_of, difference, difference_rows, leaderboard, measures_of
from service.scores.scores import paired_difference
from tests.integration.evaluation.test_report import make_result, row


def result_of(method: str, values: dict[str, float], **plan: Any) -> dict[str, Any]:
    """Return a result whose records have these values of ES."""
    result = make_result(method=method, **plan)
    result["rows"] = [
        row(name, True) | {"after": {"ES": value, "p_new": value, "exact": 1.0}}
        for name, value in values.items()
    ]
    return result


def test_row_of_a_result_has_its_measures() -> None:
    """There is a row for each result, with a cell for each measure that some result has."""
    first, second = make_result(), make_result("sequence", method="memit")
    second["after"] = second["after"] | {"free_says": {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 4}}
    columns, rows = leaderboard([first, second])
    assert columns[:2] == ("method", "edits") and columns[-1] == "rise of the loss"
    assert [r[0] for r in rows] == ["rome", "memit, found on the base model"]
    at = columns.index("free_says")
    assert (rows[0][at], rows[1][at]) == (None, 0.5)
    assert rows[0][-1] == rows[1][-1] == 0.1 and all(len(r) == len(columns) for r in rows)
    assert "exact_paraphrase" not in measures_of([first])


def test_csv_has_a_line_for_each_measure_and_checkpoint() -> None:
    """The lines have the figures of the results, and a text that a spreadsheet would run is neutralized."""
    sequence = make_result("sequence")
    sequence["model"] = {"name": "=1+1"}
    lines = list(csv.DictReader(io.StringIO(csv_of([make_result(), sequence]))))
    assert {(x["mode"], x["edits"]) for x in lines} == {
        ("single", "4"), ("sequence", "1"), ("sequence", "10"), ("sequence", "25"),
    }  # fmt: skip
    first = next(x for x in lines if x["measure"] == "ES")
    assert [float(first[k]) for k in ("before", "after", "low", "high", "records")] == [
        0.25,
        0.75,
        0.5,
        1.0,
        4,
    ]
    assert lines[-1]["model"] == "'=1+1"


def test_difference_is_paired_by_record() -> None:
    """Only records that both results have count, whatever their order."""
    first = result_of("rome", {"a": 0.0, "b": 0.5, "c": 1.0})
    other = result_of("memit", {"c": 1.0, "a": 0.5, "d": 0.0})
    found = difference(first, other, "ES")
    assert found is not None
    (mean, low, high), count = found
    assert mean == 0.25 and count == 2 and low == 0.0 and high == 0.5
    assert difference(first, result_of("memit", {"x": 1.0, "a": 1.0}), "ES") is None
    assert difference(first, other, "NS") is None
    assert ("memit", "ES", 0.25, "+0.000 to +0.500", 2) in difference_rows([first, other])
    assert difference_rows([first]) == []


def test_paired_interval_is_narrow_where_methods_agree_on_records() -> None:
    """A constant difference has an interval of no width, however much the records differ."""
    rng = random.Random(1)
    first = [rng.random() for _ in range(40)]
    mean, low, high = paired_difference(first, [x + 0.1 for x in first])
    assert abs(mean - 0.1) < 1e-12 and high - low < 1e-12
    mean, low, high = paired_difference(first, [rng.random() for _ in range(40)])
    assert low < mean < high and high - low > 0.1


def test_page_of_several_results_has_the_table_and_its_csv() -> None:
    """The page links to the CSV that it contains; a page of one result has no comparison."""
    results = [result_of("rome", {"a": 0.0, "b": 1.0}), result_of("<memit>", {"a": 1.0, "b": 1.0})]
    page = report.page(results)
    (data,) = re.findall(r'href="data:text/csv;base64,([^"]+)"', page)
    assert base64.b64decode(data).decode() == csv_of(results)
    assert "Differences from rome" in page and "&lt;memit&gt;" in page and "<memit>" not in page
    assert "Methods and measures" not in report.page(results[:1])
