"""Job metrics, and the request ids of log lines of jobs: workers.job_metrics."""

from __future__ import annotations

from dataclasses import replace

import pytest

from service.engine.job_runner import JobHandler
from service.jobs.job_store import ClaimedJob
from service.kit.ids import request_id
from service.kit.metrics import EDIT_PHASES, REGISTRY
from service.kit.steps import JobReporter, Phase, Progress, Stepper, run_to_completion
from workers.job_metrics import with_job_metrics


def claimed_job(kind: str = "edit") -> ClaimedJob:
    return ClaimedJob("edit_1", kind, 1, {}, "somebody", "", None, False, "req_1")


class RecordingReporter:
    """A reporter that records what a handler reports."""

    def __init__(self) -> None:
        self.reports: list[tuple[str, object]] = []

    def progress(self, job_id: str, progress: Progress) -> None:
        self.reports.append((job_id, progress.phase))

    def finished(self, job_id: str, error: Exception | None = None) -> None:
        self.reports.append((job_id, error))


def phase_handler(*phases: str, request_ids: list[str] | None = None) -> JobHandler:
    """Return a handler with one step of each phase. It records the current request id in each step."""

    def run(_reporter: JobReporter, *_jobs: ClaimedJob) -> Stepper[None]:
        for phase in phases:
            if request_ids is not None:
                request_ids.append(request_id.get())
            yield Progress(Phase(phase), 1, 1)
        if request_ids is not None:
            request_ids.append(request_id.get())

    return run


def measured(handler: JobHandler, *jobs: ClaimedJob) -> Stepper[None]:
    """Return the steps of a handler with metrics, for one edit by default."""
    return with_job_metrics(handler)(RecordingReporter(), *(jobs or (claimed_job(),)))


def count(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"palimpsest_{name}_count", labels) or 0


def count_increases(steps: Stepper[None], name: str, *labels: dict[str, str]) -> list[float]:
    """Run the steps and return how much each count of a histogram increases."""
    before = [count(name, **one) for one in labels]
    run_to_completion(steps)
    return [count(name, **one) - was for one, was in zip(labels, before, strict=True)]


def test_the_steps_are_the_same() -> None:
    """A handler with metrics yields the steps of the handler."""
    assert [p.phase for p in measured(phase_handler("solve", "measure"))] == ["solve", "measure"]


def test_each_phase_of_an_edit_is_observed_once() -> None:
    """An edit is observed once for each of its phases and once for the commit, for any number of steps."""
    phases = [{"phase": phase} for phase in ("optimize", "solve", "commit", "measure")]
    steps_with_metrics = measured(phase_handler("optimize", "optimize", "solve"))
    assert count_increases(steps_with_metrics, "edit_phase_seconds", *phases) == [1, 1, 1, 0]


def test_phases_stay_few() -> None:
    """A phase that is not an edit phase is observed as "other", so the number of series is limited."""
    steps_with_metrics = measured(phase_handler("retry"))
    assert count_increases(steps_with_metrics, "edit_phase_seconds", {"phase": "other"}) == [1]
    assert {labels["phase"] for labels in phase_labels()} <= {*EDIT_PHASES, "other"}


def phase_labels() -> list[dict[str, str]]:
    metric_family = next(f for f in REGISTRY.collect() if f.name == "palimpsest_edit_phase_seconds")
    return [sample.labels for sample in metric_family.samples]


def test_only_edits_have_phases() -> None:
    """A trace is observed as a whole, without phases."""
    steps_with_metrics = measured(phase_handler("trace"), claimed_job("trace"))
    before = count("edit_phase_seconds", phase="commit")
    assert count_increases(steps_with_metrics, "job_seconds", {"kind": "trace"}) == [1]
    assert count("edit_phase_seconds", phase="commit") == before


def test_a_job_that_does_not_end_is_not_timed() -> None:
    """A job whose steps are closed before their end is not observed."""
    before = count("job_seconds", kind="edit")
    steps_with_metrics = measured(phase_handler("optimize", "solve"))
    next(steps_with_metrics)
    steps_with_metrics.close()
    assert count("job_seconds", kind="edit") == before


def test_close_closes_the_inner_steps() -> None:
    """Closing the steps closes the steps of the handler."""
    closed = []

    def holding(_reporter: JobReporter, *_jobs: ClaimedJob) -> Stepper[None]:
        try:
            yield Progress(Phase.OPTIMIZE, 0, 1)
        finally:
            closed.append(True)

    steps_with_metrics = measured(holding)
    next(steps_with_metrics)
    steps_with_metrics.close()
    assert closed == [True]


def test_errors_pass_through() -> None:
    """An exception of the steps is raised, and the request id is reset."""

    def failing(_reporter: JobReporter, *_jobs: ClaimedJob) -> Stepper[None]:
        yield Progress(Phase.OPTIMIZE, 0, 1)
        raise ValueError("odd")

    with pytest.raises(ValueError, match="odd"):
        run_to_completion(measured(failing))
    assert request_id.get() == ""


def test_request_id_is_set_only_during_a_step() -> None:
    """The request id is set during each step and not between steps."""
    request_ids: list[str] = []
    for _ in measured(phase_handler("solve", "measure", request_ids=request_ids)):
        assert request_id.get() == ""
    assert request_ids == ["req_1"] * 3


def test_grouped_jobs_share_phase_seconds() -> None:
    """In a batch, each edit that ends without an error is observed once, with its share of each phase. An
    edit that ends with an error is not observed."""

    def together(reporter: JobReporter, *_jobs: ClaimedJob) -> Stepper[None]:
        yield Progress(Phase.OPTIMIZE, 1, 1)
        yield Progress(Phase.SOLVE, 1, 1)
        reporter.finished("edit_1", RuntimeError())
        reporter.finished("edit_2")
        yield Progress(Phase.COMMIT, 1, 1)
        yield Progress(Phase.MEASURE, 1, 1)

    jobs = [replace(claimed_job(), id=f"edit_{i}") for i in (1, 2, 3)]
    phases = [{"phase": phase} for phase in ("optimize", "solve", "commit", "measure")]
    before = [count("edit_phase_seconds", **one) for one in phases]
    assert count_increases(measured(together, *jobs), "job_seconds", {"kind": "edit"}) == [2]
    assert [count("edit_phase_seconds", **one) - was for one, was in zip(phases, before, strict=True)] == [
        2,
        2,
        2,
        1,
    ]


def test_the_log_names_every_request() -> None:
    """During the steps of a batch the request id has the ids of all requests, each once."""
    request_ids: list[str] = []

    def together(reporter: JobReporter, *_jobs: ClaimedJob) -> Stepper[None]:
        request_ids.append(request_id.get())
        reporter.finished("edit_1")
        yield Progress(Phase.COMMIT, 1, 1)

    jobs = [replace(claimed_job(), id=f"edit_{i}", request_id=name) for i, name in enumerate("aab")]
    assert len(list(measured(together, *jobs))) == 1
    assert request_ids == ["a b"]
