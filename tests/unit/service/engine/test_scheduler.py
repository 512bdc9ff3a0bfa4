"""Tests of the scheduler: lanes, fair order, places and memory."""

from __future__ import annotations

from typing import cast

from service.engine.decoding import DecodingSequence
from service.engine.detokenizer import Detokenizer
from service.engine.scheduler import MAX_LIGHT_SEQUENCES, BatchKey, Lane, Scheduler, StepPlan
from service.schemas import Sampling

LIGHT, HEAVY = BatchKey(1, Lane.LIGHT), BatchKey(1, Lane.HEAVY)


def new_sequences(count: int, prompt_tokens: int = 3, max_new_tokens: int = 10) -> list[DecodingSequence]:
    return [
        DecodingSequence([1] * prompt_tokens, Sampling(), max_new_tokens, cast(Detokenizer, None), [])
        for _ in range(count)
    ]


def new_scheduler(max_batch_size: int = 8, kv_memory: int | None = None) -> Scheduler:
    """Return a scheduler in which each position of a sequence takes one byte."""
    return Scheduler(max_batch_size, lambda rows, positions: rows * positions, kv_memory)


def add_call(
    scheduler: Scheduler, caller: str, count: int, weights: int = 1, **shape: int
) -> list[DecodingSequence]:
    sequences = new_sequences(count, **shape)
    scheduler.add(weights, sequences, caller, cost=float(count))
    return sequences


def execute(scheduler: Scheduler, seconds: float = 0.01) -> StepPlan:
    """Schedule a step and record it as executed; no sequence ends."""
    plan = scheduler.schedule()
    if plan.prefill is not None:
        running = scheduler._lanes[plan.prefill.batch.lane].running.get(plan.prefill.batch.weights, [])
        scheduler.update(plan.prefill.batch, [*running, *plan.prefill.sequences])
        scheduler.record_time(plan.prefill.batch.lane, seconds)
    for batch in plan.decode:
        scheduler.record_time(batch.lane, seconds)
    return plan


def finish(scheduler: Scheduler, batch: BatchKey, count: int) -> None:
    scheduler.update(batch, scheduler._lanes[batch.lane].running[batch.weights][count:])


def test_few_sequences_join_the_light_lane() -> None:
    """The lane depends on how many sequences the caller has when they are prefilled."""
    scheduler = new_scheduler()
    add_call(scheduler, "few", MAX_LIGHT_SEQUENCES)
    add_call(scheduler, "many", MAX_LIGHT_SEQUENCES + 1)
    plans = [execute(scheduler), execute(scheduler)]
    groups = [plan.prefill for plan in plans if plan.prefill is not None]
    assert [(group.batch, len(group.sequences)) for group in groups] == [(LIGHT, 4), (HEAVY, 5)]


def test_one_caller_has_one_batch() -> None:
    """The waiting sequences of a single caller are prefilled together, in one lane."""
    scheduler = new_scheduler()
    for _ in range(7):
        add_call(scheduler, "a", 1)
    plan = execute(scheduler)
    assert plan.prefill is not None and len(plan.prefill.sequences) == 7
    assert execute(scheduler).decode == [HEAVY]


def test_light_lane_has_places_beside_a_full_heavy_lane() -> None:
    """A new caller is admitted and prefilled at once, although another fills the heavy lane and waits for more."""
    scheduler = new_scheduler(max_batch_size=8)
    add_call(scheduler, "flood", 64)
    for _ in range(4):
        execute(scheduler)
    assert scheduler.is_open
    assert scheduler.busy_callers() == {"flood"}
    waiting = add_call(scheduler, "other", 1)
    plan = execute(scheduler)
    assert plan.prefill is not None and plan.prefill.sequences == waiting


def test_heavy_lane_is_closed_while_sequences_wait_for_it() -> None:
    """A caller with a backlog is not admitted again, so that other workers can take its calls."""
    scheduler = new_scheduler(max_batch_size=8)
    add_call(scheduler, "a", 6)
    assert scheduler.busy_callers() == set()
    execute(scheduler)
    add_call(scheduler, "a", 6)
    execute(scheduler)
    assert scheduler.busy_callers() == {"a"}
    finish(scheduler, HEAVY, 8)
    execute(scheduler)
    assert scheduler.busy_callers() == set()


