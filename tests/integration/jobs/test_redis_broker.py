"""What only the broker on Redis must do: outlive its workers, its connections, its Redis and the data in it."""

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
from service.jobs.broker import KINDS, Broker, Message
from service.jobs.redis_broker import RedisBroker
from service.kit import metrics
from tests.support import redis_server as redis_servers
from tests.support.paths import ROOT

pytestmark = pytest.mark.servers

LEASE = 0.3
LONG = 1000.0  # a lease that never runs out here
WHILE = 20  # seconds after which a test that hangs has failed

#: a worker of its own process: takes one call, says a token of it, waits for a line, says another
WORKER = """
import sys
from service.jobs.redis_broker import RedisBroker

broker = RedisBroker(sys.argv[1], lease=float(sys.argv[2]))
print("ready", flush=True)
(delivery,) = broker.take(["generate"], 1, 20)
broker.publish(delivery.job_id, "token", {"text": "first"})
print("taken", flush=True)
sys.stdin.readline()
broker.publish(delivery.job_id, "token", {"text": "late"})
print(broker.owns(delivery), flush=True)
"""


@pytest.fixture
def brokers(redis_url: str) -> Iterator[Any]:
    """Makes brokers on one Redis, which are closed at the end."""
    made = []

    def make(lease: Any = LONG, **options: Any) -> Any:
        made.append(RedisBroker(options.pop("url", redis_url), lease=lease, **options))
        return made[-1]

    yield make
    for broker in made:
        broker.close()


@pytest.fixture
def data(redis_url: str) -> Iterator[Any]:
    """A look into Redis itself."""
    with redis_client.Redis.from_url(redis_url, decode_responses=True) as client:
        yield client


@pytest.fixture
def worker(redis_url: str) -> Iterator[Any]:
    """Starts workers that are processes of their own, which are killed at the end."""
    started = []

    def start(lease: Any = LEASE) -> Any:
        command = [sys.executable, "-c", WORKER, redis_url, str(lease)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=ROOT, **pipes))
        assert started[-1].stdout.readline() == "ready\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def die(broker: Broker) -> None:
    """Leave a broker as a killed process leaves it: nobody renews, nobody gives back."""
    broker._closed.set()
    if broker._keeper:
        broker._keeper.join()


def expire(*brokers: Any) -> None:
    """Let every lease run out, at once, and everybody notice."""
    lease, brokers[0].lease = brokers[0].lease, 0
    brokers[0]._reclaim(brokers[0]._run)
    brokers[0].lease = lease
    for broker in brokers:
        broker._renew(broker._run)


def until(condition: Any) -> Any:
    deadline = time.monotonic() + WHILE
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


async def collect(broker: Broker, channel: str, after: Any = None) -> Any:
    async with asyncio.timeout(WHILE):
        return [event async for event in broker.events(channel, after)]


def heard(broker: Broker, channel: str, after: Any = None) -> Any:
    return asyncio.run(collect(broker, channel, after))


def said(events: Any) -> Any:
    return [(event.name, event.data.get("text")) for event in events]


def take(broker: Broker, count: Any = 1, limit: int = 10) -> Any:
    """Exactly so many deliveries."""
    taken = broker.take(KINDS, limit, 0)
    assert len(taken) == count
    return taken


