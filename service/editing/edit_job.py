"""Edits, from the request to the ledger: found on the base model, tried at head, landed, strengthened or rejected.

The associations are found on the base model and never again. What depends on the other active edits is only the trial:
the version that would come out is composed, put in place, and measured before anything is written. When another
edit lands meanwhile, the trial is repeated at the new head.

Edits that wait together are worked on together: their values are optimised side by side where a step has room for more
than one, and they are tried in one version. When all are fit they land in the order in which they came, one entry
of the ledger each; when not, those that are fit are tried without the others, and whoever is left is tried alone.
What goes wrong with one ends that one.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version as library_version
from typing import Any, TypeVar

from torch import Tensor

from service.editing.candidate import (
    Draft,
    Measured,
    Plan,
    Stand,
    Trial,
    answer_steps,
    stand_steps,
    trial_steps,
)
from service.editing.context import Toolkit
from service.editing.edit_spec import Asked, batches, want
from service.editing.methods.registry import find_together_steps
from service.editing.methods.rome import Found
from service.editing.probes import Answer, Question, holds, keeps
from service.engine.versioned_model import Replica
from service.errors import Cancelled, Conflict, Disagrees, InvalidInput, Unavailable
from service.jobs import artifacts as parts
from service.jobs.job_store import Desk, RunningJob
from service.kit import crash_points
from service.kit.steps import Ended, News, Progress, Steps, Told, Working, persist
from service.kit.text import fill
from service.models.loading import Site
from service.models.memory_estimates import admit
from service.recipes.recipe import RomeParameters, resolve
from service.schemas import EditRequest
from service.scores.scores import share_kept, share_new
from service.weights.composition import Addend, Piece, pack, unpack

LOOK_AGAIN = Progress("another edit landed first: look again", 0, 1)

T = TypeVar("T")


@dataclass(frozen=True)
class Given:
    """What an imported edit brings along: its vectors, and what the ledger that it comes from says of how they were found."""

    factors: bytes
    body: dict[str, Any]


@dataclass(frozen=True)
class Member:
    """A job among those that are worked on together, as far as it has come."""

    job: RunningJob
    began: float
    draft: Draft
    given: Given | None = None


def edits_steps(replica: Replica, desk: Desk, jobs: Sequence[RunningJob], toolkit: Toolkit) -> Working:
    """Carry out edit jobs to their ends: applied (by a dry run without a version) or rejected; or ended with an error that a
    user should read."""
    for company in companies(jobs):
        members = yield from _draft_steps(replica, desk, toolkit, company)
        yield from _land_steps(replica, desk, toolkit, members)


def companies(jobs: Iterable[RunningJob]) -> list[list[RunningJob]]:
    """Which jobs are worked on together, in their order.

    One edit of a subject at a time: the later may supersede the earlier, or be in conflict with it. Alone is a dry run, which is not to be judged beside edits that
    land, and whose worker died before: if it was this job's doing, it takes no others with it.
    """
    found: list[list[RunningJob]] = []
    closed = True
    for job in jobs:
        alone = job.dry_run or job.attempt > 1
        if closed or alone or job.subject in {other.subject for other in found[-1]}:
            found.append([])
        found[-1].append(job)
        closed = alone
    return found


def _apart(job: RunningJob, steps: Steps[T]) -> Generator[News, None, T | None]:
    """The steps of one job. What goes wrong with it ends it; the others go on."""
    try:
        with closing(steps):
            while True:
                try:
                    progress = next(steps)
                except StopIteration as end:
                    return end.value  # type: ignore[no-any-return]
                yield Told(job.id, progress)
    except (Unavailable, Disagrees):
        raise
    except Exception as error:
        yield Ended(job.id, error)
        return None


def _check_cancelled(desk: Desk, job: RunningJob) -> None:
    if desk.cancel_requested(job):
        raise Cancelled("the edit was cancelled before it landed.")


# what is wanted, and what is found for it


@dataclass(frozen=True)
class _Start:
    """A job whose request is understood, and for which nothing was found yet."""

    job: RunningJob
    began: float
    plan: Plan
    wanted: Asked


def _draft_steps(
    replica: Replica, desk: Desk, toolkit: Toolkit, jobs: Sequence[RunningJob]
) -> Generator[News, None, list[Member]]:
    """Find the associations of each, on the base model whatever is active; of an edit that was imported they are given."""
    starts: list[_Start] = []
    members: list[Member] = []
    for job in jobs:
        if imported(job):
            given = yield from _apart(job, _given_steps(replica, desk, toolkit, job))
            members += [] if given is None else [given]
            continue
        start = yield from _apart(job, _start_steps(replica, desk, toolkit, job))
        if start is not None:
            starts.append(start)
    of = {s.job.id: s for s in starts}
    for batch in batches(replica.base, [s.wanted for s in starts]):
        members += yield from _find_steps(replica, desk, toolkit, [of[wanted.edit] for wanted in batch])
    order = {job.id: number for number, job in enumerate(jobs)}
    return sorted(members, key=lambda m: order[m.job.id])


def _start_steps(replica: Replica, desk: Desk, toolkit: Toolkit, job: RunningJob) -> Steps[_Start]:
    began = time.monotonic()
    _check_cancelled(desk, job)
    request = EditRequest.model_validate(job.request)
    plan = yield from plan_steps(replica, request, toolkit)
    wanted = yield from want_steps(replica, toolkit, plan, job.id)
    return _Start(job, began, plan, wanted)


def _find_steps(
    replica: Replica, desk: Desk, toolkit: Toolkit, starts: Sequence[_Start]
) -> Generator[News, None, list[Member]]:
    """Side by side; should that fail, one by one, so that each has its own error."""
    search = _search_steps(replica, desk, toolkit, starts)
    if len(starts) == 1:
        return (yield from _apart(starts[0].job, search)) or []
    try:
        return (yield from search)
    except (Unavailable, Disagrees):
        raise
    except Exception:
        members: list[Member] = []
        for s in starts:
            members += yield from _find_steps(replica, desk, toolkit, [s])
        return members


def _search_steps(
    replica: Replica, desk: Desk, toolkit: Toolkit, starts: Sequence[_Start]
) -> Steps[list[Member]]:
    for s in starts:
        _check_cancelled(desk, s.job)
    wished = [s.plan.parameters for s in starts]
    layers = sorted({x for p in wished if isinstance(p, RomeParameters) for x in p.layers})
    statistics = yield from toolkit.statistics_steps(layers)
    found = yield from find_together_steps(replica.base, statistics, [s.wanted for s in starts])
    return [Member(s.job, s.began, Draft(s.plan, f)) for s, f in zip(starts, found, strict=True)]


def imported(job: RunningJob) -> bool:
    """Whether an edit was found elsewhere."""
    return job.request.get("origin") is not None


def _given_steps(replica: Replica, desk: Desk, toolkit: Toolkit, job: RunningJob) -> Steps[Member]:
    """An imported edit as it stands after the search that it has behind it: it lands as it is, or not at all."""
    began = time.monotonic()
    _check_cancelled(desk, job)
    kept = [desk.kept(job, name) for name in (parts.FACTORS, parts.BODY)]
    if None in kept:
        raise Conflict("what was imported is no longer kept: import it again.")
    factors, body = kept[0] or b"", json.loads(kept[1] or b"")
    request = EditRequest.model_validate({k: v for k, v in job.request.items() if k != "origin"})
    plan = yield from plan_steps(replica, request, toolkit)
    as_it_is = {"strengths": (1.0,), "margin": 0.0, "leads": ()}
    plan = replace(plan, parameters=plan.parameters.model_copy(update=as_it_is))
    pieces = unpack(factors, job.id, job.subject)
    size = math.sqrt(sum(float(_change(p).double().norm()) ** 2 for p in pieces))
    return Member(job, began, Draft(plan, Found(pieces, [], size, 0.0)), Given(factors, body))


def _change(piece: Piece) -> Tensor:
    return piece.change if isinstance(piece, Addend) else piece.value


def plan_steps(replica: Replica, request: EditRequest, toolkit: Toolkit) -> Steps[Plan]:
    """Resolve the hyperparameters, and the true object when the user names none: what the base model answers."""
    model = replica.base
    parameters = resolve(toolkit.recipe, request.hparams, model.layers, request.method or "rome")
    prompt, objective = fill(request.prompt, request.subject).text, request.objective
    true = request.target_true
    if true is None:
        (said,) = yield from answer_steps(model, [prompt])
        true = said.split("\n")[0].split(".")[0].split(",")[0].strip() or "?"
    new = request.target_new if objective == "write" and request.target_new else true
    if new == "?":
        raise InvalidInput("the base model gives no answer: name the true object.", "target_true")
    paraphrase = [fill(p, request.subject).text if "{}" in p else p for p in request.probes.paraphrase]
    return Plan(
        request,
        parameters,
        Question(prompt, new, true, objective),
        [Question(p, new, true, objective) for p in paraphrase],
        [Question(n.prompt, new, n.target, objective) for n in request.probes.neighborhood],
    )


def want_steps(replica: Replica, toolkit: Toolkit, plan: Plan, edit: str) -> Steps[Asked]:
    """What the editor is asked for. Refused when there is no room for the search."""
    parameters, request, model = plan.parameters, plan.request, replica.base
    contexts: list[str] = []
    if isinstance(parameters, RomeParameters):
        contexts = yield from toolkit.contexts_steps(parameters.contexts, parameters.seed)
    statement = fill(request.prompt, request.subject)
    wanted = want(
        model, contexts, statement, plan.rewrite.new, parameters, edit, plan.method, request.objective
    )
    admit("this edit", wanted.bytes(model), model.device, "use a shorter prompt or fewer contexts", "prompt")
    return wanted


# trying and landing


def _land_steps(replica: Replica, desk: Desk, toolkit: Toolkit, members: Sequence[Member]) -> Working:
    """Try them in one version, and land them when all are fit; else the fit without the others, and the others alone.

    Where none is fit, what is wrong may be what they do together: then halves are tried.
    """
    if len(members) < 2:
        for m in members:
            yield from _apart(m.job, land_alone_steps(replica, desk, toolkit, m))
            yield Ended(m.job.id)
        return
    head = replica.head()
    drafts = [m.draft for m in members]
    stand = yield from stand_steps(replica, toolkit, drafts, head)
    trials = yield from tempered_steps(replica, toolkit, drafts, stand)
    fit = [
        m for m, t in zip(members, trials, strict=True) if t.spoken or not m.draft.plan.request.guard.enabled
    ]
    if len(fit) == len(members):
        rest = yield from _apply_steps(replica, desk, toolkit, members, trials, head)
        yield from _land_steps(replica, desk, toolkit, rest)
        return
    unfit = [m for m in members if m not in fit]
    middle = len(members) // 2
    parts = [fit, *([m] for m in unfit)] if fit else [members[:middle], members[middle:]]
    for part in parts:
        yield from _land_steps(replica, desk, toolkit, part)


def _apply_steps(
    replica: Replica,
    desk: Desk,
    toolkit: Toolkit,
    members: Sequence[Member],
    trials: Sequence[Trial],
    head: int,
) -> Generator[News, None, Sequence[Member]]:
    """Land them one after another; returns those that must be tried again, because head is not what they were tried on."""
    names = [m.job.id for m in members]
    for number, (m, trial) in enumerate(zip(members, trials, strict=True)):
        others = [name for name in names if name != m.job.id]
        try:
            _check_cancelled(desk, m.job)
            yield from _apply_one_steps(replica, desk, toolkit, m, trial, head + number, others)
        except Conflict:
            yield LOOK_AGAIN
            return members[number:]
        except (Unavailable, Disagrees):
            raise
        except Exception as error:
            yield Ended(m.job.id, error)
            return members[number + 1 :]
        if m is members[-1]:
            toolkit.remember(head + len(members), trial.after.perplexity)
        yield Ended(m.job.id)
    return []


def _apply_one_steps(
    replica: Replica,
    desk: Desk,
    toolkit: Toolkit,
    member: Member,
    trial: Trial,
    head: int,
    together: Sequence[str],
) -> Steps[None]:
    plan, found = member.draft.plan, member.draft.found
    result = report(plan, found, trial, time.monotonic() - member.began, together)
    if member.given is None:
        factors = pack([p.scaled(trial.strength) for p in found.pieces])
        body = provenance(replica, toolkit, plan, trial)
    else:
        origin = {"origin": member.job.request["origin"], "supersedes": list(trial.supersedes)}
        factors, body = (
            member.given.factors,
            {**member.given.body, **origin, "fingerprint": replica.base.fingerprint},
        )
    crash_points.reach("edit.after_compute")
    yield from persist(partial(desk.apply, member.job, head, factors, body, result))


def land_alone_steps(replica: Replica, desk: Desk, toolkit: Toolkit, member: Member) -> Steps[None]:
    """Try it, stronger and stronger until it takes, and land it; or end it as evaluated or rejected."""
    job, draft = member.job, member.draft
    request = draft.plan.request
    while True:
        head = replica.head()
        stand = yield from stand_steps(replica, toolkit, [draft], head)
        trial = yield from strengthened_steps(replica, toolkit, draft, stand)
        landing = trial.passed or not request.guard.enabled
        _check_cancelled(desk, job)
        if request.dry_run or not landing:
            result = report(draft.plan, draft.found, trial, time.monotonic() - member.began)
            yield from persist(partial(desk.finish, job, "evaluated" if landing else "rejected", result))
            return
        try:
            yield from _apply_one_steps(replica, desk, toolkit, member, trial, head, ())
        except Conflict:
            yield LOOK_AGAIN
        else:
            toolkit.remember(head + 1, trial.after.perplexity)
            return


def tempered_steps(
    replica: Replica, toolkit: Toolkit, drafts: Sequence[Draft], stand: Stand
) -> Steps[list[Trial]]:
    """Several drafts in one version, each with the first of its strengths at which the model speaks beside the others, as far as
    raising those that do not take yet brings it about."""
    places, tried = [0] * len(drafts), [stand.climb(d.plan, replica.base).strengths for d in drafts]
    while True:
        strengths = [some[at] for some, at in zip(tried, places, strict=True)]
        trials = yield from trial_steps(replica, toolkit, drafts, stand, strengths)
        raised = [
            i
            for i, (d, t) in enumerate(zip(drafts, trials, strict=True))
            if d.plan.request.guard.enabled
            and not t.spoken
            and (t.passed or not t.took)
            and places[i] + 1 < len(tried[i])
        ]
        if not raised or all(not t.took for t in trials):
            return trials  # nothing to raise, or so much is wrong that it is not for want of strength
        for i in raised:
            places[i] += 1


def strengthened_steps(replica: Replica, toolkit: Toolkit, draft: Draft, stand: Stand) -> Steps[Trial]:
    """The first strength that the model speaks at, else the strongest that passes, else the first."""
    best: Trial | None = None
    for strength in stand.climb(draft.plan, replica.base).strengths:
        (trial,) = yield from trial_steps(replica, toolkit, [draft], stand, [strength])
        if best is None or trial.passed:
            best = trial
        if trial.spoken or not draft.plan.request.guard.enabled:
            break
        if not trial.passed and trial.took:
            break  # it takes, but does damage: more of it does more
    assert best is not None
    return best


# what is said of it, and kept


def report(
    plan: Plan, found: Found, trial: Trial, seconds: float, together: Sequence[str] = ()
) -> dict[str, Any]:
    """An edit's result, for people and programs: JSON. `together` are the edits that were tried in the same version."""
    before, after = trial.before, trial.after
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
        if plan.request.objective != "write":
            return _shares(plan, measured)
        log_p = [(a.new, a.true) for a in measured.answers]
        return {"ES": share_new(log_p[:1]), "PS": share_new(log_p[1:cut]), "NS": share_kept(log_p[cut:])}

    return {
        "target_true": plan.rewrite.true,
        "objective": plan.request.objective,
        "rewrite": both(0) | {"said": before.says, "says": after.says},
        "paraphrase": [both(i) for i in range(1, cut)],
        "neighborhood": [both(i) for i in range(cut, len(plan.questions))],
        "scores": {"before": scores(before), "after": scores(after)},
        "perplexity": {"before": before.perplexity, "after": after.perplexity},
        "delta_norm": found.delta_norm,
        "norm_ratio": {name_of(site): r for site, r in trial.norm_ratio.items()},
        "layers": sorted({p.layer for p in found.pieces}),
        "strength": trial.strength,
        "optimisation": {"steps": len(found.losses), "first": found.losses[0], "last": found.losses[-1]}
        if found.losses
        else None,
        "broken": trial.broken,
        "conflicts": [
            {
                "edit": r.edit,
                "prompt": r.prompt,
                "target_new": r.object,
                "probability": r.probability,
                "cosine": r.cosine,
            }
            for r in trial.conflicts
        ],
        "supersedes": list(trial.supersedes),
        "room": {str(x): left for x, left in sorted(trial.room.items())},
        "together": list(together),
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


def _shares(plan: Plan, measured: Measured) -> dict[str, float | None]:
    """Of an erasure or an amplification: the shares of its prompts that do what it is for, and of the neighbours that are right."""
    asked = list(zip(plan.questions, measured.answers, strict=True))
    cut = 1 + len(plan.paraphrase)

    def share(does: Callable[[Question, Answer], bool], some: slice) -> float | None:
        found = [does(*one) for one in asked[some]]
        return sum(found) / len(found) if found else None

    return {
        "ES": share(holds, slice(0, 1)),
        "PS": share(holds, slice(1, cut)),
        "NS": share(keeps, slice(cut, None)),
    }


def name_of(site: Site) -> str:
    """What a report calls an edited weight: its layer alone where it is the MLP's."""
    return str(site.layer) if site.part == "mlp" else f"{site.layer}.{site.part}"


_OTHERWISE = {
    "erase": {
        "efficacy": "the edit did not take: the true object is still said, or too little of its probability is gone"
    },
    "amplify": {
        "efficacy": "the edit did not take: the true object is not said, or its probability rose too little"
    },
}
_REASONS = {
    "efficacy": "the edit did not take: the new object is not more probable than the old one",
    "probability": "the new object is less probable than asked for",
    "paraphrase": "too few paraphrases say the new object",
    "neighborhood": "too many neighbourhood prompts lost their answer",
    "perplexity": "plain text became too improbable",
    "norm": "the change of the weight is too large",
    "room": "active edits have spoken for too much of the edit's key: revert some, or name other layers",
    "conflict": "an active edit says the same relation in other words",
    "broken": "other active edits would cease to hold",
}


def _reason(trial: Trial) -> str | None:
    """Why an edit was rejected, in words; None when it passed."""
    reasons = _REASONS | _OTHERWISE.get(trial.objective, {})
    failed = [
        f"{reasons[c.name]} ({c.figure:.3g}, limit {c.limit:.3g})" for c in trial.checks if not c.passed
    ]
    return "; ".join(failed) or None


def provenance(replica: Replica, toolkit: Toolkit, plan: Plan, trial: Trial) -> dict[str, Any]:
    """What the ledger keeps, so that replaying it gives the same factors (design, section 2.6)."""
    model, layers = replica.base, plan.parameters.layers
    keyed = layers if isinstance(plan.parameters, RomeParameters) else ()
    return {
        "method": plan.method,
        "objective": plan.request.objective,
        "hparams": plan.parameters.model_dump(mode="json"),
        "strength": trial.strength,
        "resolved_true": plan.rewrite.true,
        "supersedes": list(trial.supersedes),
        "statistics": {str(x): toolkit.statistics[x].digest for x in keyed},
        "corpus": toolkit.corpus.digest,
        "dtype": str(model.weight(layers[0]).dtype).removeprefix("torch."),
        "device": str(model.device),
        "libraries": {name: library_version(name) for name in ("torch", "transformers")}
        | {"python": platform.python_version()},
        "fingerprint": model.fingerprint,
    }
