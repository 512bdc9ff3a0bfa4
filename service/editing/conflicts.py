"""Conflicts: active edits of the same subject and relation with another prompt and another object.

An edit influences all prompts about its subject, and those of its own relation most. To detect a conflict, the
rewrite probe of the active edit is scored on the base model with the new edit alone. When the new object is the most
probable one there, both edits are about one relation.
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
    """An active edit of the same subject with another prompt and another object, scored with the new edit alone."""

    edit: str
    prompt: str
    target_new: str
    probability: float  #: of the new object on the prompt of the active edit
    own_probability: float  #: of the active edit's object on its prompt
    true_probability: float  #: of the true object on that prompt
    #: between both changes of value at their lowest layer; None unless both are associations of one layer
    cosine: float | None

    def is_conflict(self, limit: float) -> bool:
        """Whether the new object is the most probable of the three objects, and at least as probable as `limit`."""
        return (
            self.probability >= max(limit, self.true_probability) and self.probability > self.own_probability
        )


def find_conflict_candidates(
    replica: VersionedModel,
    probe: Probe,
    updates: Sequence[EditUpdate],
    others: Mapping[str, tuple[Mapping[str, Any], Sequence[EditUpdate]]],
) -> Stepper[list[ConflictCandidate]]:
    """Score the prompts of active edits of the same subject with the new edit alone. `others`: their ledger bodies
    and updates, by id.

    Only edits with another object are scored. An erasure has no object of its own, so that it conflicts with no edit.
    """
    probes = {edit: probe_of_entry(body) for edit, (body, _) in others.items()}
    probes = {
        edit: q
        for edit, q in probes.items()
        if q.new.strip() != probe.new.strip() and "erase" not in (q.objective, probe.objective)
    }
    if not probes:
        return []
    pair_probes = [
        Probe(q.prompt, probe.new, other, separator=q.separator)
        for q in probes.values()
        for other in (q.new, q.true)
    ]
    new_edit_patch = yield from replica.compose_patch_in_steps(updates)
    results = yield from replica.step_with_patch(new_edit_patch, run_probes(replica.base, pair_probes))
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
    """Return the cosine between the changes of value of two edits at their lowest layer, or None unless both are
    associations of one layer."""
    a, b = (min(pieces, key=lambda p: p.layer) for pieces in (updates, other_updates))
    if not (isinstance(a, Association) and isinstance(b, Association) and a.layer == b.layer):
        return None
    return float(cosine_similarity(a.value.double().cpu(), b.value.double().cpu(), dim=0))