class TestLeases:
    def test_renewed(self, brokers: Callable[..., RedisBroker]) -> None:
        """Work that lasts longer than the lease stays with the worker that does it."""
        busy, idle = brokers(LEASE), brokers(LEASE)
        busy.call("generate", {})
        (delivery,) = take(busy)
        assert idle.take(KINDS, 1, 4 * LEASE) == []
        assert busy.owns(delivery)

    @pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
    def test_dead_worker(self, brokers: Callable[..., RedisBroker], worker: Any, how: Any) -> None:
        """What a worker held that was killed or stopped goes to another, though nothing else ever arrives."""
        broker = brokers(LEASE)
        channel = broker.call("generate", {"n": 1})
        process = worker()
        assert process.stdout.readline() == "taken\n"
        process.send_signal(how)
        (delivery,) = broker.take(KINDS, 1, WHILE)
        assert (delivery.job_id, delivery.payload, delivery.deliveries) == (channel, {"n": 1}, 2)

    def test_worker_that_comes_back(self, brokers: Callable[..., RedisBroker], worker: Any) -> None:
        """A worker that was stopped for longer than its lease is not heard any more, and knows it."""
        broker = brokers(LEASE)
        channel = broker.call("generate", {})
        process = worker()
        assert process.stdout.readline() == "taken\n"
        process.send_signal(signal.SIGSTOP)
        (delivery,) = broker.take(KINDS, 1, WHILE)
        process.send_signal(signal.SIGCONT)
        answer, _ = process.communicate("go on\n", timeout=WHILE)
        assert answer == "False\n"
        broker.publish(channel, "end", {"text": "whole"}, last=True)
        broker.done(delivery)
        assert said(heard(broker, channel)) == [("token", "first"), ("restart", None), ("end", "whole")]

    def test_worker_that_dies_waiting(
        self, brokers: Callable[..., RedisBroker], worker: Any, data: Any
    ) -> None:
        """A worker that dies while it waits takes nothing with it: no delivery is counted for it."""
        process = worker()
        until(lambda: any(client["cmd"] == "xread" for client in data.client_list()))
        process.kill()
        process.wait()
        broker = brokers()
        broker.call("generate", {})
        (delivery,) = broker.take(KINDS, 1, WHILE)
        assert delivery.deliveries == 1

    def test_every_page(self, brokers: Callable[..., RedisBroker]) -> None:
        """However much a dead worker held, all of it is found."""
        dead, alive = brokers(), brokers()
        ids = [f"edit_{n:03}" for n in range(350)]
        for job_id in ids:
            dead.announce(job_id, "edit")
        take(dead, 350, limit=1000)
        expire(alive)
        assert sorted(delivery.job_id for delivery in take(alive, 350, limit=1000)) == ids

    def test_lost(self, brokers: Callable[..., RedisBroker]) -> None:
        """A worker that lost its lease is told so, it is counted, and what it still does with it has no effect."""
        before = metrics.LEASE_LOSSES._value.get()
        slow, other = brokers(), brokers()
        slow.announce("edit_1", "edit")
        (lost,) = take(slow)
        expire(other, slow)
        assert not slow.owns(lost)
        assert metrics.LEASE_LOSSES._value.get() == before + 1
        (delivery,) = take(other)
        slow.done(lost)
        slow.give_back(lost)
        assert other.owns(delivery)
        assert other.waiting("edit") == 0

    def test_first(self, brokers: Callable[..., RedisBroker]) -> None:
        """What comes back from a dead worker goes before everything that waits."""
        dead, alive = brokers(), brokers()
        first = dead.call("generate", {})
        take(dead)
        second = alive.call("generate", {})
        expire(alive)
        assert [delivery.job_id for delivery in take(alive, 2)] == [first, second]

    def test_already_answered(self, brokers: Callable[..., RedisBroker]) -> None:
        """A call whose worker died between its end and its acknowledgement is not worked on again."""
        dead, alive = brokers(), brokers()
        channel = dead.call("generate", {})
        take(dead)
        dead.publish(channel, "end", {}, last=True)
        expire(alive)
        following = alive.call("generate", {})
        assert [delivery.job_id for delivery in take(alive, 1)] == [following]
        assert not alive.knows(channel)

    def test_poison(self, brokers: Callable[..., RedisBroker]) -> None:
        """A call that kills whoever begins it is given up after three workers, with an error as its end."""
        before = metrics.CALLS_GIVEN_UP._value.get()
        broker = brokers()
        channel = broker.call("generate", {})
        for deliveries in (1, 2, 3):
            victim = brokers()
            (delivery,) = take(victim)
            assert delivery.deliveries == deliveries
            die(victim)
            expire(broker)
        take(broker, 0)
        (error,) = heard(broker, channel)
        assert (error.name, error.data) == ("error", module.DIED_TOO_OFTEN)
        assert not broker.knows(channel)
        assert metrics.CALLS_GIVEN_UP._value.get() == before + 1

    def test_jobs_are_counted_elsewhere(self, brokers: Callable[..., RedisBroker]) -> None:
        """A job is delivered more often than a call: its row counts the attempts, and ends it."""
        broker = brokers()
        broker.announce("edit_1", "edit")
        for _ in range(6):
            take(brokers())
            expire(broker)
        take(broker)

    def test_given_back(self, brokers: Callable[..., RedisBroker]) -> None:
        """What one worker gives back another takes at once, and no death is counted."""
        stopping, other = brokers(), brokers()
        channel = stopping.call("generate", {"n": 1})
        stopping.give_back(take(stopping)[0])
        (delivery,) = take(other)
        assert (delivery.job_id, delivery.payload, delivery.deliveries) == (channel, {"n": 1}, 1)

    def test_own_call_comes_back(self, brokers: Callable[..., RedisBroker]) -> None:
        """A worker that gets a call again on which it still works goes on with it, and is not asked twice."""
        broker, sweeper = brokers(), brokers()
        channel = broker.call("generate", {})
        (delivery,) = take(broker)
        broker.publish(channel, "token", {"text": "a"})
        expire(sweeper)
        take(broker, 0)
        assert broker.owns(delivery)
        broker.publish(channel, "end", {"text": "ab"}, last=True)
        broker.done(delivery)
        assert said(heard(broker, channel)) == [("token", "a"), ("end", "ab")]
        assert not broker.knows(channel)

    def test_own_call_comes_back_late(self, brokers: Callable[..., RedisBroker]) -> None:
        """When another has spoken meanwhile, a worker that gets its call again begins it anew."""
        frozen, other = brokers(), brokers()
        channel = frozen.call("generate", {})
        (lost,) = take(frozen)
        frozen.publish(channel, "token", {"text": "a"})
        expire(other)
        take(other)
        other.publish(channel, "token", {"text": "a"})
        expire(other)
        (delivery,) = take(frozen)
        assert not frozen.owns(lost)
        frozen.publish(channel, "end", {"text": "ab"}, last=True)
        frozen.done(delivery)
        whole = [("token", "a"), ("restart", None)] * 2 + [("end", "ab")]
        assert said(heard(other, channel)) == whole


