"""One edit, from the request to the ledger: find it on the base model, try it at head, strengthen or reject it, land it.

The associations are found on the base model and never again. What depends on the other active edits is only the trial:
the version that would come out is composed, put in place, and measured before anything is written. When another
edit lands meanwhile, the trial is repeated at the new head.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version as library_version
from typing import Any

import torch

from service import faults
from service.editors.composition import Association, compose, norm_ratio, pack
from service.editors.recipes import RomeParameters, resolve
from service.editors.rome import Found, find_steps
from service.errors import Cancelled, Conflict
from service.evaluation.scores import share_kept, share_new
from service.jobs.desk import Desk, RunningJob
from service.models.scoring import answer_steps, log_prob_steps, perplexity_steps
from service.progress import Progress, Steps, persist
from service.requests import EditRequest
from service.serving.replica import Replica
from service.text import fact_key, fill
from service.toolkit import Toolkit

STRENGTHS = (1.0, 1.25, 1.5, 2.0)  # tried in turn until the edit takes at head
WATCHED = 64  # active edits looked at for damage: those of the subject, then those whose keys are nearest
SAID = 8  # tokens of what the model says, shown to people


@dataclass(frozen=True)
class Question:
    """A prompt with the new object and the true one."""

    prompt: str
    new: str
    true: str


@dataclass(frozen=True)
class Answer:
    """Mean log-probability of both objects, and whether each is the greedy continuation."""

    new: float
    true: float
    says_new: bool
    says_true: bool

    @property
    def prefers_new(self) -> bool:
        return self.new > self.true

    def probabilities(self) -> dict[str, float]:
        """exp of the mean log-probability over the object's tokens (methods E.1)."""
        return {"new": _exp(self.new), "true": _exp(self.true)}


def holds(question: Question, answer: Answer) -> bool:
    """Whether the new object is the more probable one, or is said where it is the true one as well."""
    return answer.prefers_new or (question.new.strip() == question.true.strip() and answer.says_new)


@dataclass(frozen=True)
class Plan:
    """An edit's request, resolved."""

    request: EditRequest
    parameters: RomeParameters
    rewrite: Question
    paraphrase: list[Question]
    neighborhood: list[Question]

    @property
    def questions(self) -> list[Question]:
        return [self.rewrite, *self.paraphrase, *self.neighborhood]


@dataclass(frozen=True)
class Measured:
    """Answers to a plan's questions, what the model says, the perplexity, and which watched edits hold."""

    answers: list[Answer]
    says: str
    perplexity: float
    holding: set[str]


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
    after: Measured
    checks: list[Check]
    norm_ratio: dict[int, float]
    broken: list[str]

    @property
    def passed(self) -> bool:
        return all(c.passed for c in self.checks)

    @property
    def took(self) -> bool:
        return all(c.passed for c in self.checks if c.name in ("efficacy", "probability", "paraphrase"))


def edit_steps(replica: Replica, desk: Desk, job: RunningJob, toolkit: Toolkit) -> Steps[None]:
    """Carry out one edit job to its end: applied (by a dry run without a version) or rejected. Raises what a user should read."""
    began = time.monotonic()
    request = EditRequest.model_validate(job.request)
    plan = yield from plan_steps(replica, request, toolkit)
    found = yield from find_on_base_steps(replica, toolkit, plan, job.id)
    while True:
        head = replica.head()
        before, trial = yield from trial_steps(replica, toolkit, plan, found, head, job)
        result = report(plan, found, before, trial, time.monotonic() - began)
        landing = trial.passed or not request.guard.enabled
        if desk.cancel_requested(job):
            raise Cancelled("the edit was cancelled before it landed.")
        if request.dry_run or not landing:
            yield from persist(partial(desk.finish, job, "evaluated" if landing else "rejected", result))
            return
        factors = pack([a.scaled(trial.strength) for a in found.associations])
        body = provenance(replica, toolkit, plan, trial)
        faults.reach("edit.after_compute")
        try:
            yield from persist(partial(desk.apply, job, head, factors, body, result))
            return
        except Conflict:
            yield Progress("another edit landed first: look again", 0, 1)


def plan_steps(replica: Replica, request: EditRequest, toolkit: Toolkit) -> Steps[Plan]:
    """Resolve the hyperparameters, and the true object when the user names none: what the base model answers."""
    model = replica.base
    parameters = resolve(toolkit.recipe, request.hparams, model.layers)
    prompt = fill(request.prompt, request.subject).text
    true = request.target_true
    if true is None:
        said = yield from answer_steps(model, prompt, SAID)
        true = said.split("\n")[0].split(".")[0].split(",")[0].strip() or "?"
    new = request.target_new
    paraphrase = [fill(p, request.subject).text if "{}" in p else p for p in request.probes.paraphrase]
    return Plan(
        request,
        parameters,
        Question(prompt, new, true),
        [Question(p, new, true) for p in paraphrase],
        [Question(n.prompt, new, n.target) for n in request.probes.neighborhood],
    )