def test_free_places_are_divided_between_callers() -> None:
    """When places become free, they go to the waiting callers in turn, not to the one that came first."""
    scheduler = new_scheduler(max_batch_size=6)
    add_call(scheduler, "a", 60)
    execute(scheduler)
    add_call(scheduler, "b", 60)
    finish(scheduler, HEAVY, 6)
    plan = execute(scheduler)
    assert plan.prefill is not None
    callers = [sequence.caller for sequence in plan.prefill.sequences]
    assert sorted(callers) == ["a"] * 3 + ["b"] * 3


def test_heavy_lane_has_the_rest_of_the_time() -> None:
    """While both lanes have work, the light lane has 60 % of the time; a heavy step may take much longer."""
    scheduler = new_scheduler()
    add_call(scheduler, "flood", 8)
    add_call(scheduler, "other", 1)
    for _ in range(2):
        execute(scheduler)
    light = heavy = 0.0
    for _ in range(1000):
        plan = scheduler.schedule()
        for batch in plan.decode:
            seconds = 0.001 if batch.lane is Lane.LIGHT else 0.02
            scheduler.record_time(batch.lane, seconds)
            light, heavy = (light + seconds, heavy) if batch.lane is Lane.LIGHT else (light, heavy + seconds)
    assert 0.58 < light / (light + heavy) < 0.62


def test_heavy_lane_runs_alone_without_delay() -> None:
    """Without light work every step decodes the heavy batches."""
    scheduler = new_scheduler()
    add_call(scheduler, "flood", 8)
    execute(scheduler)
    assert all(execute(scheduler, seconds=1.0).decode == [HEAVY] for _ in range(5))


def test_light_sequences_that_do_not_fit_do_not_stop_the_heavy_lane() -> None:
    """When no light sequence can run, heavy sequences are decoded, so that memory becomes free."""
    scheduler = new_scheduler(kv_memory=100)
    add_call(scheduler, "flood", 5, prompt_tokens=5, max_new_tokens=10)
    execute(scheduler)
    add_call(scheduler, "other", 1, prompt_tokens=50, max_new_tokens=40)
    for _ in range(3):
        plan = execute(scheduler, seconds=1.0)
        assert plan.prefill is None and plan.decode == [HEAVY]
    finish(scheduler, HEAVY, 5)
    plan = execute(scheduler)
    assert plan.prefill is not None and plan.prefill.batch == LIGHT


def test_heavy_lane_leaves_memory_to_the_light_lane() -> None:
    """Heavy sequences take at most three quarters of the memory of keys and values."""
    scheduler = new_scheduler(max_batch_size=32, kv_memory=400)
    add_call(scheduler, "flood", 60, prompt_tokens=5, max_new_tokens=5)
    for _ in range(5):
        execute(scheduler)
    assert scheduler._lanes[Lane.HEAVY].running_count == 30
    add_call(scheduler, "other", 4, prompt_tokens=5, max_new_tokens=15)
    plan = execute(scheduler)
    assert plan.prefill is not None and len(plan.prefill.sequences) == 4


def test_batches_and_groups_have_one_model() -> None:
    """A group has sequences with the weights of the first waiting one; the others follow."""
    scheduler = new_scheduler()
    for number in range(6):
        add_call(scheduler, f"caller{number}", 1, weights=number % 2)
    groups = [plan.prefill for plan in (execute(scheduler), execute(scheduler)) if plan.prefill]
    assert [len(group.sequences) for group in groups] == [3, 3]
    assert [group.batch.weights for group in groups] == [0, 1]
    assert {batch.lane for batch in scheduler.batches()} == {Lane.LIGHT}


def test_sequences_are_those_that_wait_or_run() -> None:
    """A sequence is counted from its admission until it has left its batch."""
    scheduler = new_scheduler()
    running = add_call(scheduler, "a", 2)
    execute(scheduler)
    waiting = add_call(scheduler, "b", 2, weights=2)
    assert set(scheduler.sequences()) == {*running, *waiting}
    finish(scheduler, LIGHT, 1)
    assert set(scheduler.sequences()) == {running[1], *waiting}


def test_cancelled_sequences_leave_the_queue() -> None:
    """A sequence that ended while it waited is not prefilled."""
    scheduler = new_scheduler()
    for sequence in add_call(scheduler, "a", 6):
        sequence.finish_reason = "cancelled"
    assert not scheduler.schedule()
    assert not scheduler