class TestDeliveries:
    def test_racing(self, brokers: Callable[..., RedisBroker]) -> None:
        """Of many workers exactly one gets each delivery."""
        racers = [brokers(), brokers()]
        ids = [f"edit_{n:03}" for n in range(500)]

        def race(broker: Broker) -> Any:
            taken = []
            while batch := broker.take(KINDS, 7, 0.2):
                taken += [delivery.job_id for delivery in batch]
                for delivery in batch:
                    broker.done(delivery)
            return taken

        with ThreadPoolExecutor(4) as pool:
            racing = [pool.submit(race, racers[n % 2]) for n in range(4)]
            for job_id in ids:
                racers[0].announce(job_id, "edit")
            taken = [x for racer in racing for x in racer.result(WHILE)]
        taken += race(racers[0])
        assert sorted(taken) == ids

    def test_nothing_remains(self, brokers: Callable[..., RedisBroker], data: Any) -> None:
        """What is done leaves nothing but the clockwork behind, and a worker that goes leaves nothing at all."""
        broker = brokers()
        channel = broker.call("generate", {})
        broker.announce("edit_1", "edit")
        for _ in range(2):
            broker.done(take(broker)[0])
        broker.publish(channel, "end", {}, last=True)
        broker.forget(channel)
        broker.close()
        keys = set(data.scan_iter())
        streams = {key for key in keys if key.split(":")[1] in ("work", "first")}
        assert [data.xlen(stream) for stream in streams] == [0] * len(streams)
        assert all(data.xinfo_consumers(stream, "workers") == [] for stream in streams)
        small = {"palimpsest:bell", "palimpsest:clock", "palimpsest:epoch"}
        passing = {key for key in keys if data.ttl(key) > 0}
        assert keys - streams - passing == small

    def test_ghosts(self, brokers: Callable[..., RedisBroker], data: Any) -> None:
        """A dead worker that holds nothing is forgotten after a while; one that holds something is not before."""
        dead, alive = brokers(), brokers()
        dead.announce("edit_1", "edit")
        take(dead)
        stream = "palimpsest:work:edit"
        alive._step("prune", "", -1, stream)
        assert len(data.xinfo_consumers(stream, "workers")) == 1
        expire(alive)
        alive._step("prune", "", -1, stream)
        assert data.xinfo_consumers(stream, "workers") == []

    def test_lost_answer(self, brokers: Callable[..., RedisBroker], monkeypatch: pytest.MonkeyPatch) -> None:
        """When what Redis gave is lost on its way, the next take gets it."""
        broker = brokers()
        channel = broker.call("generate", {"n": 1})
        lose_next_answer(broker, monkeypatch)
        with pytest.raises(Unavailable):
            take(broker)
        (delivery,) = take(broker)
        assert (delivery.job_id, delivery.payload, delivery.deliveries) == (channel, {"n": 1}, 1)
        assert broker.owns(delivery)
        take(broker, 0)

    def test_wake_everywhere(self, brokers: Callable[..., RedisBroker]) -> None:
        """A wake reaches every worker, whether it waits or not."""
        api, *workers = (brokers() for _ in range(4))
        with ThreadPoolExecutor(3) as pool:
            waiting = [pool.submit(worker.take, KINDS, 1, 2 * WHILE) for worker in workers[:2]]
            time.sleep(0.1)
            api.wake()
            assert [taken.result(WHILE) for taken in waiting] == [[], []]
            assert pool.submit(workers[2].take, KINDS, 1, 2 * WHILE).result(WHILE) == []

    def test_long_silence(self, brokers: Callable[..., RedisBroker], monkeypatch: pytest.MonkeyPatch) -> None:
        """A take may wait for longer than any answer of Redis may."""
        assert 3 * module.BLOCK < module.ANSWER
        monkeypatch.setattr(module, "BLOCK", 0.2)
        monkeypatch.setattr(module, "ANSWER", 0.5)
        assert brokers().take(KINDS, 1, 1.2) == []

    def test_close(self, brokers: Callable[..., RedisBroker]) -> None:
        """Closing ends the takes and the listeners of this broker and of no other."""
        closing, other = brokers(), brokers()
        with ThreadPoolExecutor(4) as pool:
            ending = [pool.submit(closing.take, KINDS, 1, 2 * WHILE), pool.submit(heard, closing, "c")]
            going_on = [pool.submit(other.take, KINDS, 1, 2 * WHILE), pool.submit(heard, other, "c")]
            time.sleep(0.1)
            closing.close()
            assert [end.result(WHILE) for end in ending] == [[], []]
            assert not any(future.done() for future in going_on)
            other.announce("edit_1", "edit")
            other.publish("c", "end", {}, last=True)
            assert [len(end.result(WHILE)) for end in going_on] == [1, 1]


