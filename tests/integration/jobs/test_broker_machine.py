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

from service.jobs.broker import Delivery
from service.jobs.job_kinds import WORK_KINDS
from service.jobs.redis_broker import RedisBroker

JOBS = ("edit_1", "edit_2", "edit_3")
CALLS = ("call_1", "call_2", "call_3")
STREAMS = [f"palimpsest:{where}:{kind}" for kind in ("generate", "edit") for where in ("first", "work")]
NEVER_EXPIRES = 1000.0  # leases run out only when the machine says so


@dataclass(eq=False)
class HeldDelivery:
    """Work in the hands of a worker; Redis knows of it unless it was emptied since."""

    worker: RedisBroker
    delivery: Delivery
    known_to_redis: bool = True


class BrokerMachine(RuleBasedStateMachine):
    """Three workers on one Redis that may lose everything, and whose leases may all run out at once."""

    def __init__(self, server: Any) -> None:
        super().__init__()
        self.server = server
        server.flush()
        self.workers = [RedisBroker(server.url, lease=NEVER_EXPIRES) for _ in range(3)]
        self.redis = self.workers[0]._redis
        self.waiting = {}  # what waits -> how often it was delivered to workers that died
        self.delivered_calls = set()  # calls that somebody was given and Redis knows of
        self.held = []

    @rule(job=st.sampled_from(JOBS))
    def notify(self, job: Any) -> None:
        self.workers[0].notify(job, "edit")
        self.waiting.setdefault(job, 0)

    @rule(call=st.sampled_from(CALLS))
    def send_call(self, call: Any) -> None:
        self.workers[0].send_call("generate", {"id": call}, channel=call)
        if call not in self.delivered_calls:
            self.waiting.setdefault(call, 0)

    @rule(place=st.integers(0, 2), limit=st.integers(1, 3))
    def receive(self, place: Any, limit: int) -> None:
        worker = self.workers[place]
        due = {name for name in self.waiting if name in CALLS} or set(self.waiting)
        received = {delivery.job_id: delivery for delivery in worker.take(WORK_KINDS, limit, 0)}
        dequeued = due - set(self.queued_names())
        assert set(received) <= dequeued and len(received) <= limit
        assert bool(dequeued) == bool(due)
        for name in dequeued:
            deaths = self.waiting.pop(name)
            mine = [h for h in self.held if h.worker is worker and h.delivery.job_id == name]
            if name in CALLS:
                self.delivered_calls.add(name)
                self.held = [h for h in self.held if h.delivery.job_id != name]
            if name in received:
                self.held.append(HeldDelivery(worker, received[name]))
                assert name in JOBS or received[name].deliveries == deaths + 1
                assert received[name].payload == ({"id": name} if name in CALLS else {})
            else:  # the worker is at it all along
                assert name in CALLS
                (same,) = mine
                same.known = True
                self.held.append(same)
        self.renew_all_leases()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def ack(self, data: Any) -> None:
        holding = data.draw(st.sampled_from(self.held))
        holding.worker.done(holding.delivery)
        self.held.remove(holding)
        if holding.known:
            self.delivered_calls.discard(holding.delivery.job_id)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def nack(self, data: Any) -> None:
        holding = data.draw(st.sampled_from(self.held))
        name = holding.delivery.job_id
        holding.worker.give_back(holding.delivery)
        self.held.remove(holding)
        self.delivered_calls.discard(name)
        self.waiting.setdefault(name, holding.delivery.deliveries - 1)

    @rule(place=st.integers(0, 2))
    def expire(self, place: Any) -> None:
        """Every lease runs out, one worker notices, and then all do."""
        worker = self.workers[place]
        worker.lease = 0
        worker._reclaim(worker._run)
        worker.lease = NEVER_EXPIRES
        for delivery in [holding.delivery for holding in self.held if holding.known]:
            self.delivered_calls.discard(delivery.job_id)
            if delivery.kind == "generate" and delivery.deliveries == worker.max_deliveries:
                worker.forget(delivery.job_id)  # its error, so that it can be asked again
            else:
                self.waiting.setdefault(delivery.job_id, delivery.deliveries)
        self.held = [holding for holding in self.held if not holding.known]
        self.renew_all_leases()

    @rule()
    def flush(self) -> None:
        self.server.flush()
        self.waiting, self.delivered_calls = {}, set()
        for holding in self.held:
            holding.known = False

    def renew_all_leases(self) -> None:
        for worker in self.workers:
            worker._renew(worker._script)

    def queued_names(self) -> Any:
        with self.redis.pipeline() as asked:
            for kind in ("generate", "edit"):
                asked.zrange(f"palimpsest:waiting:{kind}", 0, -1)
            return sorted(name for names in asked.execute() for name in names)

    @invariant()
    def nothing_is_lost(self) -> None:
        """What waits waits once, and Redis keeps that and what is held, nothing else."""
        assert self.queued_names() == sorted(self.waiting)
        with self.redis.pipeline() as asked:
            for stream in STREAMS:
                asked.xlen(stream)
            kept = sum(asked.execute())
        assert kept == len(self.waiting) + sum(holding.known for holding in self.held)

    @invariant()
    def lease_and_pending_state_agree(self) -> None:
        """Holders own what they hold, and every call that is neither lost nor over is known."""
        assert all(holding.worker.owns(holding.delivery) for holding in self.held)
        for call in CALLS:
            assert self.workers[0].is_pending(call) == (call in self.waiting or call in self.delivered_calls)

    def teardown(self) -> None:
        for worker in self.workers:
            worker.close()


@pytest.mark.servers
def test_broker_against_model(redis_server: Any) -> None:
    """Nothing waits twice, nothing is lost, and nobody holds a call that another was given."""
    checks = settings(
        max_examples=25,
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(lambda: BrokerMachine(redis_server), settings=checks)
