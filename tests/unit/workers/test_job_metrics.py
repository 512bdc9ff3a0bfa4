"""How long jobs take, and whose they are in the log."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from service.jobs.job_store import ClaimedJob
from service.kit.ids import request_id
from service.kit.metrics import EDIT_PHASES, REGISTRY
from service.kit.steps import JobFinished, JobProgress, JobSteps, Progress, Stepper, run_to_completion
from workers.job_metrics import with_job_metrics


def claimed_job(kind: str = "edit") -> ClaimedJob:
    return ClaimedJob("edit_1", kind, 1, {}, "somebody", "", None, False, "req_1")


def phase_steps(*phases: str, request_ids: list[str] | None = None) -> Stepper[None]:
    for phase in phases:
        if request_ids is not None:
            request_ids.append(request_id.get())
        yield Progress(phase, 1, 1)
    if request_ids is not None:
        request_ids.append(request_id.get())


def count(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"palimpsest_{name}_count", labels) or 0


def count_increases(steps: Iterator[Progress], name: str, *labels: dict[str, str]) -> list[float]:
    """How much the counts of a histogram grow while the steps run."""
    before = [count(name, **one) for one in labels]
    run_to_completion(steps)  # type: ignore[arg-type]
    return [count(name, **one) - was for one, was in zip(labels, before, strict=True)]


def test_the_steps_are_the_same() -> None:
    """Whoever runs the steps sees what they say."""
    assert [p.phase for p in with_job_metrics([claimed_job()], phase_steps("a", "b"))] == ["a", "b"]


def test_each_phase_of_an_edit_is_observed_once() -> None:
    """One edit gives one observation for each phase it had, and one for its landing, however many steps each took."""
    phases = [{"phase": phase} for phase in ("optimise", "solve", "land", "measure")]
    steps_with_metrics = with_job_metrics([claimed_job()], phase_steps("optimise", "optimise", "solve"))
    assert count_increases(steps_with_metrics, "edit_phase_seconds", *phases) == [1, 1, 1, 0]


def test_phases_stay_few() -> None:
    """A phase that nobody foresaw is "other": no word of a job becomes a series."""
    steps_with_metrics = with_job_metrics(
        [claimed_job()], phase_steps("another edit landed first: look again")
    )
    assert count_increases(steps_with_metrics, "edit_phase_seconds", {"phase": "other"}) == [1]
    assert {labels["phase"] for labels in phase_labels()} <= {*EDIT_PHASES, "other"}


def phase_labels() -> list[dict[str, str]]:
    metric_family = next(f for f in REGISTRY.collect() if f.name == "palimpsest_edit_phase_seconds")
    return [sample.labels for sample in metric_family.samples]


def test_only_edits_have_phases() -> None:
    """Of a trace only the whole is timed."""
    steps_with_metrics = with_job_metrics([claimed_job("trace")], phase_steps("trace"))
    before = count("edit_phase_seconds", phase="land")
    assert count_increases(steps_with_metrics, "job_seconds", {"kind": "trace"}) == [1]
    assert count("edit_phase_seconds", phase="land") == before


def test_a_job_that_does_not_end_is_not_timed() -> None:
    """What was handed back or failed says nothing of how long such a job takes."""
    before = count("job_seconds", kind="edit")
    steps_with_metrics = with_job_metrics([claimed_job()], phase_steps("optimise", "solve"))
    next(steps_with_metrics)
    steps_with_metrics.close()
    assert count("job_seconds", kind="edit") == before


def test_close_closes_the_inner_steps() -> None:
    """A job that is put back lets go of what its steps hold."""
    closed = []

    def holding() -> Stepper[None]:
        try:
            yield Progress("optimise", 0, 1)
        finally:
            closed.append(True)

    steps_with_metrics = with_job_metrics([claimed_job()], holding())
    next(steps_with_metrics)
    steps_with_metrics.close()
    assert closed == [True]


def test_errors_pass_through() -> None:
    """What the steps raise, the engine hears."""

    def failing() -> Stepper[None]:
        yield Progress("optimise", 0, 1)
        raise ValueError("odd")

    with pytest.raises(ValueError, match="odd"):
        run_to_completion(with_job_metrics([claimed_job()], failing()))
    assert request_id.get() == ""


def test_request_id_is_set_only_during_a_step() -> None:
    """What a step logs bears the id of the request; between two steps the loop serves others."""
    request_ids: list[str] = []
    for _ in with_job_metrics([claimed_job()], phase_steps("a", "b", request_ids=request_ids)):
        assert request_id.get() == ""
    assert request_ids == ["req_1"] * 3


def test_grouped_jobs_share_phase_seconds() -> None:
    """Each edit that ends well is counted once, with its part of every phase; one that ends badly is not."""

    def together() -> JobSteps:
        yield Progress("optimise", 1, 1)
        yield JobProgress("edit_2", Progress("solve", 1, 1))
        yield JobFinished("edit_1", RuntimeError())
        yield JobFinished("edit_2")
        yield Progress("measure", 1, 1)

    jobs = [replace(claimed_job(), id=f"edit_{i}") for i in (1, 2, 3)]
    phases = [{"phase": phase} for phase in ("optimise", "solve", "land", "measure")]
    before = [count("edit_phase_seconds", **one) for one in phases]
    assert count_increases(with_job_metrics(jobs, together()), "job_seconds", {"kind": "edit"}) == [2]  # type: ignore[arg-type]
    assert [count("edit_phase_seconds", **one) - was for one, was in zip(phases, before, strict=True)] == [
        2,
        2,
        2,
        1,
    ]


def test_the_log_names_every_request() -> None:
    """What is logged for several jobs bears the ids of all requests that asked for them, each once."""
    request_ids: list[str] = []

    def together() -> JobSteps:
        request_ids.append(request_id.get())
        yield JobFinished("edit_1")

    jobs = [replace(claimed_job(), id=f"edit_{i}", request_id=name) for i, name in enumerate("aab")]
    assert len(list(with_job_metrics(jobs, together()))) == 1
    assert request_ids == ["a b"]