class TestNews:
    def test_taken_over(self, brokers: Callable[..., RedisBroker]) -> None:
        """After a takeover a listener is told to start again, and then hears the whole answer."""
        dead, alive = brokers(), brokers()
        channel = dead.call("generate", {})
        take(dead)
        dead.publish_all([Message(channel, "token", {"text": x}) for x in "ab"])
        expire(alive)
        take(alive)
        for text in "abc":
            alive.publish(channel, "token", {"text": text})
        alive.publish(channel, "end", {"text": "abc"}, last=True)
        events = heard(alive, channel)
        assert [event.data.get("text", event.name) for event in events] == [*"ab", "restart", *"abc", "abc"]
        assert events[2].id == events[1].id
        # whoever comes back after any of them hears the rest, and is told to start again only if that is still to come
        for n, event in enumerate(events):
            rest = events[2:] if n in (1, 2) else events[n + 1 :]
            assert heard(alive, channel, event.id) == rest

    def test_stale(self, brokers: Callable[..., RedisBroker]) -> None:
        """What a worker says of a call that was taken from it is dropped, and it learns of the loss by it."""
        stale, other = brokers(), brokers()
        channel = stale.call("generate", {})
        (lost,) = take(stale)
        lease, other.lease = other.lease, 0
        other._reclaim(other._run)
        other.lease = lease
        assert stale.owns(lost)  # it cannot know yet
        stale.publish(channel, "token", {"text": "stale"})
        assert not stale.owns(lost)
        take(other)
        stale.publish(channel, "end", {"text": "stale"}, last=True)
        other.publish(channel, "end", {"text": "right"}, last=True)
        assert said(heard(other, channel)) == [("end", "right")]

    def test_said_once(self, brokers: Callable[..., RedisBroker], monkeypatch: pytest.MonkeyPatch) -> None:
        """What is told again because the acknowledgement was lost is said once."""
        broker = brokers()
        channel = broker.call("generate", {})
        take(broker)
        token = [Message(channel, "token", {"text": "ha"})]
        broker.publish_all(token)
        lose_next_answer(broker, monkeypatch)
        with pytest.raises(Unavailable):
            broker.publish_all(token)
        broker.publish_all(token + token)
        broker.publish(channel, "end", {}, last=True)
        assert [text for _, text in said(heard(broker, channel))] == ["ha", "ha", "ha", None]

    def test_anybody_else_may_speak(self, brokers: Callable[..., RedisBroker]) -> None:
        """The API, which never took the work, may publish on its channel."""
        worker, api = brokers(), brokers()
        worker.announce("edit_1", "edit")
        take(worker)
        worker.publish("edit_1", "progress", {"text": "half"})
        api.publish("edit_1", "end", {"text": "cancelled"}, last=True)
        assert said(heard(api, "edit_1")) == [("progress", "half"), ("end", "cancelled")]

    def test_bounded(self, brokers: Callable[..., RedisBroker], data: Any) -> None:
        """A channel keeps some thousands of events, and goes away by itself: soon after its end."""
        broker = brokers()
        for _ in range(3):
            broker.publish_all([Message("c", "n", {})] * 2000)
        assert 4096 <= data.xlen("palimpsest:out:c") <= 4500
        assert 300 < data.ttl("palimpsest:out:c") <= 3600
        broker.publish("c", "end", {}, last=True)
        assert 0 < data.ttl("palimpsest:out:c") <= 300

    def test_clock(self, brokers: Callable[..., RedisBroker], data: Any) -> None:
        """Ids grow, also when the clock of Redis was set back."""
        broker = brokers()
        data.set("palimpsest:clock", 2**52)
        broker.publish_all([Message("c", "n", {}), Message("c", "end", {}, last=True)])
        assert [int(event.id) - 2**52 for event in heard(broker, "c")] == [1, 2]

    def test_cancel_reaches_the_worker(self, brokers: Callable[..., RedisBroker]) -> None:
        """A worker learns of a cancel of what it holds, though it asks Redis only every now and then."""
        api, worker = brokers(), brokers()
        channel = api.call("generate", {})
        take(worker)
        assert not worker.cancelled(channel)
        api.cancel(channel)
        until(lambda: worker.cancelled(channel))

    def test_json(self, brokers: Callable[..., RedisBroker], data: Any) -> None:
        """Everything in Redis is text: no pickle."""
        broker = brokers()
        channel = broker.call("generate", {"prompt": "é"})
        broker.publish(channel, "n", {"text": "é"})
        (_, entry), *_ = data.xrange("palimpsest:work:generate")
        assert json.loads(entry["payload"]) == {"prompt": "é"}
        (_, entry), *_ = data.xrange(f"palimpsest:out:{channel}")
        assert json.loads(entry["data"]) == {"text": "é"}


