"""State machine test of the Redis broker against a small model, with random sequences of operations."""

from __future__ import annotations

from dataclasses import dataclass

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
from tests.support.redis_server import RedisServer

JOBS = ("edit_1", "edit_2", "edit_3")
CALLS = ("call_1", "call_2", "call_3")
STREAM = "palimpsest:leased:generate"
NEVER_EXPIRES = 1000.0  # seconds; only the rule `expire` ends leases


@dataclass(eq=False)
class LeasedCall:
    """A call that a worker holds. It has an entry in Redis unless the data of Redis was lost since."""

    worker: RedisBroker
    delivery: Delivery
    in_redis: bool = True


class BrokerMachine(RuleBasedStateMachine):
    """Three workers on one Redis. Redis may lose all data, and all leases may expire at once."""

    def __init__(self, server: RedisServer) -> None:
        super().__init__()
        self.server = server
        server.flush()
        self.workers = [RedisBroker(server.url, lease=NEVER_EXPIRES) for _ in range(3)]
        self.redis = self.workers[0]._redis
        self.waiting: dict[str, int] = {}  # queued job or call -> failed deliveries
        self.delivered_calls: set[str] = set()  # leased calls that are in Redis
        self.leased: list[LeasedCall] = []
        self.received_jobs: list[tuple[RedisBroker, Delivery]] = []

    @rule(job=st.sampled_from(JOBS))
    def notify(self, job: str) -> None:
        self.workers[0].notify(job, "edit")
        self.waiting.setdefault(job, 0)

    @rule(call=st.sampled_from(CALLS))
    def send_call(self, call: str) -> None:
        self.workers[0].send_call("generate", {"id": call}, channel=call)
        if call not in self.delivered_calls:
            self.waiting.setdefault(call, 0)

    @rule(index=st.integers(0, 2), limit=st.integers(1, 3))
    def receive(self, index: int, limit: int) -> None:
        worker = self.workers[index]
        due = {name for name in self.waiting if name in CALLS} or set(self.waiting)
        received = {delivery.job_id: delivery for delivery in worker.receive(WORK_KINDS, limit, 0)}
        dequeued = due - set(self.queued_names())
        assert set(received) <= dequeued and len(received) <= limit
        assert bool(dequeued) == bool(due)
        for name in dequeued:
            failed_deliveries = self.waiting.pop(name)
            if name in JOBS:
                assert received[name].payload == {} and not worker.holds_lease(received[name])
                self.received_jobs.append((worker, received[name]))
            else:
                self.lease(worker, name, received.get(name), failed_deliveries)
        self.renew_all_leases()

    def lease(
        self, worker: RedisBroker, name: str, delivery: Delivery | None, failed_deliveries: int
    ) -> None:
        """Record a received call. Without a delivery the worker already holds the call and continues it."""
        own = [held for held in self.leased if held.worker is worker and held.delivery.job_id == name]
        self.delivered_calls.add(name)
        self.leased = [held for held in self.leased if held.delivery.job_id != name]
        if delivery is not None:
            self.leased.append(LeasedCall(worker, delivery))
            assert delivery.deliveries == failed_deliveries + 1
            assert delivery.payload == {"id": name}
        else:
            (same,) = own
            same.in_redis = True
            self.leased.append(same)

    @precondition(lambda self: self.leased)
    @rule(data=st.data())
    def ack(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from(self.leased))
        held.worker.ack(held.delivery)
        self.leased.remove(held)
        if held.in_redis:
            self.delivered_calls.discard(held.delivery.job_id)

    @precondition(lambda self: self.leased)
    @rule(data=st.data())
    def nack(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from(self.leased))
        name = held.delivery.job_id
        held.worker.nack(held.delivery)
        self.leased.remove(held)
        self.delivered_calls.discard(name)
        self.waiting.setdefault(name, held.delivery.deliveries - 1)

    @precondition(lambda self: self.received_jobs)
    @rule(data=st.data())
    def nack_job(self, data: st.DataObject) -> None:
        """Put back a job that was received and not claimed. It is queued once, even when it was notified
        again."""
        worker, delivery = data.draw(st.sampled_from(self.received_jobs))
        worker.nack(delivery)
        self.received_jobs.remove((worker, delivery))
        self.waiting.setdefault(delivery.job_id, 0)

    @rule(index=st.integers(0, 2))
    def expire(self, index: int) -> None:
        """Expire every lease, let one worker reclaim the calls, and let all workers renew their leases."""
        worker = self.workers[index]
        worker.lease = 0
        worker._reclaim(worker._script)
        worker.lease = NEVER_EXPIRES
        for delivery in [held.delivery for held in self.leased if held.in_redis]:
            self.delivered_calls.discard(delivery.job_id)
            if delivery.deliveries == worker.max_deliveries:
                worker.delete_channel(delivery.job_id)  # deletes its error; allows sending it again
            else:
                self.waiting.setdefault(delivery.job_id, delivery.deliveries)
        self.leased = [held for held in self.leased if not held.in_redis]
        self.renew_all_leases()

    @rule()
    def flush(self) -> None:
        self.server.flush()
        self.waiting, self.delivered_calls = {}, set()
        for held in self.leased:
            held.in_redis = False

    def renew_all_leases(self) -> None:
        for worker in self.workers:
            worker._renew(worker._script)

    def queued_names(self) -> list[str]:
        with self.redis.pipeline() as pipeline:
            for kind in ("generate", "edit"):
                pipeline.zrange(f"palimpsest:queue:{kind}", 0, -1)
            return sorted(member.split(" ")[1] for members in pipeline.execute() for member in members)

    @invariant()
    def nothing_is_lost(self) -> None:
        """Everything queued is queued once, and Redis stores only the queued and the leased calls."""
        assert self.queued_names() == sorted(self.waiting)
        with self.redis.pipeline() as pipeline:
            for call in CALLS:
                pipeline.exists(f"palimpsest:call:{call}")
            stored = sum(pipeline.execute())
        assert stored == sum(name in CALLS for name in self.waiting)
        assert self.redis.xlen(STREAM) == sum(held.in_redis for held in self.leased)

    @invariant()
    def lease_and_pending_state_agree(self) -> None:
        """Every holder has its lease, and every call that is neither lost nor ended is pending."""
        assert all(held.worker.holds_lease(held.delivery) for held in self.leased)
        for call in CALLS:
            assert self.workers[0].is_pending(call) == (call in self.waiting or call in self.delivered_calls)

    def teardown(self) -> None:
        for worker in self.workers:
            worker.close()


def test_broker_against_model(redis_server: RedisServer) -> None:
    """Nothing is queued twice, nothing is lost, and no two workers hold the lease of one call."""
    checks = settings(
        max_examples=25,
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )

    class MachineOnServer(BrokerMachine):
        def __init__(self) -> None:
            super().__init__(redis_server)

    run_state_machine_as_test(MachineOnServer, settings=checks)
