"""What a version with some edits in it would be, measured before anything is written, and what the guard says of it.

Several edits may be tried in one version: each is asked its own questions and judged by its own guard; the perplexity and the edits
that cease to hold are the version's, and every one of them answers for those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from service.editing.conflicts import Rival, rivals_steps
from service.editing.context import Toolkit
from service.editing.methods.rome import Found
from service.editing.probes import Answer, Question, answers_steps, effect, exp, holds, keeps, question_of
from service.engine.decoding import Batch, Row, row
from service.engine.versioned_model import Replica
from service.errors import InvalidInput
from service.kit.steps import Progress, Steps
from service.kit.text import fact_key
from service.models.loading import LoadedModel, Site
from service.models.scoring import perplexity_steps
from service.recipes.recipe import Climb, Parameters, climb
from service.schemas import EditRequest, Objective, Sampling
from service.weights.capacity import rooms_steps
from service.weights.composition import Association, Change, Piece, compose, norm_ratio

WATCHED = 64  # active edits that an edit looks at for damage: those of its subject, then those whose keys are nearest
SAID = 8  # tokens of what the model says, shown to people


@dataclass(frozen=True)
class Plan:
    """An edit's request, resolved."""

    request: EditRequest
    parameters: Parameters
    rewrite: Question
    paraphrase: list[Question]
    neighborhood: list[Question]

    @property
    def questions(self) -> list[Question]:
        return [self.rewrite, *self.paraphrase, *self.neighborhood]

    @property
    def method(self) -> str:
        return self.request.method or "rome"

    @property
    def fact(self) -> str:
        return fact_key(self.request.subject, self.request.prompt)


@dataclass(frozen=True)
class Draft:
    """An edit that has not landed: what is asked for, and what was found on the base model."""

    plan: Plan
    found: Found


@dataclass(frozen=True)
class Measured:
    """Answers to a plan's questions, what the model says, the perplexity, and which watched edits hold."""

    answers: list[Answer]
    says: str
    perplexity: float
    holding: set[str]
    bare: Answer | None = (
        None  #: to the plan's own question, where it differs when what the edit supersedes is left out
    )


@dataclass(frozen=True)
class Stand:
    """A version that edits are tried on: who stays active beside them, whom to watch, and how things are before."""

    version: int
    others: list[Piece]
    composed: dict[Site, Change]  #: these, as changes of their weights
    watched: dict[str, Question]
    before: list[Measured]  #: for each draft
    conflicts: list[list[Rival]]  #: of each draft, with active edits that say its relation in other words
    room: list[dict[int, float]]  #: by layer, what the others leave of each draft's key

    def climb(self, plan: Plan, model: LoadedModel) -> Climb:
        """What is tried in turn for an edit beside the others."""
        active = len({p.edit for p in self.others}) + len(self.before)
        return climb(plan.parameters, plan.parameters.strengths, active, model.inner_width)


@dataclass(frozen=True)
class Check:
    """One rule of the guard, with its figure and its limit."""

    name: str
    passed: bool
    figure: float
    limit: float


@dataclass(frozen=True)
class Trial:
    """What the version with the edit in it would be."""

    strength: float
    before: Measured
    after: Measured
    checks: list[Check]
    norm_ratio: dict[Site, float]
    broken: list[str]
    objective: Objective = "write"
    conflicts: tuple[Rival, ...] = ()
    supersedes: tuple[str, ...] = ()
    room: dict[int, float] = field(default_factory=dict)
    leads: bool = True  #: by the margin that the recipe asks for

    @property
    def passed(self) -> bool:
        return all(c.passed for c in self.checks)

    @property
    def took(self) -> bool:
        named = ("efficacy", "probability", "paraphrase")
        return self.leads and all(c.passed for c in self.checks if c.name in named)

    @property
    def spoken(self) -> bool:
        """Whether the model says the new object, and nothing speaks against it: no other strength is wanted."""
        return self.passed and self.leads and (self.after.answers[0].says_new or self.objective == "erase")


