"""How long jobs take, and whose they are in the log."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing

from service.jobs.job_store import RunningJob
from service.kit import metrics
from service.kit.ids import request_id
from service.kit.steps import Ended, News, Progress, Told, Working


def timed(jobs: Sequence[RunningJob], steps: Working) -> Working:
    """The same steps. What they log bears the ids of the requests that asked for the jobs.

    When a job ends well the metrics hear of it: the seconds since it began, and of an edit its part of what the steps of
    each phase took by then; between two steps the loop serves others.
    """
    began = time.monotonic()
    requests = " ".join(dict.fromkeys(job.request_id for job in jobs))
    spent: dict[str, float] = defaultdict(float)
    running = {job.id: job for job in jobs}

    def observe(job: RunningJob) -> None:
        metrics.JOB_SECONDS.labels(job.kind).observe(time.monotonic() - began)
        for phase, seconds in spent.items() if job.kind == "edit" else ():
            metrics.EDIT_SECONDS.labels(phase).observe(seconds / len(jobs))

    with closing(steps):
        while True:
            named, at = request_id.set(requests), time.monotonic()
            try:
                news: News | None = next(steps)
            except StopIteration:
                news = None
            finally:
                request_id.reset(named)
            spent[_phase(news)] += time.monotonic() - at
            if news is None:
                break
            if isinstance(news, Ended):
                ended = running.pop(news.job, None)
                if ended is not None and news.error is None:
                    observe(ended)
            yield news
    for job in running.values():
        observe(job)


def _phase(news: News | None) -> str:
    """Of a step, as the metrics call it; the last ones of an edit land it."""
    if isinstance(news, Told):
        news = news.progress
    return metrics.phase(news.phase) if isinstance(news, Progress) else "land"
