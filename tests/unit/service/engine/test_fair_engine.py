"""Tests of the engine with several callers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest

from service.engine import engine, job_runner
from service.engine.engine import EngineConfig
from service.engine.job_runner import MAX_GROUPS_PER_KIND
from service.errors import Unavailable
from service.jobs.job_store import ClaimedJob
from service.kit.steps import JobReporter, Phase, Progress, Stepper
from service.schemas import CompareRequest, GenerateRequest
from tests.unit.service.engine.test_engine import PROMPTS, TEST_CONFIG, EngineHarness, job_handler

SMALL_BATCHES = EngineConfig(max_batch_size=8, idle_timeout=0.01, cancel_poll_interval=0.0)


def generate(harness: EngineHarness, caller: str, prompts: int, tokens: int) -> str:
    request = GenerateRequest(prompts=[PROMPTS[1]] * prompts, max_new_tokens=tokens)
    payload = request.model_dump(mode="json")
    return str(harness.broker.send_call("generate", payload, caller=caller, cost=float(prompts * tokens)))


def submit(harness: EngineHarness, job_id: str, kind: str, caller: str) -> None:
    harness.jobs.add(job_id, kind)
    harness.broker.notify(job_id, kind, caller)


def has_ended(harness: EngineHarness, channel: str) -> bool:
    return bool(harness.broker._get_channel(channel).closed)


def steps_until_end(harness: EngineHarness, channel: str, limit: int = 500) -> int:
    for number in range(limit):
        if has_ended(harness, channel):
            return number
        harness.step(1)
    raise AssertionError("the call does not end")


def test_a_short_request_does_not_wait_for_a_flood() -> None:
    """A request of 2 tokens ends in a few steps, although another caller has 1,920 sequences of 40 tokens before it."""
    harness = EngineHarness(config=SMALL_BATCHES)
    flood = [generate(harness, "flood", 64, 40) for _ in range(30)]
    harness.step(20)
    other = generate(harness, "other", 1, 2)
    assert steps_until_end(harness, other) <= 10
    assert not any(has_ended(harness, channel) for channel in flood)


def test_two_floods_progress_alike() -> None:
    """Two callers with many sequences get places in turn: neither waits until the other has ended."""
    harness = EngineHarness(config=SMALL_BATCHES)
    first = [generate(harness, "a", 16, 4) for _ in range(4)]
    second = [generate(harness, "b", 16, 4) for _ in range(4)]
    while not all(has_ended(harness, channel) for channel in second):
        harness.step(1)
    ended = sum(has_ended(harness, channel) for channel in first)
    assert ended >= 3


def test_every_sequence_of_a_flood_is_answered() -> None:
    """Work of the heavy lane ends beside a caller that always has light work."""
    harness = EngineHarness(config=SMALL_BATCHES)
    flood = generate(harness, "flood", 20, 5)
    light = generate(harness, "other", 1, 5)
    for _ in range(20_000):
        harness.step(1)
        if has_ended(harness, light):
            light = generate(harness, "other", 1, 5)
        if has_ended(harness, flood):
            break
    (event,) = [harness.end_event(flood)]
    assert len(event.data["choices"]) == 20


def test_comparisons_of_one_caller_run_one_after_another() -> None:
    """A caller has one comparison at a time, so that others find a place."""
    harness = EngineHarness()
    payload = CompareRequest(prompt=PROMPTS[0], max_new_tokens=30).model_dump(mode="json")
    flood = [harness.broker.send_call("compare", payload, caller="flood") for _ in range(6)]
    harness.step(3)
    short = CompareRequest(prompt=PROMPTS[0], max_new_tokens=2).model_dump(mode="json")
    other = harness.broker.send_call("compare", short, caller="other")
    assert steps_until_end(harness, other) <= 20
    assert not any(has_ended(harness, channel) for channel in flood)


def test_jobs_of_two_callers_share_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job of another caller runs beside a longer one of its kind: after the head start each has half of the steps."""
    clock = count()
    monkeypatch.setattr(job_runner, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(job_runner, "HEAD_START", 1.0)
    harness = EngineHarness({"edit": job_handler(20)}, TEST_CONFIG)
    submit(harness, "edit_1", "edit", "a")
    submit(harness, "edit_2", "edit", "a")
    harness.step(6)
    submit(harness, "edit_3", "edit", "b")
    harness.step(12)
    steps = _last_progress(harness)
    assert "edit_2" not in steps
    assert (steps["edit_1"], steps["edit_3"]) == (11, 7)


@pytest.mark.parametrize(("flood", "kind", "least"), [("edit", "trace", 9), ("evaluation", "edit", 12)])
def test_a_job_does_not_wait_for_jobs_of_other_kinds(
    monkeypatch: pytest.MonkeyPatch, flood: str, kind: str, least: int
) -> None:
    """A caller that always has jobs, also more urgent ones, leaves another caller its share of the time."""
    clock = count()
    monkeypatch.setattr(job_runner, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    harness = EngineHarness({flood: job_handler(3), kind: job_handler(100)}, TEST_CONFIG)
    for number in range(40):
        submit(harness, f"flood_{number}", flood, "flood")
    harness.step(3)
    submit(harness, "other", kind, "other")
    harness.step(20)
    assert _last_progress(harness)["other"] >= least
    assert harness.broker.queue_depth(flood) < 40 - 1


def test_a_more_urgent_job_suspends_the_jobs_of_its_caller() -> None:
    """An edit suspends the evaluation of its caller until it has ended."""
    harness = EngineHarness({"evaluation": job_handler(10), "edit": job_handler(4)}, TEST_CONFIG)
    submit(harness, "evaluation_1", "evaluation", "a")
    harness.step(2)
    submit(harness, "edit_1", "edit", "a")
    harness.step(4)
    assert _last_progress(harness) == {"evaluation_1": 2, "edit_1": 4}
    harness.step()
    assert _last_progress(harness)["evaluation_1"] == 10


@pytest.mark.parametrize(("sequences", "share"), [(1, 0.75), (20, 0.25)])
def test_jobs_have_more_time_beside_callers_with_many_sequences(
    monkeypatch: pytest.MonkeyPatch, sequences: int, share: float
) -> None:
    """Calls have `generation_time_share` beside a job, and less while all are of callers with many sequences."""
    config = EngineConfig(
        generation_time_share=0.75,
        heavy_generation_time_share=0.25,
        generation_head_start=0.0,
        job_slice=0.0,
        heavy_job_slice=0.0,
        idle_timeout=0.01,
    )
    harness = EngineHarness({"trace": job_handler(10**6)}, config)
    now, used = [0.0], {"decode": 0.0, "job": 0.0}
    monkeypatch.setattr(engine, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def timed(name: str, seconds: float, action: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            now[0] += seconds
            used[name] += seconds
            action()

        return run

    calls, jobs = harness.engine._calls, harness.engine._jobs
    channel = generate(harness, "a", sequences, 40)
    submit(harness, "trace_1", "trace", "b")
    harness.step(2)
    monkeypatch.setattr(calls, "decode", timed("decode", 0.1, calls.decode))
    monkeypatch.setattr(jobs, "step", timed("job", 0.25, jobs.step))
    while not has_ended(harness, channel):
        harness.step(1)
    assert used["decode"] / (used["decode"] + used["job"]) == pytest.approx(share, abs=0.1)


def test_number_of_groups_is_bounded() -> None:
    """At most MAX_GROUPS_PER_KIND callers have running jobs of one kind; the next one follows."""
    harness = EngineHarness({"trace": job_handler(5)}, TEST_CONFIG)
    for number in range(MAX_GROUPS_PER_KIND + 2):
        submit(harness, f"trace_{number}", "trace", f"caller{number}")
    harness.step(MAX_GROUPS_PER_KIND)
    assert harness.broker.queue_depth("trace") == 2
    harness.step()
    assert set(_last_progress(harness).values()) == {5}


def test_stop_requeues_the_jobs_of_all_callers() -> None:
    """On stop the running jobs of all callers are requeued."""
    harness = EngineHarness({"trace": job_handler(5)}, TEST_CONFIG)
    for caller in "ab":
        submit(harness, f"trace_{caller}", "trace", caller)
    harness.step(2)
    harness.stop()
    released = {report[1] for report in harness.jobs.reports if report[0] == "released"}
    assert released == {"trace_a", "trace_b"}


@pytest.mark.parametrize("kind_of_other", ["edit", "trace"])
def test_a_job_without_memory_waits_for_the_others(kind_of_other: str) -> None:
    """A job that finds no memory beside a job of another caller runs after that one has ended. It does not fail."""
    running: list[str] = []

    def needs_all_memory(reporter: JobReporter, *jobs: ClaimedJob) -> Stepper[None]:
        running.append(jobs[0].id)
        try:
            if len(running) > 1:
                raise Unavailable("this job would take 9 GiB of memory, of which 1 are free now.")
            for number in range(5):
                reporter.progress(jobs[0].id, Progress(Phase.RUN, number + 1, 5))
                yield Progress(Phase.RUN, number + 1, 5)
        finally:
            running.remove(jobs[0].id)

    harness = EngineHarness({"edit": needs_all_memory, "trace": needs_all_memory}, TEST_CONFIG)
    submit(harness, "job_1", kind_of_other, "a")
    harness.step(2)
    submit(harness, "edit_2", "edit", "b")
    harness.step(1)
    submit(harness, "edit_2", "edit", "b")  # as `requeue` of the job store does
    harness.step(200)
    assert _last_progress(harness) == {"job_1": 5, "edit_2": 5}
    assert [report for report in harness.jobs.reports if report[0] == "failed"] == []
    assert len([report for report in harness.jobs.reports if report[0] == "released"]) == 1


def _last_progress(harness: EngineHarness) -> dict[Any, Any]:
    return {report[1]: report[2] for report in harness.jobs.reports if report[0] == "progress"}


def test_short_steps_of_a_job_run_together_beside_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that are much shorter than the slice run together until it is used; a longer one runs alone."""
    for seconds, together in ((1, 9), (8, 1), (20, 1)):
        now = [0.0]
        monkeypatch.setattr(engine, "time", SimpleNamespace(monotonic=lambda now=now: now[0]))
        log: list[str] = []

        def task(reporter: JobReporter, *jobs: ClaimedJob, seconds: int = seconds) -> Stepper[None]:
            for number in range(50):
                log.append("job")  # noqa: B023
                now[0] += seconds  # noqa: B023
                yield Progress(Phase.RUN, number + 1, 50)

        config = EngineConfig(generation_time_share=0.0, job_slice=10.0, idle_timeout=0.01)
        harness = EngineHarness({"trace": task}, config)
        generate(harness, "a", 1, 20)
        harness.step(1)
        submit(harness, "trace_1", "trace", "b")
        harness.step(1)
        assert len(log) == together
