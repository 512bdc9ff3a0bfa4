"""Which steps a kind of job takes. Each task ends its own job at the desk; what it raises, the engine reports."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

from service.editing import edits_steps
from service.jobs.broker import JOBS
from service.jobs.desk import Desk, RunningJob
from service.progress import Steps, Working, persist
from service.requests import TraceRequest
from service.serving.calls import pinned
from service.serving.replica import Replica
from service.text import Statement
from service.toolkit import Toolkit
from service.tracing.suffix import trace_steps
from workers.stopwatch import timed

Tasks = dict[str, Callable[..., Working]]


def tasks(replica: Replica, desk: Desk, toolkit: Toolkit, kinds: Collection[str] = JOBS) -> Tasks:
    """Kind of job -> the steps of one (of an edit: of several together), for those that are asked for."""

    def edit(*jobs: RunningJob) -> Working:
        return timed(jobs, edits_steps(replica, desk, jobs, toolkit))

    def trace(job: RunningJob) -> Working:
        return timed([job], traced(replica, desk, job))

    known: Tasks = {"edit": edit, "trace": trace}
    return {kind: steps for kind, steps in known.items() if kind in kinds}


def traced(replica: Replica, desk: Desk, job: RunningJob) -> Steps[None]:
    """A causal trace at the version that "head" means when the job begins."""
    request = TraceRequest.model_validate(job.request)
    version = pinned(request.version, replica.head())
    text, span = request.located()
    steps = trace_steps(
        replica.base,
        Statement(text, span),
        request.target,
        kinds=request.kinds,
        window=request.window,
        samples=request.samples,
        noise=request.noise,
        severed=request.severed,
        seed=request.seed,
        compat=request.compat,
    )
    result = yield from replica.standing(replica.weights(version), steps)
    yield from persist(partial(desk.finish, job, "done", {**result.to_json(), "version": version}))
