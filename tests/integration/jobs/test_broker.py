"""Tests that every implementation of the broker passes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from service.jobs.broker import Broker, CallerFilter, Delivery, Event, OutgoingEvent
from service.jobs.job_kinds import WORK_KINDS
from service.jobs.memory_broker import MemoryBroker
from service.jobs.redis_broker import RedisBroker

TIMEOUT = 20  # seconds after which a hanging test fails


@pytest.fixture(params=["memory", "redis"])
def broker(request: Any) -> Iterator[Any]:
    broker: Broker = MemoryBroker()
    if request.param == "redis":
        broker = RedisBroker(request.getfixturevalue("redis_url"))
    yield broker
    broker.close()


async def collect(broker: Broker, channel: str, after: Any = None) -> Any:
    async with asyncio.timeout(TIMEOUT):
        return [event async for event in broker.events(channel, after)]


def collect_events(broker: Broker, channel: str, after: Any = None) -> Any:
    return asyncio.run(collect(broker, channel, after))


def name_and_data(events: Any) -> Any:
    return [(event.name, event.data) for event in events]


def start_thread(work: Any) -> Any:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def callers_of(deliveries: list[Delivery]) -> list[str]:
    return [delivery.caller for delivery in deliveries]


class TestFairness:
    """The order between callers. `tests/unit/service/kit/test_fair_queue.py` tests the order itself."""

    @pytest.mark.parametrize("kind", ["generate", "edit"])
    def test_flood_does_not_delay_another_caller(self, broker: Broker, kind: str) -> None:
        """A caller's first item is received before the second one of a caller that has many waiting."""
        for number in range(120):
            enqueue(broker, kind, f"a{number}", "a")
        received = broker.receive([kind], 3, 0)
        enqueue(broker, kind, "b0", "b")
        received = broker.receive([kind], 2, 0)
        assert sorted(callers_of(received)) == ["a", "b"]

    @pytest.mark.parametrize("kind", ["generate", "edit"])
    def test_costs_divide_the_service(self, broker: Broker, kind: str) -> None:
        """A caller whose items cost a third is served three times as many."""
        for number in range(12):
            enqueue(broker, kind, f"a{number}", "a", cost=3.0)
            enqueue(broker, kind, f"b{number}", "b", cost=1.0)
        received = callers_of(broker.receive([kind], 12, 0))
        assert (received.count("a"), received.count("b")) == (3, 9)

    def test_filter_of_callers(self, broker: Broker) -> None:
        """Work of excluded callers stays queued, by kind, also behind many items. `only` receives that of one
        caller."""
        for number in range(230):
            broker.notify(f"edit_a{number}", "edit", "a")
        broker.notify("edit_b", "edit", "b")
        broker.notify("trace_a", "trace", "a")
        only_edits = CallerFilter({"edit": ["a"]})
        assert callers_of(broker.receive(["edit"], 5, 0, only_edits)) == ["b"]
        assert [d.job_id for d in broker.receive(["edit", "trace"], 5, 0, only_edits)] == ["trace_a"]
        assert broker.receive(["edit"], 5, 0, CallerFilter(only="b")) == []
        assert callers_of(broker.receive(["edit"], 2, 0, CallerFilter(only="a"))) == ["a", "a"]
        assert broker.queue_depth("edit") == broker.queue_depth("edit", "a") == 228
        assert broker.queue_depth("edit", "b") == 0

    @pytest.mark.parametrize("kind", ["generate", "edit"])
    def test_nack_keeps_the_place_and_the_cost(self, broker: Broker, kind: str) -> None:
        """A returned delivery is received before all others, with its caller and its cost."""
        for caller in "ab":
            for number in range(3):
                enqueue(broker, kind, f"{caller}{number}", caller, cost=2.5)
        first = broker.receive([kind], 4, 0)
        for delivery in first:
            broker.nack(delivery)
        again = broker.receive([kind], 4, 0)
        assert {(d.job_id, d.caller, d.cost) for d in again} == {(d.job_id, d.caller, d.cost) for d in first}
        if kind == "generate":
            assert {d.cost for d in again} == {2.5}

    def test_filter_while_waiting(self, broker: Broker) -> None:
        """A `receive` that waits is not ended by work of an excluded caller, and is by that of another."""
        received: list[Delivery] = []
        excluded = CallerFilter({"generate": ["a"]})
        thread = start_thread(lambda: received.extend(broker.receive(["generate"], 1, TIMEOUT, excluded)))
        broker.send_call("generate", {}, caller="a")
        broker.send_call("generate", {}, caller="b")
        thread.join(TIMEOUT)
        assert callers_of(received) == ["b"]


