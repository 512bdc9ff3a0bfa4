"""How long jobs take, and whose they are in the log."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing

from service.jobs.job_store import ClaimedJob
from service.kit import metrics
from service.kit.ids import request_id
from service.kit.steps import JobFinished, JobProgress, JobSteps, JobUpdate, Progress


def with_job_metrics(jobs: Sequence[ClaimedJob], steps: JobSteps) -> JobSteps:
    """The same steps. What they log bears the ids of the requests that asked for the jobs.

    When a job ends well the metrics hear of it: the seconds since it began, and of an edit its part of what the steps of
    each phase took by then; between two steps the loop serves others.
    """
    started_at = time.monotonic()
    request_ids = " ".join(dict.fromkeys(job.request_id for job in jobs))
    seconds_by_phase: dict[str, float] = defaultdict(float)
    running = {job.id: job for job in jobs}

    def observe(job: ClaimedJob) -> None:
        metrics.JOB_SECONDS.labels(job.kind).observe(time.monotonic() - started_at)
        for phase, seconds in seconds_by_phase.items() if job.kind == "edit" else ():
            metrics.EDIT_PHASE_SECONDS.labels(phase).observe(seconds / len(jobs))

    with closing(steps):
        while True:
            context_token, step_started_at = request_id.set(request_ids), time.monotonic()
            try:
                update: JobUpdate | None = next(steps)
            except StopIteration:
                update = None
            finally:
                request_id.reset(context_token)
            seconds_by_phase[_metric_phase(update)] += time.monotonic() - step_started_at
            if update is None:
                break
            if isinstance(update, JobFinished):
                finished_job = running.pop(update.job, None)
                if finished_job is not None and update.error is None:
                    observe(finished_job)
            yield update
    for job in running.values():
        observe(job)


def _metric_phase(update: JobUpdate | None) -> str:
    """Of a step, as the metrics call it; the last ones of an edit land it."""
    if isinstance(update, JobProgress):
        update = update.progress
    return metrics.phase_label(update.phase) if isinstance(update, Progress) else "land"
