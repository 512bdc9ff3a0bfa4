"""How long jobs take, and whose they are in the log."""

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
    """Records what a handler reports."""

    def __init__(self) -> None:
        self.reports: list[tuple[str, object]] = []

    def progress(self, job_id: str, progress: Progress) -> None:
        self.reports.append((job_id, progress.phase))

    def finished(self, job_id: str, error: Exception | None = None) -> None:
        self.reports.append((job_id, error))


def phase_handler(*phases: str, request_ids: list[str] | None = None) -> JobHandler:
    """A handler with one step of each phase, which records the request id in force during each step."""

    def run(_reporter: JobReporter, *_jobs: ClaimedJob) -> Stepper[None]:
        for phase in phases:
            if request_ids is not None:
                request_ids.append(request_id.get())
            yield Progress(Phase(phase), 1, 1)
        if request_ids is not None:
            request_ids.append(request_id.get())

    return run


def measured(handler: JobHandler, *jobs: ClaimedJob) -> Stepper[None]:
    """The steps of a handler with metrics, for one edit where no jobs are given."""
    return with_job_metrics(handler)(RecordingReporter(), *(jobs or (claimed_job(),)))


def count(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"palimpsest_{name}_count", labels) or 0


def count_increases(steps: Stepper[None], name: str, *labels: dict[str, str]) -> list[float]:
    """How much the counts of a histogram grow while the steps run."""
    before = [count(name, **one) for one in labels]
    run_to_completion(steps)
    return [count(name, **one) - was for one, was in zip(labels, before, strict=True)]


def test_the_steps_are_the_same() -> None:
    """Whoever runs the steps sees what they say."""
    assert [p.phase for p in measured(phase_handler("solve", "measure"))] == ["solve", "measure"]


def test_each_phase_of_an_edit_is_observed_once() -> None:
    """One edit gives one observation for each phase it had, and one for its landing, however many steps each took."""
    phases = [{"phase": phase} for phase in ("optimize", "solve", "commit", "measure")]
    steps_with_metrics = measured(phase_handler("optimize", "optimize", "solve"))
    assert count_increases(steps_with_metrics, "edit_phase_seconds", *phases) == [1, 1, 1, 0]


def test_phases_stay_few() -> None:
    """A phase that nobody foresaw is "other": no word of a job becomes a series."""
    steps_with_metrics = measured(phase_handler("retry"))
    assert count_increases(steps_with_metrics, "edit_phase_seconds", {"phase": "other"}) == [1]
    assert {labels["phase"] for labels in phase_labels()} <= {*EDIT_PHASES, "other"}


def phase_labels() -> list[dict[str, str]]:
    metric_family = next(f for f in REGISTRY.collect() if f.name == "palimpsest_edit_phase_seconds")
    return [sample.labels for sample in metric_family.samples]


def test_only_edits_have_phases() -> None:
    """Of a trace only the whole is timed."""
    steps_with_metrics = measured(phase_handler("trace"), claimed_job("trace"))
    before = count("edit_phase_seconds", phase="commit")
    assert count_increases(steps_with_metrics, "job_seconds", {"kind": "trace"}) == [1]
    assert count("edit_phase_seconds", phase="commit") == before


def test_a_job_that_does_not_end_is_not_timed() -> None:
    """What was handed back or failed says nothing of how long such a job takes."""
    before = count("job_seconds", kind="edit")
    steps_with_metrics = measured(phase_handler("optimize", "solve"))
    next(steps_with_metrics)
    steps_with_metrics.close()
    assert count("job_seconds", kind="edit") == before


def test_close_closes_the_inner_steps() -> None:
    """A job that is put back lets go of what its steps hold."""
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
    """What the steps raise, the engine hears."""

    def failing(_reporter: JobReporter, *_jobs: ClaimedJob) -> Stepper[None]:
        yield Progress(Phase.OPTIMIZE, 0, 1)
        raise ValueError("odd")

    with pytest.raises(ValueError, match="odd"):
        run_to_completion(measured(failing))
    assert request_id.get() == ""


def test_request_id_is_set_only_during_a_step() -> None:
    """What a step logs bears the id of the request; between two steps the loop serves others."""
    request_ids: list[str] = []
    for _ in measured(phase_handler("solve", "measure", request_ids=request_ids)):
        assert request_id.get() == ""
    assert request_ids == ["req_1"] * 3


def test_grouped_jobs_share_phase_seconds() -> None:
    """Each edit that ends well is counted once, with its part of every phase; one that ends badly is not."""

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
    """What is logged for several jobs bears the ids of all requests that asked for them, each once."""
    request_ids: list[str] = []

    def together(reporter: JobReporter, *_jobs: ClaimedJob) -> Stepper[None]:
        request_ids.append(request_id.get())
        reporter.finished("edit_1")
        yield Progress(Phase.COMMIT, 1, 1)

    jobs = [replace(claimed_job(), id=f"edit_{i}", request_id=name) for i, name in enumerate("aab")]
    assert len(list(measured(together, *jobs))) == 1
    assert request_ids == ["a b"]
