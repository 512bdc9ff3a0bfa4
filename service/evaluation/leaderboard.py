"""Results of evaluations beside each other: a table of methods and measures, the same as CSV, and the differences
between methods on the records that both have measured.

Takes their JSON and needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from service.evaluation.metrics import COMBINED_SCORES, MEASURES
from service.evaluation.report_text import Cell, Result, label
from service.evaluation.suites.registry import SUITE_MEASURES
from service.kit.csv_text import encode_line
from service.scores.scores import Interval, paired_difference

MEASURE_NAMES = (*COMBINED_SCORES, *MEASURES, *SUITE_MEASURES)
CSV_COLUMNS = ("model", "method", "mode", "edits", "measure", "before", "after", "low", "high", "records")
DIFFERENCE_COLUMNS = ("method", "measure", "difference", "95 % interval", "records")
MIN_COMMON_RECORDS = 2


def measures_of(results: Sequence[Result]) -> list[str]:
    """Return the measures that some result has, in the order in which reports list them."""
    return [name for name in MEASURE_NAMES if any(r["after"].get(name) for r in results)]


def leaderboard(results: Sequence[Result]) -> tuple[tuple[str, ...], list[tuple[Cell, ...]]]:
    """Return the columns and a row for each result: its label, its number of edits, and every measure."""
    names = measures_of(results)
    rows: list[tuple[Cell, ...]] = []
    for result in results:
        measured = ((result["after"].get(name) or {}).get("mean") for name in names)
        damage = result["damage"] or {}
        rise = damage.get("loss_rise")
        loss = rise["mean"] if isinstance(rise, dict) else rise
        rows.append((label(result), result["records"]["measured"], *measured, loss))
    return ("method", "edits", *names, "rise of the loss"), rows


def csv_of(results: Sequence[Result]) -> str:
    """Return a line for each measure of each result and checkpoint, with its interval."""
    lines = [encode_line(CSV_COLUMNS)]
    for result in results:
        about = (result["model"]["name"], label(result), result["plan"]["mode"])
        tables = [(t["edits"], t["measures"]) for t in result.get("checkpoints", ())]
        for edits, measures in tables or [(result["records"]["measured"], result["after"])]:
            for name in MEASURE_NAMES:
                if estimate := measures.get(name):
                    before = (result["before"].get(name) or {}).get("mean")
                    figures = (before, *(estimate[k] for k in ("mean", "low", "high", "n")))
                    lines.append(encode_line((*about, edits, name, *figures)))
    return "".join(lines)


def difference_rows(results: Sequence[Result]) -> list[tuple[Cell, ...]]:
    """Return a row for each measure of each result but the first: its difference from the first, on the records that
    both have, with a paired interval."""
    first, *others = results
    rows: list[tuple[Cell, ...]] = []
    for other in others:
        for name in measures_of([first, other]):
            compared = difference(first, other, name)
            if compared is not None:
                (mean, low, high), count = compared
                rows.append((label(other), name, mean, f"{low:+.3f} to {high:+.3f}", count))
    return rows


def difference(first: Result, other: Result, name: str) -> tuple[Interval, int] | None:
    """Return how much greater a measure is in another result, with a paired interval, and the number of records; None
    for a measure of all records together, and with too few records in common."""
    before, after = _by_record(first, name), _by_record(other, name)
    common = [record for record in before if record in after]
    if len(common) < MIN_COMMON_RECORDS:
        return None
    return paired_difference([before[r] for r in common], [after[r] for r in common]), len(common)


def _by_record(result: Result, name: str) -> dict[tuple[str, ...], float]:
    """Return a measure after the edits by record. Records of different evaluations are the same if they have the same
    name, prompt and objects."""
    values = (
        ((r["record"], r["subject"], r["prompt"], r["target_new"]), r["after"].get(name))
        for r in result["rows"]
    )
    return {record: value for record, value in values if value is not None}
