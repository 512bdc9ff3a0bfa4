"""Tests of the Redis broker alone: failures of workers, connections and Redis, and loss of its data."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis as redis_client

from service.errors import Unavailable
from service.jobs import redis_broker as module
from service.jobs.broker import Broker, OutgoingEvent
from service.jobs.job_kinds import WORK_KINDS
from service.jobs.redis_broker import RedisBroker
from service.kit import metrics
from tests.support import redis_server as redis_servers
from tests.support.paths import ROOT

LEASE = 0.3
NEVER_EXPIRES = 1000.0  # seconds; longer than any test
TIMEOUT = 20  # seconds after which a hanging test fails

#: worker process: receives one call, publishes a token, waits for a line, and publishes another token
WORKER_SCRIPT = """
import sys
from service.jobs.redis_broker import RedisBroker

broker = RedisBroker(sys.argv[1], lease=float(sys.argv[2]))
print("ready", flush=True)
(delivery,) = broker.receive(["generate"], 1, 20)
broker.publish(delivery.job_id, "token", {"text": "first"})
print("taken", flush=True)
sys.stdin.readline()
broker.publish(delivery.job_id, "token", {"text": "late"})
print(broker.holds_lease(delivery), flush=True)
"""


@pytest.fixture
def brokers(redis_url: str) -> Iterator[Any]:
    """Return a function that creates brokers on one Redis; they are closed at the end."""
    made = []

    def make(lease: Any = NEVER_EXPIRES, **options: Any) -> Any:
        made.append(RedisBroker(options.pop("url", redis_url), lease=lease, **options))
        return made[-1]

    yield make
    for broker in made:
        broker.close()


@pytest.fixture
def redis_data(redis_url: str) -> Iterator[Any]:
    """Return a client of the Redis server."""
    with redis_client.Redis.from_url(redis_url, decode_responses=True) as client:
        yield client


@pytest.fixture
def start_worker_process(redis_url: str) -> Iterator[Any]:
    """Return a function that starts worker processes; they are killed at the end."""
    started = []

    def start(lease: Any = LEASE) -> Any:
        command = [sys.executable, "-c", WORKER_SCRIPT, redis_url, str(lease)]
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def crash(broker: RedisBroker) -> None:
    """Close a broker without releasing its leases, as when its process is killed."""
    broker._closed.set()
    if broker._lease_thread:
        broker._lease_thread.join()


def expire_leases(*brokers: Any) -> None:
    """Expire all leases, and let all the given brokers detect it."""
    lease, brokers[0].lease = brokers[0].lease, 0
    brokers[0]._reclaim(brokers[0]._script)
    brokers[0].lease = lease
    for broker in brokers:
        broker._renew(broker._script)


def wait_until(condition: Any) -> Any:
    deadline = time.monotonic() + TIMEOUT
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


async def collect(broker: Broker, channel: str, after: Any = None) -> Any:
    async with asyncio.timeout(TIMEOUT):
        return [event async for event in broker.events(channel, after)]


def collect_events(broker: Broker, channel: str, after: Any = None) -> Any:
    return asyncio.run(collect(broker, channel, after))


def name_and_text(events: Any) -> Any:
    return [(event.name, event.data.get("text")) for event in events]


def receive_exactly(broker: Broker, count: Any = 1, limit: int = 10) -> Any:
    """Receive deliveries, and assert their number."""
    taken = broker.receive(WORK_KINDS, limit, 0)
    assert len(taken) == count
    return taken


class TestLeases:
    def test_renewed(self, brokers: Callable[..., RedisBroker]) -> None:
        """A worker renews the lease of a call that takes longer than the lease."""
        busy, idle = brokers(LEASE), brokers(LEASE)
        busy.send_call("generate", {})
        (delivery,) = receive_exactly(busy)
        assert idle.receive(WORK_KINDS, 1, 4 * LEASE) == []
        assert busy.holds_lease(delivery)

    @pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
    def test_dead_worker(
        self, brokers: Callable[..., RedisBroker], start_worker_process: Any, how: Any
    ) -> None:
        """A call of a worker that was killed or stopped is redelivered when its lease expires."""
        broker = brokers(LEASE)
        channel = broker.send_call("generate", {"n": 1})
        process = start_worker_process()
        assert process.stdout.readline() == "taken\n"
        process.send_signal(how)
        (delivery,) = broker.receive(WORK_KINDS, 1, TIMEOUT)
        assert (delivery.job_id, delivery.payload, delivery.deliveries) == (channel, {"n": 1}, 2)

    def test_worker_that_resumes(
        self, brokers: Callable[..., RedisBroker], start_worker_process: Any
    ) -> None:
        """A worker that was stopped for longer than its lease loses the lease, and its later events are
        dropped."""
        broker = brokers(LEASE)
        channel = broker.send_call("generate", {})
        process = start_worker_process()
        assert process.stdout.readline() == "taken\n"
        process.send_signal(signal.SIGSTOP)
        (delivery,) = broker.receive(WORK_KINDS, 1, TIMEOUT)
        process.send_signal(signal.SIGCONT)
        answer, _ = process.communicate("go on\n", timeout=TIMEOUT)
        assert answer == "False\n"
        broker.publish(channel, "end", {"text": "whole"}, last=True)
        broker.ack(delivery)
        assert name_and_text(collect_events(broker, channel)) == [
            ("token", "first"),
            ("reset", None),
            ("end", "whole"),
        ]

    def test_worker_that_dies_while_receiving(
        self, brokers: Callable[..., RedisBroker], start_worker_process: Any, redis_data: Any
    ) -> None:
        """No delivery is counted for a worker that is killed while it waits in `receive`."""
        process = start_worker_process()
        wait_until(lambda: any(client["cmd"] == "xread" for client in redis_data.client_list()))
        process.kill()
        process.wait()
        broker = brokers()
        broker.send_call("generate", {})
        (delivery,) = broker.receive(WORK_KINDS, 1, TIMEOUT)
        assert delivery.deliveries == 1

    def test_reclaim_reads_every_page(self, brokers: Callable[..., RedisBroker]) -> None:
        """All calls of a dead worker are reclaimed, also when they fill several pages."""
        dead, alive = brokers(), brokers()
        channels = [f"call_{n:03}" for n in range(350)]
        for channel in channels:
            dead.send_call("generate", {}, channel=channel)
        receive_exactly(dead, 350, limit=1000)
        expire_leases(alive)
        assert sorted(delivery.job_id for delivery in receive_exactly(alive, 350, limit=1000)) == channels

    def test_lost_lease(self, brokers: Callable[..., RedisBroker]) -> None:
        """A worker detects that it lost a lease, and its later ack and nack have no effect. The loss is
        counted."""
        before = metrics.LEASE_LOSSES._value.get()
        slow, other = brokers(), brokers()
        slow.send_call("generate", {})
        (lost,) = receive_exactly(slow)
        expire_leases(other, slow)
        assert not slow.holds_lease(lost)
        assert metrics.LEASE_LOSSES._value.get() == before + 1
        (delivery,) = receive_exactly(other)
        slow.ack(lost)
        slow.nack(lost)
        assert other.holds_lease(delivery)
        assert other.queue_depth("generate") == 0

    def test_reclaimed_goes_first(self, brokers: Callable[..., RedisBroker]) -> None:
        """A call reclaimed from a dead worker is delivered before the calls that are queued."""
        dead, alive = brokers(), brokers()
        first = dead.send_call("generate", {})
        receive_exactly(dead)
        second = alive.send_call("generate", {})
        expire_leases(alive)
        assert [delivery.job_id for delivery in receive_exactly(alive, 2)] == [first, second]

    def test_already_answered(self, brokers: Callable[..., RedisBroker]) -> None:
        """A call whose worker died after the last event and before ack is not redelivered."""
        dead, alive = brokers(), brokers()
        channel = dead.send_call("generate", {})
        receive_exactly(dead)
        dead.publish(channel, "end", {}, last=True)
        expire_leases(alive)
        following = alive.send_call("generate", {})
        assert [delivery.job_id for delivery in receive_exactly(alive, 1)] == [following]
        assert not alive.is_pending(channel)

    def test_dead_letter(self, brokers: Callable[..., RedisBroker]) -> None:
        """A call whose worker died in three deliveries ends with an error and is not delivered again."""
        before = metrics.GENERATIONS_DEAD_LETTERED._value.get()
        broker = brokers()
        channel = broker.send_call("generate", {})
        for deliveries in (1, 2, 3):
            victim = brokers()
            (delivery,) = receive_exactly(victim)
            assert delivery.deliveries == deliveries
            crash(victim)
            expire_leases(broker)
        receive_exactly(broker, 0)
        (error,) = collect_events(broker, channel)
        assert (error.name, error.data) == ("error", module.DEAD_LETTER_ERROR)
        assert not broker.is_pending(channel)
        assert metrics.GENERATIONS_DEAD_LETTERED._value.get() == before + 1

    def test_jobs_are_not_leased(self, brokers: Callable[..., RedisBroker], redis_data: Any) -> None:
        """The id of a job leaves Redis when it is received. Only a new notification queues it again."""
        broker = brokers()
        for _ in range(6):
            broker.notify("edit_1", "edit")
            receive_exactly(brokers())
            assert not [key for key in redis_data.scan_iter() if key.endswith(":edit")]
            expire_leases(broker)
            receive_exactly(broker, 0)

    def test_nack(self, brokers: Callable[..., RedisBroker]) -> None:
        """After nack, another worker receives the call at once, and no failed delivery is counted."""
        stopping, other = brokers(), brokers()
        channel = stopping.send_call("generate", {"n": 1})
        stopping.nack(receive_exactly(stopping)[0])
        (delivery,) = receive_exactly(other)
        assert (delivery.job_id, delivery.payload, delivery.deliveries) == (channel, {"n": 1}, 1)

    def test_own_call_is_redelivered(self, brokers: Callable[..., RedisBroker]) -> None:
        """A worker continues a call that it still holds when the call is redelivered to it."""
        broker, sweeper = brokers(), brokers()
        channel = broker.send_call("generate", {})
        (delivery,) = receive_exactly(broker)
        broker.publish(channel, "token", {"text": "a"})
        expire_leases(sweeper)
        receive_exactly(broker, 0)
        assert broker.holds_lease(delivery)
        broker.publish(channel, "end", {"text": "ab"}, last=True)
        broker.ack(delivery)
        assert name_and_text(collect_events(broker, channel)) == [("token", "a"), ("end", "ab")]
        assert not broker.is_pending(channel)

    def test_own_call_is_redelivered_after_another_worker(self, brokers: Callable[..., RedisBroker]) -> None:
        """A call redelivered to a worker starts again when another worker has published events for it
        since."""
        frozen, other = brokers(), brokers()
        channel = frozen.send_call("generate", {})
        (lost,) = receive_exactly(frozen)
        frozen.publish(channel, "token", {"text": "a"})
        expire_leases(other)
        receive_exactly(other)
        other.publish(channel, "token", {"text": "a"})
        expire_leases(other)
        (delivery,) = receive_exactly(frozen)
        assert not frozen.holds_lease(lost)
        frozen.publish(channel, "end", {"text": "ab"}, last=True)
        frozen.ack(delivery)
        whole = [("token", "a"), ("reset", None)] * 2 + [("end", "ab")]
        assert name_and_text(collect_events(other, channel)) == whole


class TestDeliveries:
    def test_racing(self, brokers: Callable[..., RedisBroker]) -> None:
        """Each delivery goes to exactly one of several concurrent workers."""
        racers = [brokers(), brokers()]
        ids = [f"edit_{n:03}" for n in range(500)]

        def race(broker: Broker) -> Any:
            taken = []
            while batch := broker.receive(WORK_KINDS, 7, 0.2):
                taken += [delivery.job_id for delivery in batch]
                for delivery in batch:
                    broker.ack(delivery)
            return taken

        with ThreadPoolExecutor(4) as pool:
            racing = [pool.submit(race, racers[n % 2]) for n in range(4)]
            for job_id in ids:
                racers[0].notify(job_id, "edit")
            taken = [x for racer in racing for x in racer.result(TIMEOUT)]
        taken += race(racers[0])
        assert sorted(taken) == ids

    def test_nothing_remains(self, brokers: Callable[..., RedisBroker], redis_data: Any) -> None:
        """When all work is done and the broker is closed, Redis holds only empty streams, expiring keys, and
        the keys of the wakeup, the clock and the epoch."""
        broker = brokers()
        channel = broker.send_call("generate", {})
        broker.notify("edit_1", "edit")
        for _ in range(2):
            broker.ack(receive_exactly(broker)[0])
        broker.publish(channel, "end", {}, last=True)
        broker.delete_channel(channel)
        broker.close()
        keys = set(redis_data.scan_iter())
        streams = {key for key in keys if key.split(":")[1] == "leased"}
        assert [redis_data.xlen(stream) for stream in streams] == [0] * len(streams)
        assert all(redis_data.xinfo_consumers(stream, "workers") == [] for stream in streams)
        small = {"palimpsest:wakeup", "palimpsest:clock", "palimpsest:epoch"}
        passing = {key for key in keys if redis_data.ttl(key) > 0}
        assert keys - streams - passing == small

    def test_dead_consumers_are_pruned(self, brokers: Callable[..., RedisBroker], redis_data: Any) -> None:
        """A consumer that is idle for too long is deleted, but not while it holds a lease."""
        dead, alive = brokers(), brokers()
        dead.send_call("generate", {})
        receive_exactly(dead)
        stream = "palimpsest:leased:generate"
        alive._run_script("prune", "", -1, stream)
        assert len(redis_data.xinfo_consumers(stream, "workers")) == 1
        expire_leases(alive)
        alive._run_script("prune", "", -1, stream)
        assert redis_data.xinfo_consumers(stream, "workers") == []

    def test_lost_reply_with_a_job(
        self, brokers: Callable[..., RedisBroker], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """When a reply with a job is lost, the next `receive` returns it, and `nack` restores its place."""
        broker = brokers()
        for job in ("edit_1", "edit_2"):
            broker.notify(job, "edit")
        lose_next_reply(broker, monkeypatch)
        with pytest.raises(Unavailable):
            receive_exactly(broker, 1, limit=1)
        (delivery,) = receive_exactly(broker, 1, limit=1)
        assert delivery.job_id == "edit_1"
        broker.nack(delivery)
        assert [delivery.job_id for delivery in receive_exactly(broker, 2)] == ["edit_1", "edit_2"]

    def test_lost_reply(self, brokers: Callable[..., RedisBroker], monkeypatch: pytest.MonkeyPatch) -> None:
        """When the reply to `receive` is lost, the next `receive` returns the same call."""
        broker = brokers()
        channel = broker.send_call("generate", {"n": 1})
        lose_next_reply(broker, monkeypatch)
        with pytest.raises(Unavailable):
            receive_exactly(broker)
        (delivery,) = receive_exactly(broker)
        assert (delivery.job_id, delivery.payload, delivery.deliveries) == (channel, {"n": 1}, 1)
        assert broker.holds_lease(delivery)
        receive_exactly(broker, 0)

    def test_wake_reaches_every_worker(self, brokers: Callable[..., RedisBroker]) -> None:
        """`wake` ends the current `receive` of every worker, or else its next one."""
        api, *workers = (brokers() for _ in range(4))
        with ThreadPoolExecutor(3) as pool:
            waiting = [pool.submit(worker.receive, WORK_KINDS, 1, 2 * TIMEOUT) for worker in workers[:2]]
            time.sleep(0.1)
            api.wake()
            assert [taken.result(TIMEOUT) for taken in waiting] == [[], []]
            assert pool.submit(workers[2].receive, WORK_KINDS, 1, 2 * TIMEOUT).result(TIMEOUT) == []

    def test_receive_longer_than_socket_timeout(
        self, brokers: Callable[..., RedisBroker], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """`receive` can wait for longer than the socket timeout."""
        assert 3 * module.BLOCK_SECONDS < module.SOCKET_TIMEOUT
        monkeypatch.setattr(module, "BLOCK_SECONDS", 0.2)
        monkeypatch.setattr(module, "SOCKET_TIMEOUT", 0.5)
        assert brokers().receive(WORK_KINDS, 1, 1.2) == []

    def test_close(self, brokers: Callable[..., RedisBroker]) -> None:
        """Closing a broker ends its `receive` calls and listeners, and those of no other broker."""
        closing, other = brokers(), brokers()
        with ThreadPoolExecutor(4) as pool:
            ending = [
                pool.submit(closing.receive, WORK_KINDS, 1, 2 * TIMEOUT),
                pool.submit(collect_events, closing, "c"),
            ]
            going_on = [
                pool.submit(other.receive, WORK_KINDS, 1, 2 * TIMEOUT),
                pool.submit(collect_events, other, "c"),
            ]
            time.sleep(0.1)
            closing.close()
            assert [end.result(TIMEOUT) for end in ending] == [[], []]
            assert not any(future.done() for future in going_on)
            other.notify("edit_1", "edit")
            other.publish("c", "end", {}, last=True)
            assert [len(end.result(TIMEOUT)) for end in going_on] == [1, 1]


class TestEvents:
    def test_taken_over(self, brokers: Callable[..., RedisBroker]) -> None:
        """After another worker takes over a call, a listener receives a reset event and then the whole
        answer."""
        dead, alive = brokers(), brokers()
        channel = dead.send_call("generate", {})
        receive_exactly(dead)
        dead.publish_all([OutgoingEvent(channel, "token", {"text": x}) for x in "ab"])
        expire_leases(alive)
        receive_exactly(alive)
        for text in "abc":
            alive.publish(channel, "token", {"text": text})
        alive.publish(channel, "end", {"text": "abc"}, last=True)
        events = collect_events(alive, channel)
        assert [event.data.get("text", event.name) for event in events] == [*"ab", "reset", *"abc", "abc"]
        assert events[2].id == events[1].id
        # a listener that resumes receives the later events; the reset, event 2, has the id of event 1
        for n, event in enumerate(events):
            rest = events[2:] if n in (1, 2) else events[n + 1 :]
            assert collect_events(alive, channel, event.id) == rest

    def test_publish_without_lease_is_dropped(self, brokers: Callable[..., RedisBroker]) -> None:
        """Events of a worker that has lost the lease of a call are dropped. The worker detects the loss when
        it publishes."""
        stale, other = brokers(), brokers()
        channel = stale.send_call("generate", {})
        (lost,) = receive_exactly(stale)
        lease, other.lease = other.lease, 0
        other._reclaim(other._script)
        other.lease = lease
        assert stale.holds_lease(lost)  # the worker has not detected the loss yet
        stale.publish(channel, "token", {"text": "stale"})
        assert not stale.holds_lease(lost)
        receive_exactly(other)
        stale.publish(channel, "end", {"text": "stale"}, last=True)
        other.publish(channel, "end", {"text": "right"}, last=True)
        assert name_and_text(collect_events(other, channel)) == [("end", "right")]

    def test_repeated_publish_is_deduplicated(
        self, brokers: Callable[..., RedisBroker], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Events that are published again after a lost reply are not duplicated."""
        broker = brokers()
        channel = broker.send_call("generate", {})
        receive_exactly(broker)
        token = [OutgoingEvent(channel, "token", {"text": "ha"})]
        broker.publish_all(token)
        lose_next_reply(broker, monkeypatch)
        with pytest.raises(Unavailable):
            broker.publish_all(token)
        broker.publish_all(token + token)
        broker.publish(channel, "end", {}, last=True)
        assert [text for _, text in name_and_text(collect_events(broker, channel))] == [
            "ha",
            "ha",
            "ha",
            None,
        ]

    def test_publish_without_delivery(self, brokers: Callable[..., RedisBroker]) -> None:
        """A broker that did not receive a job, such as that of the API, can publish on the job's channel."""
        worker, api = brokers(), brokers()
        worker.notify("edit_1", "edit")
        receive_exactly(worker)
        worker.publish("edit_1", "progress", {"text": "half"})
        api.publish("edit_1", "end", {"text": "cancelled"}, last=True)
        assert name_and_text(collect_events(api, "edit_1")) == [("progress", "half"), ("end", "cancelled")]

    def test_bounded(self, brokers: Callable[..., RedisBroker], redis_data: Any) -> None:
        """A channel is trimmed to about 4,096 events and expires. It expires sooner after its last event."""
        broker = brokers()
        for _ in range(3):
            broker.publish_all([OutgoingEvent("c", "n", {})] * 2000)
        assert 4096 <= redis_data.xlen("palimpsest:events:c") <= 4500
        assert 300 < redis_data.ttl("palimpsest:events:c") <= 3600
        broker.publish("c", "end", {}, last=True)
        assert 0 < redis_data.ttl("palimpsest:events:c") <= 300

    def test_clock(self, brokers: Callable[..., RedisBroker], redis_data: Any) -> None:
        """Event ids increase even when the clock of Redis was set back."""
        broker = brokers()
        redis_data.set("palimpsest:clock", 2**52)
        broker.publish_all([OutgoingEvent("c", "n", {}), OutgoingEvent("c", "end", {}, last=True)])
        assert [int(event.id) - 2**52 for event in collect_events(broker, "c")] == [1, 2]

    def test_cancel_reaches_the_worker(self, brokers: Callable[..., RedisBroker]) -> None:
        """A worker detects the cancellation of a call that it holds, although it caches this state."""
        api, worker = brokers(), brokers()
        channel = api.send_call("generate", {})
        receive_exactly(worker)
        assert not worker.cancelled(channel)
        api.cancel(channel)
        wait_until(lambda: worker.cancelled(channel))

    def test_json(self, brokers: Callable[..., RedisBroker], redis_data: Any) -> None:
        """Payloads and event data are stored in Redis as JSON."""
        broker = brokers()
        channel = broker.send_call("generate", {"prompt": "é"})
        broker.publish(channel, "n", {"text": "é"})
        assert json.loads(redis_data.hget(f"palimpsest:call:{channel}", "payload")) == {"prompt": "é"}
        (_, entry), *_ = redis_data.xrange(f"palimpsest:events:{channel}")
        assert json.loads(entry["data"]) == {"text": "é"}


