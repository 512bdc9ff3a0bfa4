"""The engine's tests of deliveries, leases and shutdown, run again with the Redis broker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from service.jobs.redis_broker import RedisBroker
from tests.support import wirings
from tests.unit.service.engine.test_engine import (
    EngineHarness,
    test_a_call_that_was_taken_over_is_dropped,
    test_a_cancelled_generation_ends_and_frees_its_place,
    test_a_cancelled_job_ends_between_two_steps,
    test_a_job_that_was_taken_over_is_dropped,
    test_a_lost_call_that_comes_back_is_answered_anew,
    test_an_idle_loop_wakes_for_a_call,
    test_comparisons_end_when_cancelled_or_impossible,
    test_crash_points_are_passed_in_order,
    test_each_worker_claims_its_share_of_edits,
    test_events_of_one_step_are_one_publication,
    test_job_is_retried_after_outage,
    test_job_that_cannot_join_the_group_is_requeued,
    test_jobs_run_sequentially_and_report_progress,
    test_many_prompts_and_a_stream,
    test_requests_wait_while_the_store_is_down,
    test_running_job_survives_outage,
    test_stop_requeues_all_unfinished_grouped_jobs,
    test_stop_requeues_job_and_drains_generations,
    test_stop_requeues_running_and_preempted_job,
    test_stop_requeues_streams_when_other_workers_exist,
    test_stop_without_drain_timeout_requeues_unstarted_calls,
    test_unpublished_events_are_published_after_outage,
    test_urgent_job_preempts_running_job,
    test_waiting_edits_run_as_one_group,
    test_wakeup_without_work_polls_the_ledger,
    test_worker_receives_only_kinds_of_its_roles,
)

__all__ = [
    "test_a_call_that_was_taken_over_is_dropped",
    "test_a_cancelled_generation_ends_and_frees_its_place",
    "test_a_cancelled_job_ends_between_two_steps",
    "test_a_job_that_was_taken_over_is_dropped",
    "test_a_lost_call_that_comes_back_is_answered_anew",
    "test_an_idle_loop_wakes_for_a_call",
    "test_comparisons_end_when_cancelled_or_impossible",
    "test_crash_points_are_passed_in_order",
    "test_each_worker_claims_its_share_of_edits",
    "test_events_of_one_step_are_one_publication",
    "test_job_is_retried_after_outage",
    "test_job_that_cannot_join_the_group_is_requeued",
    "test_jobs_run_sequentially_and_report_progress",
    "test_many_prompts_and_a_stream",
    "test_requests_wait_while_the_store_is_down",
    "test_running_job_survives_outage",
    "test_stop_requeues_all_unfinished_grouped_jobs",
    "test_stop_requeues_job_and_drains_generations",
    "test_stop_requeues_running_and_preempted_job",
    "test_stop_requeues_streams_when_other_workers_exist",
    "test_stop_without_drain_timeout_requeues_unstarted_calls",
    "test_unpublished_events_are_published_after_outage",
    "test_urgent_job_preempts_running_job",
    "test_waiting_edits_run_as_one_group",
    "test_wakeup_without_work_polls_the_ledger",
    "test_worker_receives_only_kinds_of_its_roles",
]


@pytest.fixture(autouse=True)
def redis_brokers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give every engine harness of a test a Redis broker with its own prefix."""
    created: list[RedisBroker] = []

    def make_broker() -> RedisBroker:
        created.append(RedisBroker(*wirings.redis_settings(request).values()))
        return created[-1]

    monkeypatch.setattr(EngineHarness, "make_broker", staticmethod(make_broker))
    yield
    for broker in created:
        broker.close()