class TestEmptied:
    """Redis loses everything, at any moment."""

    def test_jobs(self, brokers: Callable[..., RedisBroker], redis_server: Any) -> None:
        """A job that waited is delivered when it is announced again."""
        broker = brokers()
        broker.announce("edit_1", "edit")
        redis_server.flush()
        take(broker, 0)
        broker.announce("edit_1", "edit")
        take(broker, 1)

    def test_calls(self, brokers: Callable[..., RedisBroker], redis_server: Any) -> None:
        """A call that waited is unknown then, and asked again."""
        broker = brokers()
        channel = broker.call("generate", {"n": 1})
        redis_server.flush()
        assert not broker.knows(channel)
        broker.call("generate", {"n": 1}, channel=channel)
        assert take(broker)[0].payload == {"n": 1}

    def test_worker_goes_on(self, brokers: Callable[..., RedisBroker], redis_server: Any) -> None:
        """A worker goes on with what it holds, and its answer is heard."""
        broker = brokers()
        channel = broker.call("generate", {})
        (delivery,) = take(broker)
        redis_server.flush()
        broker._renew(broker._run)
        assert broker.owns(delivery)
        broker.publish(channel, "end", {"text": "a"}, last=True)
        broker.done(delivery)
        assert said(heard(broker, channel)) == [("end", "a")]

    def test_asked_again(self, brokers: Callable[..., RedisBroker], redis_server: Any) -> None:
        """When the call is asked again meanwhile, and goes to another worker, that one alone is heard."""
        first, second = brokers(), brokers()
        channel = first.call("generate", {})
        (delivery,) = take(first)
        redis_server.flush()
        first.call("generate", {}, channel=channel)
        take(second)
        first._renew(first._run)
        assert not first.owns(delivery)
        first.publish(channel, "end", {"text": "first"}, last=True)
        second.publish(channel, "end", {"text": "second"}, last=True)
        assert said(heard(second, channel)) == [("end", "second")]

    def test_given_back_too_late(self, brokers: Callable[..., RedisBroker], redis_server: Any) -> None:
        """What is given back when another has been given it changes nothing."""
        first, second = brokers(), brokers()
        channel = first.call("generate", {})
        (stale,) = take(first)
        redis_server.flush()
        first.call("generate", {}, channel=channel)
        (delivery,) = take(second)
        first.give_back(stale)
        assert second.owns(delivery)
        assert second.waiting("generate") == 0
        second.publish(channel, "end", {"text": "a"}, last=True)
        assert said(heard(second, channel)) == [("end", "a")]

    def test_given_back(self, brokers: Callable[..., RedisBroker], redis_server: Any) -> None:
        """What is given back then waits again, though Redis had forgotten it."""
        broker = brokers()
        channel = broker.call("generate", {"n": 1})
        (delivery,) = take(broker)
        redis_server.flush()
        broker.give_back(delivery)
        (again,) = take(broker)
        assert (again.job_id, again.payload) == (channel, {"n": 1})

    def test_listener(self, brokers: Callable[..., RedisBroker], redis_server: Any) -> None:
        """A listener hears what is said after the loss, with ids that go on growing."""
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
        one, two = asyncio.run(asyncio.wait_for(listen(), WHILE))
        assert int(two.id) > int(one.id)

    def test_blocked_take(self, brokers: Callable[..., RedisBroker], redis_server: Any) -> None:
        """A take that waits through it hears the bells that are rung after it."""
        broker, other = brokers(), brokers()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(broker.take, KINDS, 1, WHILE)
            time.sleep(0.1)
            redis_server.flush()
            other.announce("edit_1", "edit")
            assert [delivery.job_id for delivery in waiting.result(WHILE)] == ["edit_1"]