class TestDataLoss:
    """Redis loses all data."""

    def test_jobs(self, brokers: Callable[..., RedisBroker], redis_server: Any) -> None:
        """A job whose queued id was lost is delivered after it is notified again."""
        broker = brokers()
        broker.notify("edit_1", "edit")
        redis_server.flush()
        receive_exactly(broker, 0)
        broker.notify("edit_1", "edit")
        receive_exactly(broker, 1)

    def test_calls(self, brokers: Callable[..., RedisBroker], redis_server: Any) -> None:
        """A queued call that was lost is not pending, and can be sent again on its channel."""
        broker = brokers()
        channel = broker.send_call("generate", {"n": 1})
        redis_server.flush()
        assert not broker.is_pending(channel)
        broker.send_call("generate", {"n": 1}, channel=channel)
        assert receive_exactly(broker)[0].payload == {"n": 1}

    def test_worker_continues(self, brokers: Callable[..., RedisBroker], redis_server: Any) -> None:
        """A worker keeps the lease of a call that it holds, and its events are published."""
        broker = brokers()
        channel = broker.send_call("generate", {})
        (delivery,) = receive_exactly(broker)
        redis_server.flush()
        broker._renew(broker._script)
        assert broker.holds_lease(delivery)
        broker.publish(channel, "end", {"text": "a"}, last=True)
        broker.ack(delivery)
        assert name_and_text(collect_events(broker, channel)) == [("end", "a")]

    def test_call_sent_again(self, brokers: Callable[..., RedisBroker], redis_server: Any) -> None:
        """When the call is sent again and another worker receives it, only the events of that worker are
        published."""
        first, second = brokers(), brokers()
        channel = first.send_call("generate", {})
        (delivery,) = receive_exactly(first)
        redis_server.flush()
        first.send_call("generate", {}, channel=channel)
        receive_exactly(second)
        first._renew(first._script)
        assert not first.holds_lease(delivery)
        first.publish(channel, "end", {"text": "first"}, last=True)
        second.publish(channel, "end", {"text": "second"}, last=True)
        assert name_and_text(collect_events(second, channel)) == [("end", "second")]

    def test_nack_after_redelivery(self, brokers: Callable[..., RedisBroker], redis_server: Any) -> None:
        """A nack has no effect after the call was delivered to another worker."""
        first, second = brokers(), brokers()
        channel = first.send_call("generate", {})
        (stale,) = receive_exactly(first)
        redis_server.flush()
        first.send_call("generate", {}, channel=channel)
        (delivery,) = receive_exactly(second)
        first.nack(stale)
        assert second.holds_lease(delivery)
        assert second.queue_depth("generate") == 0
        second.publish(channel, "end", {"text": "a"}, last=True)
        assert name_and_text(collect_events(second, channel)) == [("end", "a")]

    def test_nack(self, brokers: Callable[..., RedisBroker], redis_server: Any) -> None:
        """A nack queues the call again, although Redis has lost it."""
        broker = brokers()
        channel = broker.send_call("generate", {"n": 1})
        (delivery,) = receive_exactly(broker)
        redis_server.flush()
        broker.nack(delivery)
        (again,) = receive_exactly(broker)
        assert (again.job_id, again.payload) == (channel, {"n": 1})

    def test_listener(self, brokers: Callable[..., RedisBroker], redis_server: Any) -> None:
        """A listener receives events that are published after the loss, with increasing ids."""
        broker = brokers()

        async def listen() -> Any:
            events = []
            async for event in broker.events("c"):
                events.append(event)
                if event.name == "n":
                    await asyncio.to_thread(redis_server.flush)
                    await asyncio.to_thread(broker.publish, "c", "end", {}, True)
            return events

        broker.publish("c", "n", {})
        one, two = asyncio.run(asyncio.wait_for(listen(), TIMEOUT))
        assert int(two.id) > int(one.id)

    def test_blocked_receive(self, brokers: Callable[..., RedisBroker], redis_server: Any) -> None:
        """A `receive` that was blocked during the loss returns a job that is notified afterwards."""
        broker, other = brokers(), brokers()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(broker.receive, WORK_KINDS, 1, TIMEOUT)
            time.sleep(0.1)
            redis_server.flush()
            other.notify("edit_1", "edit")
            assert [delivery.job_id for delivery in waiting.result(TIMEOUT)] == ["edit_1"]


