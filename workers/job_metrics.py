"""Durations of jobs and of the phases of edits, and the request ids of what jobs log."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import closing

from service.engine.job_runner import JobHandler
from service.jobs.job_store import ClaimedJob
from service.kit import metrics
from service.kit.ids import request_id
from service.kit.steps import JobReporter, Phase, Progress, Stepper, StepperResult, advance


class _MetricsReporter:
    """Passes reports on, and observes the durations of each job that ends without an error."""

    def __init__(self, reporter: JobReporter, jobs: tuple[ClaimedJob, ...]) -> None:
        self.seconds_by_phase: dict[Phase, float] = defaultdict(float)
        self._reporter = reporter
        self._started_at = time.monotonic()
        self._job_count = len(jobs)
        self._running = {job.id: job for job in jobs}
        self._ended: list[ClaimedJob] = []

    def progress(self, job_id: str, progress: Progress) -> None:
        self._reporter.progress(job_id, progress)

    def finished(self, job_id: str, error: Exception | None = None) -> None:
        job = self._running.pop(job_id, None)
        if job is not None and error is None:
            self._ended.append(job)
        self._reporter.finished(job_id, error)

    def finish_all(self) -> None:
        """Count the jobs that did not end by themselves as ended with the stepper."""
        self._ended += self._running.values()
        self._running.clear()

    def observe_ended(self) -> None:
        """Observe the jobs that ended during the last step, whose duration is in `seconds_by_phase` by now."""
        for job in self._ended:
            metrics.JOB_SECONDS.labels(job.kind).observe(time.monotonic() - self._started_at)
            if job.kind == "edit":
                for phase, seconds in self.seconds_by_phase.items():
                    metrics.EDIT_PHASE_SECONDS.labels(metrics.phase_label(phase)).observe(
                        seconds / self._job_count
                    )
        self._ended.clear()


def with_job_metrics(handler: JobHandler) -> JobHandler:
    """Return a handler with the same steps that measures them and sets the request ids of what they log.

    A job that ends without an error is observed once: the seconds since its stepper began, and for an edit its equal
    share of the seconds that the steps of each phase took. Time between steps belongs to generation and is not counted.
    """

    def run(reporter: JobReporter, *jobs: ClaimedJob) -> Stepper[None]:
        request_ids = " ".join(dict.fromkeys(job.request_id for job in jobs))
        measured = _MetricsReporter(reporter, jobs)
        with closing(handler(measured, *jobs)) as stepper:
            while True:
                context_token, started_at = request_id.set(request_ids), time.monotonic()
                try:
                    outcome = advance(stepper)
                finally:
                    request_id.reset(context_token)
                phase = Phase.COMMIT if isinstance(outcome, StepperResult) else outcome.phase
                measured.seconds_by_phase[phase] += time.monotonic() - started_at
                if isinstance(outcome, StepperResult):
                    measured.finish_all()
                measured.observe_ended()
                if isinstance(outcome, StepperResult):
                    return
                yield outcome

    return run
