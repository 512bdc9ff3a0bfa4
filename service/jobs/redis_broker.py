"""The broker on Redis: any number of API processes and workers, on any number of machines.

The queue of a kind of work is a sorted set of ids, in an order that is fair between callers. An id leaves it when a
worker receives it. The worker then claims the row of a job in SQL, and the lease of the job is the worker's heartbeat
there.

A call that a worker received is an entry of a Redis Stream with a consumer group. The worker renews its lease from a
thread. An expired lease is reclaimed, and a call whose workers died too often ends with an error (a dead letter). An
operation that must be atomic is a command of `redis_broker.lua`.

Redis may lose all data. Then nothing waits any more: workers notify for the jobs again, and the API sends its calls
again. A worker keeps a call that it holds, until another worker receives the same call.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

from redis.exceptions import RedisError

from service.errors import AttemptsExhausted, Unavailable, error_document
from service.jobs.broker import EVERYONE, CallerFilter, Delivery, Event, OutgoingEvent
from service.jobs.job_kinds import CALL_KINDS
from service.jobs.redis_connection import (
    as_unavailable,
    async_redis_client,
    redis_client,
    translate_redis_errors,
)
from service.kit import metrics
from service.kit.ids import new_id

log = logging.getLogger(__name__)

SCRIPT = Path(__file__).with_name("redis_broker.lua").read_text(encoding="utf-8")

BLOCK_SECONDS = 1.5  #: seconds that one blocking read lasts at most
SOCKET_TIMEOUT = 5.0  #: seconds without a reply after which Redis counts as down; well above BLOCK_SECONDS
RECONNECT_TIMEOUT = 30.0  #: seconds for which a listener waits for a Redis that is down
RECONNECT_INTERVAL = 0.1  #: seconds between two attempts to reconnect
CANCEL_CACHE_SECONDS = 0.05  #: seconds for which the state of all polled channels is cached
CANCEL_POLL_SECONDS = 10.0  #: seconds after its last poll for which a channel is refreshed with the others
MAX_IDLE = 2**53  #: milliseconds; no consumer is idle for longer
READ_COUNT = 1000  #: events per read
DEAD_LETTER_ERROR = error_document(
    AttemptsExhausted("every worker that started this request died. Reduce the request, or see the log.")
)


@dataclass(eq=False)
class _Lease:
    """A call that this broker received and has not acknowledged."""

    delivery: Delivery
    stream: str
    entry_id: str
    token: str  #: the value of `owner:CALL` while the lease is valid
    epoch: str  #: of the Redis data that holds the entry
    published_count: int = (
        0  #: events that Redis has acknowledged; numbers events, so that a retry is no duplicate
    )
    lost: bool = False


class RedisBroker:
    """Connects on first use. Every method raises `Unavailable` while Redis is down."""

    def __init__(
        self, url: str, prefix: str = "palimpsest", lease: float = 30.0, max_deliveries: int = 3
    ) -> None:
        self.lease = lease
        self.max_deliveries = max_deliveries
        self._url = url
        self._prefix = prefix
        self._consumer = new_id("consumer")
        self._redis = redis_client(url, SOCKET_TIMEOUT)
        self._script = self._redis.register_script(SCRIPT)
        self._lock = threading.RLock()
        self._publish_lock = threading.Lock()  # one order of the event numbers
        self._leases: dict[str, _Lease] = {}  # by id of the delivery
        self._leases_by_channel: dict[str, _Lease] = {}
        self._request_seq = count(1)
        self._unacked_requests: list[int] = []
        self._last_wakeup = ""
        self._receives_finished = threading.Condition(self._lock)
        self._active_receives = 0
        self._cancelled_channels: set[str] = set()
        self._cancel_polls: dict[str, float] = {}  # channel -> time of its last poll
        self._cancels_read_at = float("-inf")
        self._clients_by_loop: dict[asyncio.AbstractEventLoop, tuple[AsyncGenerator[Any], Any]] = {}
        self._closed = threading.Event()
        self._lease_thread: threading.Thread | None = None

    # deliveries

    def notify(self, job_id: str, kind: str, caller: str = "", cost: float = 1.0) -> None:
        self._run_script("notify", kind, job_id, caller, cost)

    def send_call(
        self,
        kind: str,
        payload: dict[str, Any],
        request_id: str = "",
        channel: str | None = None,
        caller: str = "",
        cost: float = 1.0,
    ) -> str:
        channel = channel or new_id("call")
        self._run_script("send_call", kind, channel, json.dumps(payload), request_id, caller, cost)
        return channel

    def is_pending(self, channel: str) -> bool:
        with translate_redis_errors(), self._redis.pipeline() as pipeline:
            for kind in CALL_KINDS:
                pipeline.zscore(self._key("enqueued", kind), channel)
            pipeline.get(self._key("owner", channel))
            *waiting_since, owner = pipeline.execute()
            return bool(owner) or any(since is not None for since in waiting_since)

    def receive(
        self, kinds: Sequence[str], limit: int, timeout: float, callers: CallerFilter = EVERYONE
    ) -> list[Delivery]:
        deadline = time.monotonic() + timeout
        with self._lock:
            self._active_receives += 1
        try:
            self._start_lease_thread()
            while not self._closed.is_set():
                received, was_woken, last_wakeup = self._receive_once(kinds, limit, callers)
                remaining = deadline - time.monotonic()
                if received or was_woken or remaining <= 0:
                    return received
                with translate_redis_errors():
                    wait = max(1, int(min(remaining, BLOCK_SECONDS) * 1000))  # 0 would block without limit
                    self._redis.xread({self._key("wakeup"): last_wakeup}, block=wait)
            return []
        finally:
            with self._receives_finished:
                self._active_receives -= 1
                self._receives_finished.notify_all()

    def _receive_once(
        self, kinds: Sequence[str], limit: int, callers: CallerFilter
    ) -> tuple[list[Delivery], bool, str]:
        """Return what waits now, whether `wake` was called since the last time, and the id of the last wakeup."""
        with self._lock:
            sequence = self._unacked_requests.pop() if self._unacked_requests else next(self._request_seq)
        wanted = [(kind, kind in CALL_KINDS, list(callers.excluded.get(kind, ()))) for kind in kinds]
        try:
            calls, jobs, epoch, last_wakeup, last_explicit_wakeup = self._run_script(
                "receive",
                self._consumer,
                f"{self._consumer}.{sequence}",
                int(self.lease * 1000),
                limit,
                int(callers.only is not None),
                callers.only or "",
                json.dumps(wanted),
            )
        except Unavailable:
            self._unacked_requests.append(sequence)  # the same sequence number returns a reply that was lost
            raise
        with self._lock:
            received = [self._record_lease(epoch, *call) for call in calls]
            was_woken, self._last_wakeup = last_explicit_wakeup != self._last_wakeup, last_explicit_wakeup
        deliveries = [delivery for delivery in received if delivery is not None]
        deliveries += [
            Delivery(job_id, kind, job_id, caller=caller, position=float(position))
            for kind, job_id, caller, position in jobs
        ]
        return deliveries, was_woken, last_wakeup

    def _record_lease(
        self,
        epoch: str,
        stream: str,
        entry_id: str,
        token: str,
        kind: str,
        channel: str,
        payload: str,
        request_id: str,
        failed_deliveries: str,
        last_publisher: str,
        caller: str,
        position: str,
        cost: str,
    ) -> Delivery | None:
        """Record the lease of a received call and return its delivery.

        None for a call that this broker already holds and that was redelivered: its work continues under the new lease.
        """
        deliveries = int(failed_deliveries) + 1
        delivery = Delivery(
            token,
            kind,
            channel,
            json.loads(payload),
            request_id,
            deliveries,
            caller,
            float(position),
            float(cost),
        )
        lease = _Lease(delivery, stream, entry_id, token, epoch)
        previous = self._leases_by_channel.get(channel)
        if previous is not None and not previous.lost:
            if last_publisher in ("", previous.delivery.id):
                previous.stream, previous.entry_id, previous.token, previous.epoch = (
                    stream,
                    entry_id,
                    token,
                    epoch,
                )
                return None
            self._mark_lost(previous)  # another worker has published since, and died
        self._leases[token] = self._leases_by_channel[channel] = lease
        return delivery

    def holds_lease(self, delivery: Delivery) -> bool:
        with self._lock:
            lease = self._leases.get(delivery.id)
            return lease is not None and not lease.lost

    def ack(self, delivery: Delivery) -> None:
        if lease := self._lease_of(delivery):
            self._run_script(
                "ack", self._consumer, lease.stream, lease.entry_id, delivery.job_id, lease.token
            )
            self._drop_lease(lease)

    def nack(self, delivery: Delivery) -> None:
        if delivery.kind not in CALL_KINDS:
            self._run_script(
                "put_back", delivery.kind, delivery.job_id, delivery.caller, repr(delivery.position)
            )
        elif lease := self._lease_of(delivery):
            position = (lease.stream, lease.entry_id, delivery.job_id, lease.epoch)
            call = (delivery.kind, json.dumps(delivery.payload), delivery.request_id, delivery.deliveries - 1)
            place = (delivery.caller, repr(delivery.position), repr(delivery.cost))
            self._run_script("nack", self._consumer, *position, *call, *place)
            self._drop_lease(lease)

    def _lease_of(self, delivery: Delivery) -> _Lease | None:
        """Return the valid lease of a delivery; None when there is none. A lost lease is dropped."""
        with self._lock:
            lease = self._leases.get(delivery.id)
            if lease is not None and lease.lost:
                self._drop_lease(lease)
                return None
            return lease

    def _drop_lease(self, lease: _Lease) -> None:
        with self._lock:
            self._leases.pop(lease.delivery.id, None)
            if self._leases_by_channel.get(lease.delivery.job_id) is lease:
                del self._leases_by_channel[lease.delivery.job_id]

    def _mark_lost(self, lease: _Lease) -> None:
        with self._lock:
            if lease.lost:
                return
            lease.lost = True
        metrics.LEASE_LOSSES.inc()
        delivery = lease.delivery
        log.warning("lease lost", extra={"kind": delivery.kind, "job": delivery.job_id})

    def wake(self) -> None:
        self._run_script("wake")

    def queue_depth(self, kind: str, caller: str | None = None) -> int:
        if caller is not None:
            return int(self._run_script("count_waiting", kind, caller))
        with translate_redis_errors():
            return int(self._redis.zcard(self._key("queue", kind)))

    def oldest_age(self, kind: str) -> float:
        return float(self._run_script("oldest_age", kind)) / 1e6

    # leases

    def _start_lease_thread(self) -> None:
        with self._lock:
            if self._lease_thread is None and not self._closed.is_set():
                self._lease_thread = threading.Thread(
                    target=self._maintain_leases, name="leases", daemon=True
                )
                self._lease_thread.start()

    def _maintain_leases(self) -> None:
        """Renew the leases of this broker and reclaim expired ones of all brokers, in a thread with its own
        connection."""
        connection = redis_client(self._url, max(1.0, self.lease / 3))
        script = connection.register_script(SCRIPT)
        while not self._closed.wait(self.lease / 3):
            try:
                self._renew(script)
                self._reclaim(script)
            except Unavailable as error:
                log.warning("leases not renewed", extra={"detail": error.detail})
            except Exception:
                log.exception("leases not renewed")
        connection.close()

    def _renew(self, script: Any) -> None:
        with self._lock:
            leases = [lease for lease in self._leases.values() if not lease.lost]
            positions = [(x.stream, x.entry_id, x.epoch, x.delivery.job_id, x.token) for x in leases]
        if not leases:
            return
        for index in self._run_script("renew", self._consumer, *chain(*positions), script=script):
            if leases[index].token == positions[index][-1]:  # it was not redelivered to this broker meanwhile
                self._mark_lost(leases[index])

    def _reclaim(self, script: Any) -> None:
        lease, error_json = int(self.lease * 1000), json.dumps(DEAD_LETTER_ERROR)
        for kind in CALL_KINDS:
            cursor = "0-0"
            while True:
                cursor, dead_letters = self._run_script(
                    "reclaim", kind, cursor, lease, self.max_deliveries, error_json, script=script
                )
                for channel, request_id in dead_letters:
                    metrics.GENERATIONS_DEAD_LETTERED.inc()
                    log.error(
                        "call dead-lettered", extra={"kind": kind, "job": channel, "request": request_id}
                    )
                if cursor == "0-0":
                    break
        self._run_script("prune", "", 20 * lease, *self._streams(), script=script)

    # events

    def publish(self, channel: str, name: str, data: dict[str, Any], last: bool = False) -> None:
        self.publish_all([OutgoingEvent(channel, name, data, last)])

    def publish_all(self, messages: Sequence[OutgoingEvent]) -> None:
        with self._publish_lock:
            published: dict[_Lease, int] = {}
            arguments: list[str | int] = []
            for message in messages:
                with self._lock:
                    lease = self._leases_by_channel.get(message.channel)
                    if lease is not None and lease.lost:
                        continue
                token = publisher = ""
                if lease is not None:
                    token, publisher = lease.token, lease.delivery.id
                    published[lease] = published.get(lease, lease.published_count) + 1
                number = published.get(lease, 0) if lease else 0
                body = (message.name, json.dumps(message.data), int(message.last))
                arguments += (message.channel, token, publisher, number, *body)
            if not arguments:
                return
            fenced = set(self._run_script("publish", *arguments))
            for lease, number in published.items():
                lease.published_count = number
                if lease.delivery.job_id in fenced:
                    self._mark_lost(lease)

    def events(self, channel: str, after: str | None = None) -> AsyncIterator[Event]:
        return self._listen(channel, after if after and re.fullmatch("[0-9]{1,19}", after) else "0")

    async def _listen(self, channel: str, last_seen: str) -> AsyncIterator[Event]:
        listener = await self._async_client()
        stream_key, shutdown_key = self._key("events", channel), self._key("shutdown", self._consumer)
        last_publisher = None if last_seen != "0" else ""  # None: not known yet
        down_since: float | None = None
        while not self._closed.is_set():
            try:
                if last_publisher is None:
                    last_publisher, ended = await _resume_state(listener, stream_key, last_seen)
                    if ended:
                        return
                positions = {stream_key: f"{last_seen}-0", shutdown_key: "0"}
                replies = await listener.xread(positions, count=READ_COUNT, block=int(BLOCK_SECONDS * 1000))
            except RedisError as error:
                down_since = down_since or time.monotonic()
                if (outage := as_unavailable(error)) is None:
                    raise
                if time.monotonic() - down_since > RECONNECT_TIMEOUT:
                    raise outage from None
                await asyncio.sleep(RECONNECT_INTERVAL)
                continue
            down_since = None
            for entry, fields in (
                pair for stream, entries in replies if stream == stream_key for pair in entries
            ):
                if last_publisher and fields["publisher"] != last_publisher:
                    yield Event(last_seen, "reset", {})
                last_seen, last_publisher = entry.partition("-")[0], fields["publisher"]
                yield Event(last_seen, fields["name"], json.loads(fields["data"]))
                if "last" in fields:
                    return

    async def _async_client(self) -> Any:
        """Return the client of the running event loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._clients_by_loop:
            lifetime = self._client_of_loop(loop)
            self._clients_by_loop[loop] = (lifetime, await anext(lifetime))
        return self._clients_by_loop[loop][1]

    async def _client_of_loop(self, loop: asyncio.AbstractEventLoop) -> AsyncGenerator[Any]:
        """Yield a client that is closed when its loop ends, when asyncio closes its asynchronous generators."""
        loop_client = async_redis_client(self._url, SOCKET_TIMEOUT)
        try:
            yield loop_client
        finally:
            self._clients_by_loop.pop(loop, None)
            await loop_client.aclose()

    def delete_channel(self, channel: str) -> None:
        with translate_redis_errors():
            self._redis.delete(self._key("events", channel), self._key("cancel", channel))
        self._cancels_read_at = float("-inf")

    def cancel(self, channel: str) -> None:
        self._run_script("cancel", channel)
        self._cancels_read_at = float("-inf")

    def cancelled(self, channel: str) -> bool:
        with self._lock:
            current_time = time.monotonic()
            is_polled = channel in self._cancel_polls
            self._cancel_polls[channel] = current_time
            if is_polled and current_time - self._cancels_read_at < CANCEL_CACHE_SECONDS:
                return channel in self._cancelled_channels
            self._cancel_polls = {
                name: time
                for name, time in self._cancel_polls.items()
                if current_time - time < CANCEL_POLL_SECONDS
            }
            channels = list(self._cancel_polls)
            self._cancels_read_at = current_time
        with translate_redis_errors():
            flags = self._redis.mget([self._key("cancel", name) for name in channels])
        self._cancelled_channels = {name for name, flag in zip(channels, flags, strict=True) if flag}
        return channel in self._cancelled_channels

    def close(self) -> None:
        """Close the connections. Calls that are still leased are reclaimed when their leases expire."""
        if self._closed.is_set():
            return
        self._closed.set()
        with suppress(Unavailable):
            self._run_script("wake_receivers")
            with translate_redis_errors():
                shutdown_key = self._key("shutdown", self._consumer)
                self._redis.xadd(shutdown_key, {"closed": ""})
                self._redis.expire(shutdown_key, 60)
        with self._receives_finished:
            self._receives_finished.wait_for(lambda: self._active_receives == 0, SOCKET_TIMEOUT)
        if self._lease_thread is not None:
            self._lease_thread.join(SOCKET_TIMEOUT)
            with suppress(Unavailable):
                self._run_script("prune", self._consumer, MAX_IDLE, *self._streams())
        self._redis.close()

    # Redis

    def _key(self, *names: str) -> str:
        return ":".join((self._prefix, *names))

    def _streams(self) -> list[str]:
        return [self._key("leased", kind) for kind in CALL_KINDS]

    def _run_script(self, command: str, *arguments: Any, script: Any = None) -> Any:
        with translate_redis_errors():
            return (script or self._script)(args=[command, self._prefix, *arguments])


async def _resume_state(listener: Any, stream_key: str, last_seen: str) -> tuple[str, bool]:
    """Return the publisher of the last event that a listener has seen, and whether that event ended the channel."""
    before = await listener.xrevrange(stream_key, f"{last_seen}-0", "-", count=1)
    newest = await listener.xrevrange(stream_key, "+", "-", count=1)
    ended = bool(newest) and newest == before and "last" in newest[0][1]
    return (before[0][1]["publisher"] if before else ""), ended
