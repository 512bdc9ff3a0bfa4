"""Edits that say an active edit's relation in other words: one subject, another prompt, and objects that pull against each other.

What an edit writes at its subject speaks on every prompt about the subject, and on those of its own relation most of all. So an
active edit is asked its own question with the new edit alone in place, on the base model: where the new object is then
the more probable one there, the two are about one relation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.nn.functional import cosine_similarity

from service.editing.probes import Probe, probability_of, probe_of_entry, run_probes
from service.engine.versioned_model import VersionedModel
from service.kit.steps import Stepper
from service.weights.factors import Association, EditUpdate


@dataclass(frozen=True)
class ConflictCandidate:
    """An active edit of the same subject with another prompt and another object, beside a new edit."""

    edit: str
    prompt: str
    target_new: str
    probability: float  #: of the new object on the rival's prompt, with the new edit alone in place
    own_probability: float  #: there, of the rival's own object
    true_probability: float  #: there, of what the base model answers
    cosine: (
        float | None
    )  #: of both changes of value at their lowest layer; None where one of them has none there

    def is_conflict(self, limit: float) -> bool:
        """Whether the new object is the most probable of the three, and at least as probable as the limit."""
        return (
            self.probability >= max(limit, self.true_probability) and self.probability > self.own_probability
        )


def find_conflict_candidates(
    replica: VersionedModel,
    probe: Probe,
    updates: Sequence[EditUpdate],
    others: Mapping[str, tuple[Mapping[str, Any], Sequence[EditUpdate]]],
) -> Stepper[list[ConflictCandidate]]:
    """What a new edit does alone on the prompts of others of its subject: their ledger's bodies and pieces, by id.

    Only those with another object; none beside an erasure or with one, since what is not to be said is no other object.
    """
    probes = {edit: probe_of_entry(body) for edit, (body, _) in others.items()}
    probes = {
        edit: q
        for edit, q in probes.items()
        if q.new.strip() != probe.new.strip() and "erase" not in (q.objective, probe.objective)
    }
    if not probes:
        return []
    pair_probes = [Probe(q.prompt, probe.new, other) for q in probes.values() for other in (q.new, q.true)]
    new_edit_weights = replica.compose_weights(updates)
    results = yield from replica.step_with_weights(new_edit_weights, run_probes(replica.base, pair_probes))
    return [
        ConflictCandidate(
            edit,
            q.prompt,
            q.new,
            probability_of(own.new),
            probability_of(own.true),
            probability_of(base.true),
            value_cosine(updates, others[edit][1]),
        )
        for (edit, q), own, base in zip(probes.items(), results[::2], results[1::2], strict=True)
    ]


def value_cosine(updates: Sequence[EditUpdate], other_updates: Sequence[EditUpdate]) -> float | None:
    """Of the changes of value of two edits at their lowest layer, where that is one and both are associations."""
    a, b = (min(pieces, key=lambda p: p.layer) for pieces in (updates, other_updates))
    if not (isinstance(a, Association) and isinstance(b, Association) and a.layer == b.layer):
        return None
    return float(cosine_similarity(a.value.double().cpu(), b.value.double().cpu(), dim=0))