def enqueue(broker: Broker, kind: str, name: str, caller: str, cost: float = 1.0) -> None:
    if kind == "generate":
        broker.send_call(kind, {}, "", f"call_{name}", caller, cost)
    else:
        broker.notify(f"edit_{name}", kind, caller, cost)


class TestDeliveries:
    def test_nothing(self, broker: Broker) -> None:
        """With timeout 0, `receive` on an empty queue returns at once."""
        assert broker.receive(WORK_KINDS, 10, 0) == []

    def test_notification(self, broker: Broker) -> None:
        """A notified job is delivered by its id, without a payload."""
        broker.notify("edit_1", "edit")
        (delivery,) = broker.receive(WORK_KINDS, 10, 0)
        assert (delivery.kind, delivery.job_id, delivery.payload) == ("edit", "edit_1", {})

    def test_notify_is_idempotent(self, broker: Broker) -> None:
        """A queued job is delivered once, however often it was notified."""
        for _ in range(3):
            broker.notify("edit_1", "edit")
        assert broker.queue_depth("edit") == 1
        assert len(broker.receive(WORK_KINDS, 10, 0)) == 1
        assert broker.receive(WORK_KINDS, 10, 0) == []

    def test_notify_after_receive(self, broker: Broker) -> None:
        """A job that was received can be notified again."""
        broker.notify("edit_1", "edit")
        broker.receive(WORK_KINDS, 1, 0)
        broker.notify("edit_1", "edit")
        assert len(broker.receive(WORK_KINDS, 10, 0)) == 1

    def test_send_call(self, broker: Broker) -> None:
        """A call carries its whole request, and its channel is the delivery's job id."""
        channel = broker.send_call("generate", {"prompt": "São Paulo", "n": [1, None]})
        (delivery,) = broker.receive(["generate"], 1, 0)
        assert (delivery.job_id, delivery.payload) == (channel, {"prompt": "São Paulo", "n": [1, None]})

    def test_priority(self, broker: Broker) -> None:
        """`receive` returns deliveries of one kind: the first kind with queued items, the oldest first, up to
        the limit."""
        broker.notify("trace_1", "trace")
        broker.notify("edit_1", "edit")
        calls = [broker.send_call("generate", {"n": n}) for n in range(3)]
        taken = []
        while batch := broker.receive(WORK_KINDS, 2, 0):
            taken.append([delivery.job_id for delivery in batch])
        assert taken == [calls[:2], calls[2:], ["edit_1"], ["trace_1"]]

    def test_only_the_kinds_asked_for(self, broker: Broker) -> None:
        """`receive` returns no job of a kind that is not asked for, and the job stays queued."""
        broker.notify("trace_1", "trace")
        assert broker.receive(["generate", "edit"], 1, 0) == []
        assert broker.queue_depth("trace") == 1

    def test_ack(self, broker: Broker) -> None:
        """An acknowledged delivery is not redelivered, and a second ack has no effect."""
        broker.notify("edit_1", "edit")
        (delivery,) = broker.receive(WORK_KINDS, 1, 0)
        broker.ack(delivery)
        broker.ack(delivery)
        assert broker.receive(WORK_KINDS, 1, 0) == []

    def test_nack(self, broker: Broker) -> None:
        """After nack, a call is delivered before all others of its kind."""
        first, second = broker.send_call("generate", {"n": 1}), broker.send_call("generate", {"n": 2})
        (delivery,) = broker.receive(WORK_KINDS, 1, 0)
        broker.nack(delivery)
        again = broker.receive(WORK_KINDS, 10, 0)
        assert [d.job_id for d in again] == [first, second]
        assert again[0].payload == {"n": 1}

    def test_nack_keeps_the_order(self, broker: Broker) -> None:
        """Deliveries that are nacked are redelivered in the order of the nacks, before all others."""
        for name in "abcd":
            broker.notify(name, "edit")
        taken = broker.receive(WORK_KINDS, 3, 0)
        for delivery in taken:
            broker.nack(delivery)
        assert [d.job_id for d in broker.receive(WORK_KINDS, 1, 0)] == ["a"]
        assert [d.job_id for d in broker.receive(WORK_KINDS, 2, 0)] == ["b", "c"]
        assert [d.job_id for d in broker.receive(WORK_KINDS, 9, 0)] == ["d"]

    def test_nack_is_not_a_failed_delivery(self, broker: Broker) -> None:
        """A nack is not counted as a failed delivery, and the payload and request id are unchanged."""
        broker.send_call("generate", {"n": 1}, "request-1")
        (delivery,) = broker.receive(WORK_KINDS, 1, 0)
        broker.nack(delivery)
        broker.nack(delivery)
        (again,) = broker.receive(WORK_KINDS, 10, 0)
        assert (again.deliveries, again.request_id, again.payload) == (1, "request-1", {"n": 1})

    def test_nack_a_job(self, broker: Broker) -> None:
        """A job that is nacked is delivered once, even when it was notified again before."""
        broker.notify("edit_1", "edit")
        (delivery,) = broker.receive(WORK_KINDS, 1, 0)
        broker.notify("edit_1", "edit")
        broker.nack(delivery)
        assert [d.job_id for d in broker.receive(WORK_KINDS, 10, 0)] == ["edit_1"]

    def test_holds_lease(self, broker: Broker) -> None:
        """The lease of a call is held from its receipt until ack or nack. A job has no lease."""
        for n in range(2):
            broker.send_call("generate", {"n": n})
        broker.notify("edit_1", "edit")
        assert not broker.holds_lease(Delivery("another", "generate", "call_1"))
        one, two = broker.receive(WORK_KINDS, 2, 0)
        assert broker.holds_lease(one) and broker.holds_lease(two)
        (job,) = broker.receive(["edit"], 1, 0)
        assert not broker.holds_lease(job)
        broker.ack(one)
        broker.nack(two)
        assert not broker.holds_lease(one) and not broker.holds_lease(two)

    def test_is_pending(self, broker: Broker) -> None:
        """A call is pending from `send_call` until ack."""
        assert not broker.is_pending("call_1")
        channel = broker.send_call("compare", {})
        assert broker.is_pending(channel)
        (delivery,) = broker.receive(WORK_KINDS, 1, 0)
        assert broker.is_pending(channel)
        broker.nack(delivery)
        assert broker.is_pending(channel)
        (delivery,) = broker.receive(WORK_KINDS, 1, 0)
        broker.ack(delivery)
        assert not broker.is_pending(channel)

    def test_send_call_again(self, broker: Broker) -> None:
        """A call can be sent again on its own channel, and is queued once however often it is sent."""
        for _ in range(2):
            assert broker.send_call("generate", {"n": 1}, "request-1", channel="call_1") == "call_1"
        (delivery,) = broker.receive(WORK_KINDS, 10, 0)
        assert (delivery.job_id, delivery.payload, delivery.request_id) == ("call_1", {"n": 1}, "request-1")

    def test_oldest_age(self, broker: Broker) -> None:
        """`oldest_age` returns the age of the oldest queued item of a kind, and 0 when none is queued."""
        assert broker.oldest_age("edit") == 0
        broker.notify("edit_1", "edit")
        time.sleep(0.02)
        broker.notify("edit_2", "edit")
        assert broker.oldest_age("edit") >= 0.02
        assert broker.oldest_age("trace") == 0
        broker.receive(WORK_KINDS, 1, 0)
        broker.receive(WORK_KINDS, 1, 0)
        assert broker.oldest_age("edit") == 0

    def test_queue_depth(self, broker: Broker) -> None:
        """`queue_depth` counts the queued items of a kind, without those that were received."""
        broker.send_call("generate", {})
        broker.notify("edit_1", "edit")
        assert [broker.queue_depth(kind) for kind in WORK_KINDS] == [
            int(kind in ("generate", "edit")) for kind in WORK_KINDS
        ]
        broker.receive(WORK_KINDS, 1, 0)
        assert broker.queue_depth("generate") == 0

    def test_receive_waits(self, broker: Broker) -> None:
        """A blocked `receive` returns a job that is notified while it waits."""
        ready = threading.Event()
        taken = []

        def take() -> None:
            ready.set()
            taken.extend(broker.receive(WORK_KINDS, 1, TIMEOUT))

        thread = start_thread(take)
        ready.wait(TIMEOUT)
        broker.notify("edit_1", "edit")
        thread.join(TIMEOUT)
        assert [delivery.job_id for delivery in taken] == ["edit_1"]

    @pytest.mark.parametrize("stir", ["wake", "close"])
    def test_receive_ends(self, broker: Broker, stir: Any) -> None:
        """`receive` returns an empty list before its timeout after `wake` or `close`."""
        began = time.monotonic()
        getattr(broker, stir)()  # a wake before `receive` is kept
        assert broker.receive(WORK_KINDS, 1, TIMEOUT) == []
        assert time.monotonic() - began < TIMEOUT

    def test_many_receivers(self, broker: Broker) -> None:
        """With concurrent receivers, each delivery goes to exactly one of them."""
        ids = [f"edit_{n:03}" for n in range(200)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda x: broker.notify(x, "edit"), ids))

            def take(_: Any) -> Any:
                taken = []
                while batch := broker.receive(WORK_KINDS, 3, 0):
                    taken += [delivery.job_id for delivery in batch]
                return taken

            taken = [x for part in pool.map(take, range(8)) for x in part]
        assert sorted(taken) == ids


