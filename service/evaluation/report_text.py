"""Results of evaluations in words and as rows of tables. Takes the JSON of results and needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from service.evaluation.metrics import CHANGE_SCORES, COMBINED_SCORES, MEASURES
from service.evaluation.suites.registry import SUITE_MEASURES
from service.kit.plotting import show_control_characters

Result = dict[str, Any]
Cell = str | float | int | None

MAIN_MEASURES = ("ES", "PS", "NS", "S")  #: what tables and figures show of every result
MODE_LABELS = {"single": "one at a time", "sequence": "in sequence"}
MEASURE_COLUMNS = ("measure", "before", "after", "95 % interval", "records", "what it is")
AGE_COLUMNS = ("edits", "ES", "PS", "NS", "S", "exact")
CHECKPOINT_COLUMNS = (
    "edits", "ES", "PS", "NS", "S", "95 % interval", "exact", "first 10", "first 100", "still hold", "loss", "drift", "norm",
)  # fmt: skip


def label(result: Result) -> str:
    """Return what distinguishes a result from others: method, hyperparameters, objective and search."""
    plan = result["plan"]
    hparams = [f"{name}={value}" for name, value in (plan["hparams"] or {}).items()]
    parts = [plan["method"], *hparams]
    if plan["objective"] != "write":
        parts.append(plan["objective"])
    if plan["mode"] == "sequence":
        parts.append(f"found on the {plan['search_model']} model")
    if len(plan["strengths"]) > 1:
        parts.append("strengthened")
    return ", ".join(parts)


def title(results: Sequence[Result]) -> str:
    """Return the title of a report on some results."""
    names = ", ".join(dict.fromkeys(r["model"]["name"] for r in results))
    counts = {r["records"]["measured"] for r in results}
    modes = {r["plan"]["mode"] for r in results}
    number = f"{counts.pop()} edits" if len(counts) == 1 else "Edits"
    how = MODE_LABELS[modes.pop()] if len(modes) == 1 else "one at a time and in sequence"
    return f"{number} of {show_control_characters(names)}, {how}"


def sentences(result: Result) -> list[str]:
    """Return sentences on what was evaluated, what was left out, and how long it took."""
    plan, records = result["plan"], result["records"]
    layers = ", ".join(map(str, result["parameters"]["layers"]))
    lines = [f"{label(result)}: {records['measured']} edits at layers {layers} of {result['model']['name']}."]
    if result["strengthened"]:
        lines.append(
            f"{result['strengthened']} were not effective at the first strength and were strengthened."
        )
    if left_out := records["left_out"]:
        lines.append(
            f"{len(left_out)} records were left out, the first of them {left_out[0]['record']}: {left_out[0]['reason']}"
        )
    if missing_fields := records["missing_fields"]:
        counts = "; ".join(f"{field} in {n}" for field, n in sorted(missing_fields.items()))
        lines.append(f"Records without a field: {counts}.")
    if texts := result["damage_texts"]:
        lines.append(f"Damage is measured on {texts['count']} plain texts: {texts['source']}.")
    if half := result.get("reverted_half"):
        lines.append(
            f"With every second edit reverted, {half['undone']} of {half['reverted'] - half['held_by_the_base']} reverted edits no "
            "longer hold."
        )
    recalls = [(t["edits"], t["recall"]) for t in result.get("checkpoints", ()) if t.get("recall")]
    for edits, recall in recalls[-1:]:
        lines.append(
            f"With {edits} edits active the model says {100 * recall['after']:.1f} % of {recall['facts']} facts that are not edited; "
            f"before {100 * recall['before']:.1f} %, of which it has forgotten {100 * recall['forgotten']:.1f} %."
        )
    seconds_text = ", ".join(f"{kind} {s:.1f}" for kind, s in result["seconds"].items())
    rates_text = ", ".join(
        f"{name.replace('_', ' ')} {n:.1f}" for name, n in result["edits_per_minute"].items()
    )
    lines.append(f"Seconds: {seconds_text}. Edits per minute: {rates_text}. Seed {plan['seed']}.")
    return lines


def measure_rows(result: Result) -> list[tuple[Cell, ...]]:
    """Return the rows of MEASURE_COLUMNS: every measure before and after the edits."""
    rows: list[tuple[Cell, ...]] = []
    descriptions = {
        "S": "harmonic mean of ES, PS, NS",
        "S_accuracy": "harmonic mean of the three accuracies",
        **MEASURES,
        **SUITE_MEASURES,
    }
    for name in (*COMBINED_SCORES, *MEASURES, *SUITE_MEASURES):
        if estimate := result["after"].get(name):
            figures = (
                _mean_or_none(result["before"].get(name)),
                estimate["mean"],
                _interval_text(estimate),
                estimate["n"],
            )
            rows.append((name, *figures, descriptions[name]))
    rows += [
        (
            f"share: {name}",
            None,
            estimate["mean"],
            _interval_text(estimate),
            estimate["n"],
            CHANGE_SCORES[name],
        )
        for name, estimate in result["changes"].items()
        if estimate
    ]
    if damage := result["damage"]:
        rows += _damage_rows(damage)
    return rows


def _damage_rows(damage: dict[str, Any]) -> list[tuple[Cell, ...]]:
    """Return the rows of damage: of a sequence its figures, of single edits their means."""
    mean = {name: x["mean"] if isinstance(x, dict) else x for name, x in damage.items()}
    return [
        ("loss", mean["loss_before"], mean["loss_after"], None, None, "on plain texts, nats per token"),
        ("drift", 0.0, mean["drift"], None, None, "KL divergence of the next token on plain texts, nats"),
    ]


def age_rows(result: Result) -> list[tuple[Cell, ...]]:
    """Return the rows of AGE_COLUMNS: the edits of a sequence by age, then every second one with the others
    reverted."""
    names = (*MAIN_MEASURES, "exact")
    rows: list[tuple[Cell, ...]] = [
        (f"{a['first']} to {a['last']}", *(_mean_or_none(a["measures"].get(n)) for n in names))
        for a in result.get("ages", ())
    ]
    if half := result.get("reverted_half"):
        rows.append(("half reverted", *(_mean_or_none(half["kept"].get(n)) for n in names)))
    return rows


def checkpoint_rows(result: Result) -> list[tuple[Cell, ...]]:
    """Return the rows of CHECKPOINT_COLUMNS, none for single edits."""
    rows: list[tuple[Cell, ...]] = []
    for table in result.get("checkpoints", ()):
        measures, damage, still = table["measures"], table["damage"] or {}, table["still_holding"]
        first = {r["first"]: _mean_or_none(r["ES"]) for r in table["retention"]}
        rows.append(
            (
                table["edits"],
                *(_mean_or_none(measures.get(name)) for name in MAIN_MEASURES),
                _interval_text(measures["S"]) if measures.get("S") else None,
                _mean_or_none(measures["exact"]),
                first.get(10),
                first.get(100),
                f"{still['hold']} of {still['held_before']}" if still["held_before"] else None,
                damage.get("loss_after"),
                damage.get("drift"),
                max(table["norm"].values(), default=0.0),
            )
        )
    return rows


def _mean_or_none(estimate: dict[str, float] | None) -> float | None:
    return None if estimate is None else estimate["mean"]


def _interval_text(estimate: dict[str, float]) -> str:
    return f"{estimate['low']:.3f} to {estimate['high']:.3f}"
