"""What else an edit changes: service.editing.side_effects."""

from __future__ import annotations

from typing import Any

import pytest

from service.editing.candidate import ResolvedEdit, VersionMeasurement
from service.editing.greedy_text import GreedyText
from service.editing.guard import CheckName, evaluate_guard
from service.editing.probes import Probe, ProbeSource
from service.editing.side_effects import MAX_REPORTED_CHANGES, side_effect_report
from service.methods.parameters import RomeParameters
from service.models.loading import WeightRef
from service.schemas import EditRequest
from tests.support.probe_results import probe_result

HOLDS = probe_result(-0.1, -3.0, True, False)
KEEPS, LOSES = probe_result(-3.0, -0.1, False, True), probe_result(-0.1, -3.0, True, False)
PARIS, ROME, LYON = GreedyText(" Paris. It"), GreedyText(" Rome, which"), GreedyText(" Lyon. It")


def resolved(neighbors: dict[str, ProbeSource], probes: Any = "auto") -> ResolvedEdit:
    """Return an edit to Rome with neighbours whose object is Paris, by their subjects."""
    request = EditRequest.model_validate(
        {"subject": "Tower", "prompt": "{} in", "target_new": "Rome", "probes": probes}
    )
    found = [
        Probe(f"{name} in", "Rome", "Paris", subject=None if source == "request" else name, source=source)
        for name, source in neighbors.items()
    ]
    rewrite = Probe("Tower in", "Rome", "Paris")
    return ResolvedEdit(request, RomeParameters(layers=(0,)), rewrite, [], found)


def measured(texts: list[GreedyText], results: list[Any] | None = None) -> VersionMeasurement:
    results = results if results is not None else [KEEPS] * len(texts)
    return VersionMeasurement([HOLDS, *results], "", 2.0, set(), neighbor_texts=texts)


def neighborhood_share(
    edit: ResolvedEdit, before: VersionMeasurement, after: VersionMeasurement
) -> float | None:
    """Return the share of kept neighbours that the guard measures; None without that check."""
    result = evaluate_guard(edit, before, after, 1.0, {WeightRef(0): 0.5})
    shares = [check.figure for check in result.checks if check.name == CheckName.NEIGHBORHOOD]
    return shares[0] if shares else None


def test_the_report_lists_changed_answers() -> None:
    """Changes to the new object come first, then those to others, by their prompts; equal answers are not listed."""
    edit = resolved(dict.fromkeys(["Zoo", "Louvre", "Bridge"], "facts"))
    report = side_effect_report(edit, measured([PARIS] * 3), measured([ROME, PARIS, LYON]))
    assert report["side_effects"] == {"measured": True, "neighbors": 3, "changed": 2, "reason": None}
    assert report["also_changed"] == [
        {"prompt": "Zoo in", "subject": "Zoo", "before": "Paris", "after": "Rome"},
        {"prompt": "Bridge in", "subject": "Bridge", "before": "Paris", "after": "Lyon"},
    ]


@pytest.mark.parametrize(
    ("before", "after", "changed"),
    [
        (" Paris.", " Paris and its suburbs are", False),
        (" paris.", " Paris,", False),
        (" New York.", " New York City and the", False),
        (" Paris.", " Parisian", True),
        (" Paris.", "", True),
        (" Paris.", "\nRome", True),
        ("", " Rome.", False),
        ("\u6771\u4eac\u3002", "\u6771\u4eac\u3067\u3059", False),
    ],
)
def test_an_answer_stays_if_the_continuation_begins_with_it(before: str, after: str, changed: bool) -> None:
    """What follows the answer does not matter; where the model gave no answer, none can change."""
    report = side_effect_report(
        resolved({"Louvre": "facts"}), measured([GreedyText(before)]), measured([GreedyText(after)])
    )
    assert report["side_effects"]["changed"] == changed


def test_the_list_is_bounded() -> None:
    """At most so many changes are listed; the number of all is reported."""
    many: dict[str, ProbeSource] = dict.fromkeys(map(str, range(MAX_REPORTED_CHANGES + 5)), "request")
    edit = resolved(many)
    report = side_effect_report(edit, measured([PARIS] * len(many)), measured([ROME] * len(many)))
    assert len(report["also_changed"]) == MAX_REPORTED_CHANGES
    assert report["side_effects"]["changed"] == len(many)
    assert report["also_changed"][0]["subject"] is None


@pytest.mark.parametrize(
    ("probes", "reason"),
    [
        ({}, "the request gives no neighbors"),
        ({"paraphrase": ["See {}"]}, "the request gives no neighbors"),
        ("auto", "no neighbor with an answer"),
    ],
)
def test_a_report_without_neighbours_says_so(probes: Any, reason: str) -> None:
    """Side effects that were not measured are reported as such, with the reason, and the guard has no figure of
    them."""
    edit = resolved({}, probes)
    report = side_effect_report(edit, measured([]), measured([]))
    assert not report["side_effects"]["measured"] and reason in report["side_effects"]["reason"]
    assert report["also_changed"] == []
    assert neighborhood_share(edit, measured([]), measured([])) is None


def test_the_guard_counts_found_neighbours_by_their_answers() -> None:
    """A neighbour that the service found is lost if its greedy answer is another one, also where neither object is
    said; one of the request if the new object is preferred to its own."""
    found, given = (
        resolved({"Louvre": "model", "Zoo": "facts"}),
        resolved({"Louvre": "request", "Zoo": "request"}),
    )
    before, after = measured([PARIS, PARIS]), measured([LYON, PARIS], [KEEPS, LOSES])
    assert neighborhood_share(found, before, after) == 0.5
    assert neighborhood_share(given, before, after) == 0.5
    unchanged = measured([PARIS, PARIS], [LOSES, LOSES])
    assert (neighborhood_share(found, before, unchanged), neighborhood_share(given, before, unchanged)) == (
        1,
        0,
    )


def test_a_neighbour_without_an_answer_before_does_not_count() -> None:
    """At another version than that of the search a neighbour may have no answer; the guard leaves it out."""
    edit = resolved({"Louvre": "model", "Zoo": "model"})
    before, after = measured([GreedyText(""), PARIS]), measured([ROME, PARIS])
    assert neighborhood_share(edit, before, after) == 1.0


def test_other_relations_of_the_subject_are_reported_and_not_judged() -> None:
    """A changed answer about the subject itself is in the report; the guard counts the other neighbours alone."""
    edit = resolved({"Zoo": "facts", "Tower": "relation"})
    report = side_effect_report(edit, measured([PARIS] * 2), measured([PARIS, LYON]))
    assert report["side_effects"]["changed"] == 1
    assert [change["prompt"] for change in report["also_changed"]] == ["Tower in"]
    assert neighborhood_share(edit, measured([PARIS] * 2), measured([PARIS, LYON])) == 1.0
    only = resolved({"Tower": "relation"})
    assert neighborhood_share(only, measured([PARIS]), measured([LYON])) is None