def find_on_base_steps(replica: Replica, toolkit: Toolkit, plan: Plan, edit: str) -> Steps[Found]:
    """The edit's associations, found on the base model whatever is active."""
    parameters = plan.parameters
    contexts = yield from toolkit.contexts_steps(parameters.contexts, parameters.seed)
    statistics = yield from toolkit.statistics_steps(parameters.layers)
    statement = fill(plan.request.prompt, plan.request.subject)
    target = plan.request.target_new
    found = yield from find_steps(replica.base, statistics, contexts, statement, target, parameters, edit)
    return found


def trial_steps(
    replica: Replica, toolkit: Toolkit, plan: Plan, found: Found, head: int, job: RunningJob
) -> Steps[tuple[Measured, Trial]]:
    """Measure head, then head with the edit in it, stronger and stronger until it takes."""
    key = fact_key(plan.request.subject, plan.request.prompt)
    active, watched = _others(replica, head, key, found)
    now = replica.weights(head)
    before = yield from replica.standing(now, measure_steps(replica, toolkit, plan, watched))
    best: Trial | None = None  # the first, until one passes; then the strongest that does
    others = [a for group in active.values() for a in group]
    for strength in STRENGTHS:
        together = others + [a.scaled(strength) for a in found.associations]
        weights = replica.composed(together)
        yield Progress("compose", 1, 1)
        after = yield from replica.standing(weights, measure_steps(replica, toolkit, plan, watched))
        trial = _judge(plan, before, after, strength, _norms(replica, plan, together, others))
        if best is None or trial.passed:
            best = trial
        if trial.passed and trial.after.answers[0].says_new:
            break
        if not plan.request.guard.enabled or (not trial.passed and trial.took):
            break  # it takes, but does damage: more of it does more
    assert best is not None
    return before, best


def _others(
    replica: Replica, head: int, key: str, found: Found
) -> tuple[dict[str, list[Association]], dict[str, Question]]:
    """The edits that stay active beside the new one, and which of them to watch.

    An older edit of the same fact is superseded: it is left out, as it will be at the new version.
    """
    bodies = {edit: body for edit, _, body in replica.ledger.associations_at(head)}
    kept = {e: b for e, b in bodies.items() if fact_key(str(b["subject"]), str(b["prompt"])) != key}
    everything = replica.active(head)
    active = {e: everything[e] for e in kept}
    mine = found.associations[0]

    def nearness(edit: str) -> float:
        theirs = active[edit][0]
        if theirs.subject == mine.subject:
            return float("inf")
        return abs(float(theirs.key @ mine.direction) / float(mine.key @ mine.direction))

    nearest = sorted(active, key=nearness, reverse=True)[:WATCHED]
    watched = {
        e: Question(
            fill(str(kept[e]["prompt"]), str(kept[e]["subject"])).text,
            str(kept[e]["target_new"]),
            str(kept[e].get("resolved_true") or kept[e].get("target_true") or "?"),
        )
        for e in nearest
    }
    return active, watched


def measure_steps(
    replica: Replica, toolkit: Toolkit, plan: Plan, watched: dict[str, Question]
) -> Steps[Measured]:
    """Ask the model, as it stands, everything that the guard wants to know."""
    questions = [*plan.questions, *watched.values()]
    pairs = [(q.prompt, target) for q in questions for target in (q.new, q.true)]
    scores = yield from log_prob_steps(replica.base, pairs)
    answers = [
        Answer(new[0], true[0], new[1], true[1]) for new, true in zip(scores[::2], scores[1::2], strict=True)
    ]
    says = yield from answer_steps(replica.base, plan.rewrite.prompt, SAID)
    perplexity = yield from perplexity_steps(replica.base, toolkit.reference)
    own = len(plan.questions)
    holding = {e for (e, q), a in zip(watched.items(), answers[own:], strict=True) if holds(q, a)}
    return Measured(answers[:own], says, perplexity, holding)


def _norms(
    replica: Replica, plan: Plan, together: Sequence[Association], others: Sequence[Association]
) -> dict[int, float]:
    """How far the edit moves each of its layers from where the others have it, as a multiple of the weight's norm.

    Its own share and not the sum: many sound edits together move a weight further than one wild one.
    """
    before, after = compose(others), compose(together)
    moved = {x: after[x].minus(before[x]) if x in before else after[x] for x in plan.parameters.layers}
    return {x: norm_ratio(replica.base.weight(x).data, change) for x, change in moved.items()}


