"""How long jobs take, and whose they are in the log."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import closing

from service import metrics
from service.ids import request_id
from service.jobs.desk import RunningJob
from service.progress import Steps


def timed(job: RunningJob, steps: Steps[None]) -> Steps[None]:
    """The same steps. What they log bears the id of the request that asked for the job.

    When they have run to their end the metrics hear of it: the seconds of the whole, and of an edit's phases those that
    its own steps took; between two steps the loop serves others.
    """
    began = time.monotonic()
    spent: dict[str, float] = defaultdict(float)
    with closing(steps):
        while True:
            named, at = request_id.set(job.request_id), time.monotonic()
            try:
                progress = next(steps)
            except StopIteration:
                spent["land"] += time.monotonic() - at
                break
            finally:
                request_id.reset(named)
            spent[metrics.phase(progress.phase)] += time.monotonic() - at
            yield progress
    metrics.JOB_SECONDS.labels(job.kind).observe(time.monotonic() - began)
    if job.kind == "edit":
        for phase, seconds in spent.items():
            metrics.EDIT_SECONDS.labels(phase).observe(seconds)
