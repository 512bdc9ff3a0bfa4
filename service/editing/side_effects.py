"""What an edit changes beside its own fact: the neighbours whose greedy answer is another one after it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import starmap
from typing import Any

from service.editing.candidate import ResolvedEdit, VersionMeasurement
from service.editing.greedy_text import GreedyText
from service.editing.probes import Probe, ProbeResult, neighbor_preserved
from service.kit.text import begins_with

MAX_REPORTED_CHANGES = 20


@dataclass(frozen=True)
class NeighborOutcome:
    """A neighbour before and after an edit."""

    probe: Probe
    result_before: ProbeResult
    result_after: ProbeResult
    text_before: GreedyText
    text_after: GreedyText

    @property
    def has_changed(self) -> bool:
        """Whether the model answered, and its greedy continuation no longer begins with that answer."""
        answer = self.text_before.answer
        return bool(answer) and not begins_with(self.text_after.text, answer)

    @property
    def counts(self) -> bool:
        """Whether the guard counts it: it had its answer before the edit. Other relations of the same subject are only
        reported."""
        if self.probe.source == "relation":
            return False
        if self.probe.source == "request":
            return neighbor_preserved(self.probe, self.result_before)
        return bool(self.text_before.answer)

    @property
    def is_kept(self) -> bool:
        """Whether it keeps its answer. A neighbour of the request has an answer of its own, to be compared with the
        new object; that of a neighbour which the service found is what the model says."""
        if self.probe.source == "request":
            return neighbor_preserved(self.probe, self.result_after)
        return not self.has_changed


def neighbor_outcomes(
    resolved_edit: ResolvedEdit, before: VersionMeasurement, after: VersionMeasurement
) -> Iterator[NeighborOutcome]:
    """Yield the outcome of each neighbour."""
    first = resolved_edit.first_neighbor
    measured = zip(
        resolved_edit.neighborhood_probes,
        before.probe_results[first:],
        after.probe_results[first:],
        before.neighbor_texts,
        after.neighbor_texts,
        strict=True,
    )
    yield from starmap(NeighborOutcome, measured)


def side_effect_report(
    resolved_edit: ResolvedEdit, before: VersionMeasurement, after: VersionMeasurement
) -> dict[str, Any]:
    """Return the part of an edit's report about what else changed: changes to the new object first."""
    outcomes = list(neighbor_outcomes(resolved_edit, before, after))
    changed = [o for o in outcomes if o.has_changed]
    changed.sort(key=lambda o: (not _says_new(o), o.probe.prompt))
    return {
        "side_effects": {
            "measured": bool(outcomes),
            "neighbors": len(outcomes),
            "changed": len(changed),
            "reason": None if outcomes else _reason_of_none(resolved_edit),
        },
        "also_changed": [_change(outcome) for outcome in changed[:MAX_REPORTED_CHANGES]],
    }


def _says_new(outcome: NeighborOutcome) -> bool:
    return begins_with(outcome.text_after.text, outcome.probe.new)


def _change(outcome: NeighborOutcome) -> dict[str, str | None]:
    after = outcome.probe.new if _says_new(outcome) else outcome.text_after.answer
    return {
        "prompt": outcome.probe.prompt,
        "subject": outcome.probe.subject,
        "before": outcome.text_before.answer,
        "after": after,
    }


def _reason_of_none(resolved_edit: ResolvedEdit) -> str:
    if resolved_edit.request.given_neighbors is None:
        return "no neighbor with an answer was found: give some in `probes.neighborhood`"
    return 'the request gives no neighbors: leave `probes` out, or give "auto"'