def stand_steps(replica: Replica, toolkit: Toolkit, drafts: Sequence[Draft], version: int) -> Steps[Stand]:
    """Measure a version before these edits.

    An older edit of the same fact is superseded, and so is one in conflict where that is asked for: it is left out, as it will
    be at the new version.
    """
    facts = {d.plan.fact for d in drafts}
    kept = {
        edit: body
        for edit, body in replica.ledger.active_at(version)
        if fact_key(str(body["subject"]), str(body["prompt"])) not in facts
    }
    everything = replica.active(version)
    conflicts = yield from _conflicts_steps(replica, drafts, kept, everything)
    named = {e for d, found in zip(drafts, conflicts, strict=True) for e in superseded(d.plan, found)}
    kept = {edit: body for edit, body in kept.items() if edit not in named}
    active = {edit: everything[edit] for edit in kept}
    watched = {edit: question_of(kept[edit]) for edit in _nearest(active, drafts)}
    plans = [d.plan for d in drafts]
    weights = replica.weights(version)
    before = yield from replica.standing(weights, measure_steps(replica, toolkit, plans, watched, version))
    others = [a for group in active.values() for a in group]
    if len(active) < len(everything) and any(p.request.objective != "write" for p in plans):
        asked = answers_steps(replica.base, [p.rewrite for p in plans])
        bare = yield from replica.standing(replica.composed(others), asked)
        before = [replace(m, bare=answer) for m, answer in zip(before, bare, strict=True)]
    room = yield from rooms_steps([d.found.pieces for d in drafts], others)
    yield Progress("stand", 1, 1)
    return Stand(version, others, compose(others), watched, before, conflicts, room)


def _conflicts_steps(
    replica: Replica,
    drafts: Sequence[Draft],
    kept: Mapping[str, Mapping[str, Any]],
    pieces: Mapping[str, list[Piece]],
) -> Steps[list[list[Rival]]]:
    """The conflicts of each draft with active edits of its subject."""
    found = []
    for draft in drafts:
        mine = draft.found.pieces
        others = {e: (body, pieces[e]) for e, body in kept.items() if pieces[e][0].subject == mine[0].subject}
        rivals = yield from rivals_steps(replica, draft.plan.rewrite, mine, others)
        limit = draft.plan.request.guard.conflict
        found.append([r for r in rivals if r.conflicts(limit)])
    return found


def _nearest(active: dict[str, list[Piece]], drafts: Sequence[Draft]) -> list[str]:
    """The active edits that some draft is nearest to: of its subject first, then by the overlap of their keys. A piece without a
    key is as near as any: the newest of those."""
    keyed = {e: a for e, group in active.items() for a in group[:1] if isinstance(a, Association)}
    keyless = [e for e in active if e not in keyed]
    keys = torch.stack([a.key for a in keyed.values()]) if keyed else torch.empty(0, 0)
    chosen: dict[str, None] = {}
    for draft in drafts:
        mine = draft.found.pieces[0]
        same = [e for e, group in active.items() if group[0].subject == mine.subject]
        near: list[str] = []
        if keyed and isinstance(mine, Association):
            overlap = (keys @ mine.direction).abs().sort(descending=True, stable=True).indices
            near = [list(keyed)[i] for i in overlap.tolist()]
        order = dict.fromkeys([*same, *near, *reversed(keyless), *active])
        chosen |= dict.fromkeys(list(order)[:WATCHED])
    return list(chosen)


def trial_steps(
    replica: Replica, toolkit: Toolkit, drafts: Sequence[Draft], stand: Stand, strengths: Sequence[float]
) -> Steps[list[Trial]]:
    """Compose the version with these edits in it, each with its strength, put it in place, measure, and judge each."""
    mine = [[p.scaled(s) for p in d.found.pieces] for d, s in zip(drafts, strengths, strict=True)]
    together = stand.others + [a for group in mine for a in group]
    weights = replica.composed(together)
    yield Progress("compose", 1, 1)
    plans = [d.plan for d in drafts]
    after = yield from replica.standing(weights, measure_steps(replica, toolkit, plans, stand.watched))
    trials: list[Trial] = []
    for i, (draft, group) in enumerate(zip(drafts, mine, strict=True)):
        norms = _norms(replica, stand, group)
        lead = stand.climb(draft.plan, replica.base).enough(strengths[i])
        trial = judge(draft.plan, stand.before[i], after[i], strengths[i], norms, lead)
        trials.append(beside(draft.plan, trial, stand.conflicts[i], stand.room[i]))
        if len(drafts) > 1:
            yield Progress("judge", len(trials), len(drafts))
    return trials


def measure_steps(
    replica: Replica,
    toolkit: Toolkit,
    plans: Sequence[Plan],
    watched: dict[str, Question],
    version: int | None = None,
) -> Steps[list[Measured]]:
    """Ask the model, as it stands, everything that the guards of these edits want to know.

    A `version` that has landed has its perplexity measured once.
    """
    questions = [q for plan in plans for q in plan.questions]
    answers = iter((yield from answers_steps(replica.base, [*questions, *watched.values()])))
    own = [[next(answers) for _ in plan.questions] for plan in plans]
    holding = {edit for edit, question in watched.items() if holds(question, next(answers))}
    says = yield from answer_steps(replica.base, [plan.rewrite.prompt for plan in plans])
    perplexity = toolkit.perplexities.get(version) if version is not None else None
    if perplexity is None:
        perplexity = yield from perplexity_steps(replica.base, toolkit.reference)
    if version is not None:
        toolkit.remember(version, perplexity)
    return [Measured(a, s, perplexity, holding) for a, s in zip(own, says, strict=True)]