class TestDown:
    """Redis is down for a while."""

    @pytest.fixture
    def durable(self) -> Iterator[Any]:
        with redis_servers.run_redis(durable=True) as server:
            yield server

    def test_restarted(self, brokers: Callable[..., RedisBroker], durable: Any) -> None:
        """After Redis restarts with its data, a listener continues, the lease is held, and the queued job is
        delivered."""
        broker = brokers(LEASE, url=durable.url)
        channel = broker.send_call("generate", {})
        broker.notify("edit_1", "edit")
        (delivery,) = broker.receive(WORK_KINDS, 1, 0)
        broker.publish(channel, "token", {"text": "a"})
        with ThreadPoolExecutor(1) as pool:
            listening = pool.submit(collect_events, broker, channel)
            time.sleep(0.1)
            durable.stop()
            with pytest.raises(Unavailable):
                broker.publish(channel, "token", {"text": "b"})
            durable.start()
            broker.publish(channel, "token", {"text": "b"})
            broker.publish(channel, "end", {"text": "ab"}, last=True)
            assert name_and_text(listening.result(TIMEOUT)) == [("token", "a"), ("token", "b"), ("end", "ab")]
        assert broker.holds_lease(delivery)
        broker.ack(delivery)
        assert [delivery.job_id for delivery in broker.receive(WORK_KINDS, 1, 0)] == ["edit_1"]

    def test_blocked_receive(self, brokers: Callable[..., RedisBroker], durable: Any) -> None:
        """`receive` raises Unavailable when Redis stops while it waits, and works again after a restart."""
        broker = brokers(url=durable.url)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(broker.receive, WORK_KINDS, 1, TIMEOUT)
            time.sleep(0.1)
            durable.stop()
            with pytest.raises(Unavailable):
                waiting.result(TIMEOUT)
        durable.start()
        broker.notify("edit_1", "edit")
        receive_exactly(broker)

    @pytest.mark.parametrize(
        "ask",
        [
            lambda broker: broker.notify("edit_1", "edit"),
            lambda broker: broker.send_call("generate", {}),
            lambda broker: broker.is_pending("c"),
            lambda broker: broker.receive(WORK_KINDS, 1, 0),
            lambda broker: broker.publish("c", "n", {}),
            lambda broker: broker.delete_channel("c"),
            lambda broker: broker.cancel("c"),
            lambda broker: broker.cancelled("c"),
            lambda broker: broker.wake(),
            lambda broker: broker.queue_depth("edit"),
            lambda broker: broker.oldest_age("edit"),
            lambda broker: collect_events(broker, "c"),
        ],
    )
    def test_unavailable(
        self, brokers: Callable[..., RedisBroker], monkeypatch: pytest.MonkeyPatch, ask: Callable[..., Any]
    ) -> None:
        """Every operation on an unreachable Redis raises Unavailable, with a detail that contains no
        address."""
        monkeypatch.setattr(module, "RECONNECT_TIMEOUT", 0)
        broker = brokers(url="redis://:secret@127.0.0.1:1/0")
        with pytest.raises(Unavailable) as caught:
            ask(broker)
        assert caught.value.detail == "the queue does not answer: it cannot be reached."

    def test_redis_does_not_respond(
        self, brokers: Callable[..., RedisBroker], monkeypatch: pytest.MonkeyPatch, durable: Any
    ) -> None:
        """An operation raises Unavailable while Redis does not respond, and succeeds after Redis resumes."""
        monkeypatch.setattr(module, "SOCKET_TIMEOUT", 0.3)
        broker = brokers(url=durable.url)
        broker.notify("edit_1", "edit")
        durable.signal(signal.SIGSTOP)
        with pytest.raises(Unavailable, match="does not respond"):
            broker.queue_depth("edit")
        durable.signal(signal.SIGCONT)
        assert broker.queue_depth("edit") == 1

    def test_full(self, brokers: Callable[..., RedisBroker], durable: Any) -> None:
        """An operation on a Redis that is out of memory raises Unavailable with this reason."""
        broker = brokers(url=durable.url)
        with redis_client.Redis.from_url(durable.url) as client:
            client.config_set("maxmemory", 1)
            with pytest.raises(Unavailable, match="full"):
                broker.notify("edit_1", "edit")

    def test_close(self, brokers: Callable[..., RedisBroker]) -> None:
        """A broker can be closed while Redis is down."""
        brokers(url="redis://127.0.0.1:1/0").close()


def lose_next_reply(broker: RedisBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Redis execute the next command and lose its reply."""
    script = broker._script

    def losing(args: Any) -> None:
        monkeypatch.setattr(broker, "_script", script)
        script(args=args)
        raise redis_client.exceptions.TimeoutError

    monkeypatch.setattr(broker, "_script", losing)


def test_listener_that_is_cancelled(brokers: Callable[..., RedisBroker]) -> None:
    """After listeners were cancelled, a new listener of the same broker receives events."""
    broker = brokers()

    async def listen() -> Any:
        for _ in range(5):
            listener = asyncio.ensure_future(collect(broker, "c"))
            await asyncio.sleep(0.02)
            listener.cancel()
            await asyncio.gather(listener, return_exceptions=True)
        await asyncio.to_thread(broker.publish, "c", "end", {}, True)
        return await collect(broker, "c")

    assert len(asyncio.run(listen())) == 1


def test_no_threads_in_an_api(brokers: Callable[..., RedisBroker]) -> None:
    """A broker that does not call `receive` starts no thread."""
    before = threading.active_count()
    brokers().notify("edit_1", "edit")
    assert threading.active_count() == before
