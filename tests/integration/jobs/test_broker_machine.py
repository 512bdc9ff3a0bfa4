"""The broker on Redis against a model of it that fits on a page, whatever comes in whatever order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from service.jobs.broker import KINDS, Delivery
from service.jobs.redis_broker import RedisBroker

JOBS = ("edit_1", "edit_2", "edit_3")
CALLS = ("call_1", "call_2", "call_3")
STREAMS = [f"palimpsest:{where}:{kind}" for kind in ("generate", "edit") for where in ("first", "work")]
LONG = 1000.0  # leases run out only when the machine says so


@dataclass(eq=False)
class Holding:
    """Work in the hands of a worker; Redis knows of it unless it was emptied since."""

    worker: RedisBroker
    delivery: Delivery
    known: bool = True


class Machine(RuleBasedStateMachine):
    """Three workers on one Redis that may lose everything, and whose leases may all run out at once."""

    def __init__(self, server: Any) -> None:
        super().__init__()
        self.server = server
        server.flush()
        self.workers = [RedisBroker(server.url, lease=LONG) for _ in range(3)]
        self.redis = self.workers[0]._redis
        self.waiting = {}  # what waits -> how often it was delivered to workers that died
        self.given = set()  # calls that somebody was given and Redis knows of
        self.held = []

    @rule(job=st.sampled_from(JOBS))
    def announce(self, job: Any) -> None:
        self.workers[0].announce(job, "edit")
        self.waiting.setdefault(job, 0)

    @rule(call=st.sampled_from(CALLS))
    def call(self, call: Any) -> None:
        self.workers[0].call("generate", {"id": call}, channel=call)
        if call not in self.given:
            self.waiting.setdefault(call, 0)

    @rule(place=st.integers(0, 2), limit=st.integers(1, 3))
    def take(self, place: Any, limit: int) -> None:
        worker = self.workers[place]
        due = {name for name in self.waiting if name in CALLS} or set(self.waiting)
        taken = {delivery.job_id: delivery for delivery in worker.take(KINDS, limit, 0)}
        gone = due - set(self.still_waiting())
        assert set(taken) <= gone and len(taken) <= limit
        assert bool(gone) == bool(due)
        for name in gone:
            deaths = self.waiting.pop(name)
            mine = [h for h in self.held if h.worker is worker and h.delivery.job_id == name]
            if name in CALLS:
                self.given.add(name)
                self.held = [h for h in self.held if h.delivery.job_id != name]
            if name in taken:
                self.held.append(Holding(worker, taken[name]))
                assert name in JOBS or taken[name].deliveries == deaths + 1
                assert taken[name].payload == ({"id": name} if name in CALLS else {})
            else:  # the worker is at it all along
                assert name in CALLS
                (same,) = mine
                same.known = True
                self.held.append(same)
        self.everybody_looks()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def done(self, data: Any) -> None:
        holding = data.draw(st.sampled_from(self.held))
        holding.worker.done(holding.delivery)
        self.held.remove(holding)
        if holding.known:
            self.given.discard(holding.delivery.job_id)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_back(self, data: Any) -> None:
        holding = data.draw(st.sampled_from(self.held))
        name = holding.delivery.job_id
        holding.worker.give_back(holding.delivery)
        self.held.remove(holding)
        self.given.discard(name)
        self.waiting.setdefault(name, holding.delivery.deliveries - 1)

    @rule(place=st.integers(0, 2))
    def expire(self, place: Any) -> None:
        """Every lease runs out, one worker notices, and then all do."""
        worker = self.workers[place]
        worker.lease = 0
        worker._reclaim(worker._run)
        worker.lease = LONG
        for delivery in [holding.delivery for holding in self.held if holding.known]:
            self.given.discard(delivery.job_id)
            if delivery.kind == "generate" and delivery.deliveries == worker.max_deliveries:
                worker.forget(delivery.job_id)  # its error, so that it can be asked again
            else:
                self.waiting.setdefault(delivery.job_id, delivery.deliveries)
        self.held = [holding for holding in self.held if not holding.known]
        self.everybody_looks()

    @rule()
    def flush(self) -> None:
        self.server.flush()
        self.waiting, self.given = {}, set()
        for holding in self.held:
            holding.known = False

    def everybody_looks(self) -> None:
        for worker in self.workers:
            worker._renew(worker._run)

    def still_waiting(self) -> Any:
        with self.redis.pipeline() as asked:
            for kind in ("generate", "edit"):
                asked.zrange(f"palimpsest:waiting:{kind}", 0, -1)
            return sorted(name for names in asked.execute() for name in names)

    @invariant()
    def nothing_is_lost(self) -> None:
        """What waits waits once, and Redis keeps that and what is held, nothing else."""
        assert self.still_waiting() == sorted(self.waiting)
        with self.redis.pipeline() as asked:
            for stream in STREAMS:
                asked.xlen(stream)
            kept = sum(asked.execute())
        assert kept == len(self.waiting) + sum(holding.known for holding in self.held)

    @invariant()
    def everybody_knows(self) -> None:
        """Holders own what they hold, and every call that is neither lost nor over is known."""
        assert all(holding.worker.owns(holding.delivery) for holding in self.held)
        for call in CALLS:
            assert self.workers[0].knows(call) == (call in self.waiting or call in self.given)

    def teardown(self) -> None:
        for worker in self.workers:
            worker.close()


@pytest.mark.servers
def test_machine(redis_server: Any) -> None:
    """Nothing waits twice, nothing is lost, and nobody holds a call that another was given."""
    checks = settings(
        max_examples=25,
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(lambda: Machine(redis_server), settings=checks)