def answer_steps(model: LoadedModel, prompts: Sequence[str], length: int = SAID) -> Steps[list[str]]:
    """The greedy continuations of some prompts, at most `length` tokens each, side by side."""
    greedy = Sampling(max_new_tokens=length, temperature=0)
    rows: list[Row | None] = []
    for prompt in prompts:
        try:
            rows.append(row(model, prompt, greedy))
        except InvalidInput:  # it fills the model's positions: there is no room for an answer
            rows.append(None)
    batch = Batch(model, [r for r in rows if r is not None])
    done = 0
    while len(batch):
        batch.step()
        done += 1
        yield Progress("answer", done, length)
    return [r.text if r is not None else "" for r in rows]


def _norms(replica: Replica, stand: Stand, mine: Sequence[Piece]) -> dict[Site, float]:
    """How far an edit moves each of its weights from where the others have it, as a multiple of the weight's norm.

    Its own share and not the sum: many sound edits together move a weight further than one wild one.
    """
    sites = {p.site for p in mine}
    after = compose(p for p in [*stand.others, *mine] if p.site in sites)
    before = stand.composed
    moved = {x: after[x].minus(before[x]) if x in before else after[x] for x in sites}
    return {x: norm_ratio(replica.base.parameter(x).data, change) for x, change in moved.items()}


def judge(
    plan: Plan,
    before: Measured,
    after: Measured,
    strength: float,
    norms: dict[Site, float],
    lead: float = 0.0,
) -> Trial:
    """Hold a trial against the guard's limits. It leads when the new object is ahead by `lead`."""
    guard, objective = plan.request.guard, plan.request.objective
    checks = [_efficacy(plan, before.bare or before.answers[0], after.answers[0])]
    if objective != "erase":
        checks.append(_at_least("probability", exp(after.answers[0].new), guard.min_probability))
    cut = 1 + len(plan.paraphrase)
    asked = list(zip(plan.questions, before.answers, after.answers, strict=True))
    if plan.paraphrase:
        share = sum(holds(q, now) for q, _, now in asked[1:cut]) / len(plan.paraphrase)
        checks.append(_at_least("paraphrase", share, guard.min_paraphrase))
    if known := [(q, now) for q, was, now in asked[cut:] if keeps(q, was)]:
        share = sum(keeps(q, now) for q, now in known) / len(known)
        checks.append(_at_least("neighborhood", share, guard.min_neighborhood))
    broken = sorted(before.holding - after.holding)
    checks += [
        _at_most("perplexity", after.perplexity / before.perplexity, guard.max_perplexity),
        _at_most("norm", max(norms.values()), guard.max_norm),
        _at_most("broken", len(broken), guard.max_broken),
    ]
    rewrite = after.answers[0]
    leads = objective != "write" or rewrite.new - rewrite.true >= lead or plan.rewrite.one_object
    return Trial(strength, before, after, checks, norms, broken, objective, leads=leads)


def _efficacy(plan: Plan, was: Answer, now: Answer) -> Check:
    """Whether an edit does what it is for. Its figure: p(new), to be above p(true); else the share of what was possible."""
    done, objective = holds(plan.rewrite, now), plan.request.objective
    if objective == "write":
        return Check("efficacy", done, exp(now.new), exp(now.true))
    share, least = effect(objective, was, now), plan.request.guard.min_effect
    return Check("efficacy", done and share >= least, share, least)


def _at_least(name: str, figure: float, limit: float) -> Check:
    return Check(name, figure >= limit, figure, limit)


def _at_most(name: str, figure: float, limit: float) -> Check:
    return Check(name, figure <= limit, figure, limit)  # NaN passes neither


def superseded(plan: Plan, conflicts: Sequence[Rival]) -> list[str]:
    """The edits that an edit names as superseded, beside older ones of its own fact."""
    return sorted(r.edit for r in conflicts) if plan.request.on_conflict == "supersede" else []


def beside(plan: Plan, trial: Trial, conflicts: Sequence[Rival], room: dict[int, float]) -> Trial:
    """A trial with what active edits mean for it: conflicts, which fail it where that is asked for, and the room that they leave."""
    guard, checks = plan.request.guard, list(trial.checks)
    if plan.request.on_conflict == "reject":
        most = max((r.probability for r in conflicts), default=0.0)
        checks.append(Check("conflict", not conflicts, most, guard.conflict))
    if room:
        checks.append(_at_least("room", min(room.values()), guard.min_room))
    names = tuple(superseded(plan, conflicts))
    return replace(trial, checks=checks, conflicts=tuple(conflicts), supersedes=names, room=room)
