"""Acceptance rates of the guard: bench/guard.py."""

from __future__ import annotations

from bench.guard import GuardCase, conflict_table
from service.editing.candidate import ResolvedEdit, VersionMeasurement
from service.editing.conflicts import ConflictCandidate
from service.editing.greedy_text import GreedyText
from service.editing.guard import evaluate_guard
from service.editing.probes import Probe
from service.methods.parameters import RomeParameters
from service.models.loading import WeightRef
from service.schemas import EditRequest
from tests.support.probe_results import probe_result


def make_case(norm: float, neighbour_kept: bool) -> GuardCase:
    """Return a case of an effective edit with one neighbour."""
    request = EditRequest.model_validate({"subject": "Tower", "prompt": "{} in", "target_new": "Rome"})
    rewrite, neighbour = Probe("Tower in", "Rome", "Paris"), Probe("Louvre in", "Rome", "Paris")
    resolved_edit = ResolvedEdit(request, RomeParameters(layers=(0,)), rewrite, [], [neighbour])
    new, true = probe_result(-0.1, -2.0, True, False), probe_result(-2.0, -0.1, False, True)
    texts = [GreedyText(" Paris.")]
    before = VersionMeasurement([true, true], "", 2.0, set(), neighbor_texts=texts)
    results = [new, true if neighbour_kept else new]
    after = VersionMeasurement(results, "", 2.0, set(), neighbor_texts=texts)
    return GuardCase(resolved_edit, evaluate_guard(resolved_edit, before, after, 1.0, {WeightRef(0): norm}))


def test_limits_are_the_guards_own() -> None:
    """An edit is checked against the given limits, and against the defaults for the others."""
    assert make_case(0.5, True).passes_guard()
    assert not make_case(0.5, True).passes_guard(max_norm=0.4)
    assert make_case(0.5, True).passes_guard(max_norm=0.6)
    assert not make_case(0.5, True).passes_guard(min_probability=0.95)


def test_neighbours_need_probes() -> None:
    """With `probes=False`, paraphrase and neighborhood checks are ignored."""
    assert not make_case(0.5, False).passes_guard()
    assert make_case(0.5, False).passes_guard(probes=False)


def test_pairs_are_counted_by_limit() -> None:
    """The table has the percentage of pairs classified as a conflict for each limit."""
    pairs = [ConflictCandidate("e", "p", "o", p, 0.1, 0.1, 0.5) for p in (0.05, 0.15, 0.4, 0.9)]
    table = conflict_table({"other words": pairs, "other relation": pairs[:1]}, "choose")
    shown = dict(zip(*(list(c.cells) for c in table.columns[:2]), strict=True))
    assert (shown["0.01"], shown["0.1"], shown["0.2"], shown["0.5"]) == ("75", "75", "50", "25")
    assert shown["median cosine"] == "0.50"
