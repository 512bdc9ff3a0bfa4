"""How long jobs take, and whose they are in the log."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from service.jobs.job_store import RunningJob
from service.kit.ids import request_id
from service.kit.metrics import PHASES, REGISTRY
from service.kit.steps import Ended, Progress, Steps, Told, Working, finish
from workers.job_metrics import timed


def job(kind: str = "edit") -> RunningJob:
    return RunningJob("edit_1", kind, 1, {}, "somebody", "", None, False, "req_1")


def steps(*phases: str, named: list[str] | None = None) -> Steps[None]:
    for phase in phases:
        if named is not None:
            named.append(request_id.get())
        yield Progress(phase, 1, 1)
    if named is not None:
        named.append(request_id.get())


def count(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"palimpsest_{name}_count", labels) or 0


def counted(watched: Iterator[Progress], name: str, *labels: dict[str, str]) -> list[float]:
    """How much the counts of a histogram grow while the steps run."""
    before = [count(name, **one) for one in labels]
    finish(watched)  # type: ignore[arg-type]
    return [count(name, **one) - was for one, was in zip(labels, before, strict=True)]


def test_the_steps_are_the_same() -> None:
    """Whoever runs the steps sees what they say."""
    assert [p.phase for p in timed([job()], steps("a", "b"))] == ["a", "b"]


def test_each_phase_of_an_edit_is_timed_once() -> None:
    """One edit gives one observation for each phase it had, and one for its landing, however many steps each took."""
    phases = [{"phase": phase} for phase in ("optimise", "solve", "land", "measure")]
    watched = timed([job()], steps("optimise", "optimise", "solve"))
    assert counted(watched, "edit_phase_seconds", *phases) == [1, 1, 1, 0]


def test_phases_stay_few() -> None:
    """A phase that nobody foresaw is "other": no word of a job becomes a series."""
    watched = timed([job()], steps("another edit landed first: look again"))
    assert counted(watched, "edit_phase_seconds", {"phase": "other"}) == [1]
    assert {labels["phase"] for labels in phases_seen()} <= {*PHASES, "other"}


def phases_seen() -> list[dict[str, str]]:
    found = next(f for f in REGISTRY.collect() if f.name == "palimpsest_edit_phase_seconds")
    return [sample.labels for sample in found.samples]


def test_only_edits_have_phases() -> None:
    """Of a trace only the whole is timed."""
    watched = timed([job("trace")], steps("trace"))
    before = count("edit_phase_seconds", phase="land")
    assert counted(watched, "job_seconds", {"kind": "trace"}) == [1]
    assert count("edit_phase_seconds", phase="land") == before


def test_a_job_that_does_not_end_is_not_timed() -> None:
    """What was handed back or failed says nothing of how long such a job takes."""
    before = count("job_seconds", kind="edit")
    watched = timed([job()], steps("optimise", "solve"))
    next(watched)
    watched.close()
    assert count("job_seconds", kind="edit") == before


def test_closing_reaches_the_steps() -> None:
    """A job that is put back lets go of what its steps hold."""
    closed = []

    def holding() -> Steps[None]:
        try:
            yield Progress("optimise", 0, 1)
        finally:
            closed.append(True)

    watched = timed([job()], holding())
    next(watched)
    watched.close()
    assert closed == [True]


def test_errors_pass_through() -> None:
    """What the steps raise, the engine hears."""

    def failing() -> Steps[None]:
        yield Progress("optimise", 0, 1)
        raise ValueError("odd")

    with pytest.raises(ValueError, match="odd"):
        finish(timed([job()], failing()))
    assert request_id.get() == ""


def test_the_request_is_named_during_a_step_and_only_then() -> None:
    """What a step logs bears the id of the request; between two steps the loop serves others."""
    named: list[str] = []
    for _ in timed([job()], steps("a", "b", named=named)):
        assert request_id.get() == ""
    assert named == ["req_1"] * 3


def test_jobs_that_run_together_share_the_seconds() -> None:
    """Each edit that ends well is counted once, with its part of every phase; one that ends badly is not."""

    def together() -> Working:
        yield Progress("optimise", 1, 1)
        yield Told("edit_2", Progress("solve", 1, 1))
        yield Ended("edit_1", RuntimeError())
        yield Ended("edit_2")
        yield Progress("measure", 1, 1)

    jobs = [replace(job(), id=f"edit_{i}") for i in (1, 2, 3)]
    phases = [{"phase": phase} for phase in ("optimise", "solve", "land", "measure")]
    before = [count("edit_phase_seconds", **one) for one in phases]
    assert counted(timed(jobs, together()), "job_seconds", {"kind": "edit"}) == [2]  # type: ignore[arg-type]
    assert [count("edit_phase_seconds", **one) - was for one, was in zip(phases, before, strict=True)] == [
        2,
        2,
        2,
        1,
    ]


def test_the_log_names_every_request() -> None:
    """What is logged for several jobs bears the ids of all requests that asked for them, each once."""
    seen: list[str] = []

    def together() -> Working:
        seen.append(request_id.get())
        yield Ended("edit_1")

    jobs = [replace(job(), id=f"edit_{i}", request_id=name) for i, name in enumerate("aab")]
    assert len(list(timed(jobs, together()))) == 1
    assert seen == ["a b"]