class TestDown:
    """Redis is away for a while."""

    @pytest.fixture
    def durable(self) -> Iterator[Any]:
        with redis_servers.serving(durable=True) as server:
            yield server

    def test_restarted(self, brokers: Callable[..., RedisBroker], durable: Any) -> None:
        """A listener waits for a Redis that is restarted, and then all that was there is there."""
        broker = brokers(LEASE, url=durable.url)
        channel = broker.call("generate", {})
        broker.announce("edit_1", "edit")
        (delivery,) = broker.take(KINDS, 1, 0)
        broker.publish(channel, "token", {"text": "a"})
        with ThreadPoolExecutor(1) as pool:
            listening = pool.submit(heard, broker, channel)
            time.sleep(0.1)
            durable.stop()
            with pytest.raises(Unavailable):
                broker.publish(channel, "token", {"text": "b"})
            durable.start()
            broker.publish(channel, "token", {"text": "b"})
            broker.publish(channel, "end", {"text": "ab"}, last=True)
            assert said(listening.result(WHILE)) == [("token", "a"), ("token", "b"), ("end", "ab")]
        assert broker.owns(delivery)
        broker.done(delivery)
        assert [delivery.job_id for delivery in broker.take(KINDS, 1, 0)] == ["edit_1"]

    def test_blocked_take(self, brokers: Callable[..., RedisBroker], durable: Any) -> None:
        """A take that waits when Redis goes raises Unavailable; the next one works as soon as Redis is back."""
        broker = brokers(url=durable.url)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(broker.take, KINDS, 1, WHILE)
            time.sleep(0.1)
            durable.stop()
            with pytest.raises(Unavailable):
                waiting.result(WHILE)
        durable.start()
        broker.announce("edit_1", "edit")
        take(broker)

    @pytest.mark.parametrize(
        "ask",
        [
            lambda broker: broker.announce("edit_1", "edit"),
            lambda broker: broker.call("generate", {}),
            lambda broker: broker.knows("c"),
            lambda broker: broker.take(KINDS, 1, 0),
            lambda broker: broker.publish("c", "n", {}),
            lambda broker: broker.forget("c"),
            lambda broker: broker.cancel("c"),
            lambda broker: broker.cancelled("c"),
            lambda broker: broker.wake(),
            lambda broker: broker.waiting("edit"),
            lambda broker: broker.oldest("edit"),
            lambda broker: heard(broker, "c"),
        ],
    )
    def test_unavailable(
        self, brokers: Callable[..., RedisBroker], monkeypatch: pytest.MonkeyPatch, ask: Callable[..., Any]
    ) -> None:
        """Whatever is asked of a Redis that is not there is Unavailable, and the reason names no address."""
        monkeypatch.setattr(module, "PATIENCE", 0)
        broker = brokers(url="redis://:secret@127.0.0.1:1/0")
        with pytest.raises(Unavailable) as caught:
            ask(broker)
        assert caught.value.detail == "the queue does not answer: it cannot be reached."

    def test_silent(
        self, brokers: Callable[..., RedisBroker], monkeypatch: pytest.MonkeyPatch, durable: Any
    ) -> None:
        """A Redis that is stopped is Unavailable after one time-out, and serves again when it goes on."""
        monkeypatch.setattr(module, "ANSWER", 0.3)
        broker = brokers(url=durable.url)
        broker.announce("edit_1", "edit")
        durable.signal(signal.SIGSTOP)
        with pytest.raises(Unavailable, match="silent"):
            broker.waiting("edit")
        durable.signal(signal.SIGCONT)
        assert broker.waiting("edit") == 1

    def test_full(self, brokers: Callable[..., RedisBroker], durable: Any) -> None:
        """A Redis without memory is Unavailable, and says so."""
        broker = brokers(url=durable.url)
        with redis_client.Redis.from_url(durable.url) as client:
            client.config_set("maxmemory", 1)
            with pytest.raises(Unavailable, match="full"):
                broker.announce("edit_1", "edit")

    def test_close(self, brokers: Callable[..., RedisBroker]) -> None:
        """A broker can be closed while Redis is away."""
        brokers(url="redis://127.0.0.1:1/0").close()


def lose_next_answer(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis does what it is asked next, and its answer does not arrive."""
    run = broker._run

    def losing(args: Any) -> None:
        monkeypatch.setattr(broker, "_run", run)
        run(args=args)
        raise redis_client.exceptions.TimeoutError

    monkeypatch.setattr(broker, "_run", losing)


def test_listener_that_is_cancelled(brokers: Callable[..., RedisBroker]) -> None:
    """A listener that is cancelled in the middle leaves its connection fit for the next."""
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
    """A broker that never takes starts no thread."""
    before = threading.active_count()
    brokers().announce("edit_1", "edit")
    assert threading.active_count() == before