class TestEvents:
    def test_replay(self, broker: Broker) -> None:
        """A listener that starts after the last event receives all events of the channel in order."""
        broker.publish("c", "token", {"text": "a"})
        broker.publish("c", "token", {"text": "b"})
        broker.publish("c", "end", {"n": 2}, last=True)
        assert name_and_data(collect_events(broker, "c")) == [
            ("token", {"text": "a"}),
            ("token", {"text": "b"}),
            ("end", {"n": 2}),
        ]

    def test_replay_after(self, broker: Broker) -> None:
        """A listener that resumes after an event id receives the later events."""
        for n in range(4):
            broker.publish("c", "n", {"n": n}, last=n == 3)
        events = collect_events(broker, "c")
        for n, event in enumerate(events):
            assert collect_events(broker, "c", event.id) == events[n + 1 :]

    def test_ids_grow(self, broker: Broker) -> None:
        """Event ids are decimal strings, unique across channels and increasing within a channel."""
        for n in range(50):
            broker.publish(f"c{n % 2}", "n", {}, last=n >= 48)
        ids = [int(event.id) for channel in ("c0", "c1") for event in collect_events(broker, channel)]
        assert len(set(ids)) == 50
        assert ids[:25] == sorted(ids[:25])

    @pytest.mark.parametrize("after", ["nonsense", "", "-5", "12-0"])
    def test_invalid_event_id(self, broker: Broker, after: Any) -> None:
        """An invalid event id replays all events."""
        broker.publish("c", "end", {}, last=True)
        assert len(collect_events(broker, "c", after)) == 1

    def test_nothing_after_the_last(self, broker: Broker) -> None:
        """An event published after the last event is dropped."""
        broker.publish("c", "end", {}, last=True)
        broker.publish("c", "late", {})
        assert name_and_data(collect_events(broker, "c")) == [("end", {})]

    def test_publish_all(self, broker: Broker) -> None:
        """`publish_all` publishes events in order, on several channels, up to the last event of each."""
        broker.publish_all([])
        broker.publish_all(
            [
                OutgoingEvent("a", "n", {"n": 1}),
                OutgoingEvent("b", "n", {"n": 2}),
                OutgoingEvent("a", "end", {}, last=True),
                OutgoingEvent("a", "late", {}),
                OutgoingEvent("b", "end", {}, last=True),
            ]
        )
        assert name_and_data(collect_events(broker, "a")) == [("n", {"n": 1}), ("end", {})]
        assert name_and_data(collect_events(broker, "b")) == [("n", {"n": 2}), ("end", {})]

    def test_any_text(self, broker: Broker) -> None:
        """Any JSON value in the data of an event is received unchanged."""
        data = {"text": "é\n\0\ud800 “”🦉", "n": [1, 2.5, None, True], "": {}}
        broker.publish("c", "end", data, last=True)
        assert name_and_data(collect_events(broker, "c")) == [("end", data)]

    def test_delete_channel(self, broker: Broker) -> None:
        """A deleted channel can be published on again, and is not cancelled."""
        broker.publish("c", "end", {"n": 1}, last=True)
        broker.delete_channel("c")
        broker.cancel("c")
        broker.delete_channel("c")
        assert not broker.cancelled("c")
        broker.publish("c", "end", {"n": 2}, last=True)
        assert name_and_data(collect_events(broker, "c")) == [("end", {"n": 2})]

    def test_live(self, broker: Broker) -> None:
        """A listener receives events that threads publish while it listens."""

        def speak() -> None:
            for n in range(100):
                broker.publish("c", "n", {"n": n}, last=n == 99)

        async def listen() -> Any:
            listener = asyncio.ensure_future(collect(broker, "c"))
            await asyncio.sleep(0)
            thread = start_thread(speak)
            events = await listener
            thread.join(TIMEOUT)
            return events

        assert [event.data["n"] for event in asyncio.run(listen())] == list(range(100))

    def test_many_listeners_in_many_loops(self, broker: Broker) -> None:
        """Listeners in different event loops all receive every event."""

        def speak() -> None:
            for n in range(200):
                broker.publish("c", "n", {"n": n}, last=n == 199)

        with ThreadPoolExecutor(9) as pool:
            listeners = [pool.submit(collect_events, broker, "c") for _ in range(8)]
            pool.submit(speak).result(TIMEOUT)
            for listener in listeners:
                assert [event.data["n"] for event in listener.result(TIMEOUT)] == list(range(200))

    def test_listener_that_disconnects(self, broker: Broker) -> None:
        """A listener that is closed, or whose event loop has ended, does not affect other listeners."""

        async def listen_to_one() -> Any:
            async for event in broker.events("c"):
                return event
            return None

        broker.publish("c", "n", {"n": 1})
        assert asyncio.run(listen_to_one()).data == {"n": 1}
        broker.publish("c", "end", {}, last=True)
        assert len(collect_events(broker, "c")) == 2

    def test_close_ends_listening(self, broker: Broker) -> None:
        """Closing the broker ends every listener."""

        async def listen() -> Any:
            listener = asyncio.ensure_future(collect(broker, "c"))
            await asyncio.sleep(0)
            broker.close()
            return await listener

        assert asyncio.run(listen()) == []


class TestCancel:
    def test_cancel(self, broker: Broker) -> None:
        """`cancelled` is true for a cancelled channel and for no other."""
        channel = broker.send_call("generate", {})
        assert not broker.cancelled(channel)
        broker.cancel(channel)
        broker.cancel(channel)
        assert broker.cancelled(channel)
        assert not broker.cancelled("another")

    def test_cancel_after_end(self, broker: Broker) -> None:
        """A channel that has ended is not cancelled."""
        broker.cancel("c")
        broker.publish("c", "end", {}, last=True)
        broker.cancel("c")
        assert not broker.cancelled("c")


def test_event_is_a_value() -> None:
    """Events with equal fields are equal."""
    assert Event("1", "a", {"x": 1}) == Event("1", "a", {"x": 1})
