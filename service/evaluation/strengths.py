"""The strengths of edits in an evaluation, chosen by the service's policy (`service/editing/strengthen.py`).

The service also rejects edits that damage other answers. An evaluation keeps every edit, because it measures that
damage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from service.datasets.record import Record
from service.editing.probes import Probe, ProbeResult, edit_holds
from service.editing.strengthen import Assessment, StrengthChoice, choose_strengths
from service.engine.versioned_model import VersionedModel
from service.evaluation.measuring import score_pairs, score_records
from service.evaluation.metrics import PromptScores, RecordScores
from service.kit.steps import Phase, Progress, Stepper
from service.models.score import TargetScore
from service.recipes.strength_schedule import StrengthSchedule
from service.schemas import Guard
from service.weights.factors import EditUpdate

#: number of active edits -> their schedule of strengths
ScheduleFor = Callable[[int], StrengthSchedule]


def assess_rewrite(record: Record, scores: PromptScores, required_margin: float) -> Assessment:
    """Judge an edit by its prompt, as the service does with the default guard.

    The edit passes if the new object is more probable than the true one and probable enough. It is effective if it
    also leads by the required margin, in nats of mean log-probability. It is accepted if the new object is also the
    greedy continuation. A record without a true object passes if the new object is the greedy continuation.
    """
    new, true = scores.new, scores.true or scores.new
    probe = Probe(record.text, record.target_new, record.target_true or record.target_new)
    result = ProbeResult.from_scores(new, true)
    passed = edit_holds(probe, result) and result.said_probability >= Guard().min_probability
    effective = passed and (probe.same_object or new.log_p - true.log_p >= required_margin)
    return Assessment(accepted=effective and new.is_greedy, passed=passed, effective=effective)


def choose_strength_alone(
    replica: VersionedModel, record: Record, updates: Sequence[EditUpdate], schedule: StrengthSchedule
) -> Stepper[StrengthChoice[list[TargetScore]]]:
    """Return the strength of an edit that is active alone, and the scores of the record's `scoring_pairs` at it."""

    def measure(strengths: Sequence[float]) -> Stepper[list[list[TargetScore]]]:
        (strength,) = strengths
        patch = yield from replica.compose_patch_in_steps(u.scaled(strength) for u in updates)
        yield Progress(Phase.COMPOSE, 1, 1)
        return [(yield from score_pairs(replica, [record], patch))]

    def assess(_: int, strength: float, scores: list[TargetScore]) -> Assessment:
        rewrite = RecordScores.from_scores(record, scores).rewrite
        return assess_rewrite(record, rewrite, schedule.required_margin(strength))

    (choice,) = yield from choose_strengths([schedule.strengths], measure, assess)
    return choice


def choose_group_strengths(
    replica: VersionedModel,
    records: Sequence[Record],
    groups: Sequence[Sequence[EditUpdate]],
    active: Sequence[EditUpdate],
    active_count: int,
    schedule_for: ScheduleFor,
) -> Stepper[list[float]]:
    """Return the strengths of edits that become active together, beside `active_count` edits with the updates
    `active`.

    As in the service, the accepted edits of a group are tried again without the others, which follow one by one. A
    group without an accepted edit is halved.
    """
    active = list(active)
    strengths: dict[int, float] = {}
    pending = [list(range(len(groups)))]
    while pending:
        members = pending.pop(0)
        schedule = schedule_for(active_count + len(strengths) + len(members))
        assess = partial(_assess_member, [records[i] for i in members], schedule)
        measure = partial(
            _score_with_strengths,
            replica,
            [records[i] for i in members],
            [groups[i] for i in members],
            active,
        )
        choices = yield from choose_strengths([schedule.strengths] * len(members), measure, assess)
        accepted = [
            i
            for n, (i, choice) in enumerate(zip(members, choices, strict=True))
            if assess(n, choice.strength, choice.measurement).accepted
        ]
        if len(members) == 1 or len(accepted) == len(members):
            for i, choice in zip(members, choices, strict=True):
                strengths[i] = choice.strength
                active += [u.scaled(choice.strength) for u in groups[i]]
        elif accepted:
            pending[:0] = [accepted, *([i] for i in members if i not in accepted)]
        else:
            middle = len(members) // 2
            pending[:0] = [members[:middle], members[middle:]]
    return [strengths[i] for i in range(len(groups))]


def _assess_member(
    records: Sequence[Record], schedule: StrengthSchedule, i: int, strength: float, scores: RecordScores
) -> Assessment:
    return assess_rewrite(records[i], scores.rewrite, schedule.required_margin(strength))


def _score_with_strengths(
    replica: VersionedModel,
    records: Sequence[Record],
    groups: Sequence[Sequence[EditUpdate]],
    active: Sequence[EditUpdate],
    strengths: Sequence[float],
) -> Stepper[list[RecordScores]]:
    """Return the scores of each record's own prompt, with all edits active at their strengths."""
    scaled = [u.scaled(s) for group, s in zip(groups, strengths, strict=True) for u in group]
    patch = yield from replica.compose_patch_in_steps([*active, *scaled])
    yield Progress(Phase.COMPOSE, 1, 1)
    prompts_only = [replace(r, paraphrases=(), neighbours=()) for r in records]
    return (yield from score_records(replica, prompts_only, patch))