def _judge(plan: Plan, before: Measured, after: Measured, strength: float, norms: dict[int, float]) -> Trial:
    """Hold a trial against the guard's limits."""
    guard = plan.request.guard
    rewrite = after.answers[0]
    cut = 1 + len(plan.paraphrase)
    checks = [
        Check("efficacy", holds(plan.rewrite, rewrite), _exp(rewrite.new), _exp(rewrite.true)),
        _at_least("probability", _exp(rewrite.new), guard.min_probability),
    ]
    if plan.paraphrase:
        share = sum(a.prefers_new for a in after.answers[1:cut]) / len(plan.paraphrase)
        checks.append(_at_least("paraphrase", share, guard.min_paraphrase))
    known = [i for i in range(cut, len(after.answers)) if not before.answers[i].prefers_new]
    if known:
        share = sum(not after.answers[i].prefers_new for i in known) / len(known)
        checks.append(_at_least("neighborhood", share, guard.min_neighborhood))
    broken = sorted(before.holding - after.holding)
    checks += [
        _at_most("perplexity", after.perplexity / before.perplexity, guard.max_perplexity),
        _at_most("norm", max(norms.values()), guard.max_norm),
        _at_most("broken", len(broken), guard.max_broken),
    ]
    return Trial(strength, after, checks, norms, broken)


def _at_least(name: str, figure: float, limit: float) -> Check:
    return Check(name, figure >= limit, figure, limit)


def _at_most(name: str, figure: float, limit: float) -> Check:
    return Check(name, figure <= limit, figure, limit)  # NaN passes neither


def report(plan: Plan, found: Found, before: Measured, trial: Trial, seconds: float) -> dict[str, Any]:
    """An edit's result, for people and programs: JSON."""
    after = trial.after
    cut = 1 + len(plan.paraphrase)

    def both(i: int) -> dict[str, Any]:
        return {
            "prompt": plan.questions[i].prompt,
            "new": plan.questions[i].new,
            "true": plan.questions[i].true,
            "before": before.answers[i].probabilities(),
            "after": after.answers[i].probabilities(),
        }

    def scores(measured: Measured) -> dict[str, float | None]:
        log_p = [(a.new, a.true) for a in measured.answers]
        return {"ES": share_new(log_p[:1]), "PS": share_new(log_p[1:cut]), "NS": share_kept(log_p[cut:])}

    return {
        "target_true": plan.rewrite.true,
        "rewrite": both(0) | {"said": before.says, "says": after.says},
        "paraphrase": [both(i) for i in range(1, cut)],
        "neighborhood": [both(i) for i in range(cut, len(plan.questions))],
        "scores": {"before": scores(before), "after": scores(after)},
        "perplexity": {"before": before.perplexity, "after": after.perplexity},
        "delta_norm": found.delta_norm,
        "norm_ratio": {str(x): r for x, r in trial.norm_ratio.items()},
        "layers": sorted({a.layer for a in found.associations}),
        "strength": trial.strength,
        "optimisation": {"steps": len(found.losses), "first": found.losses[0], "last": found.losses[-1]},
        "broken": trial.broken,
        "guard": {
            "passed": trial.passed,
            "checks": [
                {"name": c.name, "passed": c.passed, "figure": c.figure, "limit": c.limit}
                for c in trial.checks
            ],
        },
        "reason": _reason(trial),
        "seconds": round(seconds, 3),
    }


_REASONS = {
    "efficacy": "the edit did not take: the new object is not more probable than the old one",
    "probability": "the new object is less probable than asked for",
    "paraphrase": "too few paraphrases say the new object",
    "neighborhood": "too many neighbourhood prompts lost their answer",
    "perplexity": "plain text became too improbable",
    "norm": "the change of the weight is too large",
    "broken": "other active edits would cease to hold",
}


def _reason(trial: Trial) -> str | None:
    """Why an edit was rejected, in words; None when it passed."""
    failed = [
        f"{_REASONS[c.name]} ({c.figure:.3g}, limit {c.limit:.3g})" for c in trial.checks if not c.passed
    ]
    return "; ".join(failed) or None


def provenance(replica: Replica, toolkit: Toolkit, plan: Plan, trial: Trial) -> dict[str, Any]:
    """What the ledger keeps, so that replaying it gives the same factors (design, section 2.6)."""
    model, layers = replica.base, plan.parameters.layers
    return {
        "method": plan.request.method,
        "hparams": plan.parameters.model_dump(mode="json"),
        "strength": trial.strength,
        "resolved_true": plan.rewrite.true,
        "statistics": {str(x): toolkit.statistics[x].digest for x in layers},
        "corpus": toolkit.corpus.digest,
        "dtype": str(model.weight(layers[0]).dtype).removeprefix("torch."),
        "device": str(model.device),
        "libraries": {name: library_version(name) for name in ("torch", "transformers")}
        | {"python": platform.python_version()},
        "fingerprint": model.fingerprint,
    }


def _exp(log_p: float) -> float:
    return float(torch.tensor(log_p, dtype=torch.float64).exp())
