"""The broker on Redis Streams: any number of APIs and workers, on any number of machines.

Deliveries are entries of a consumer group. Who holds one renews its lease from a thread of its own; what nobody renews
waits again. Each step that must not be torn is a part of `redis_broker.lua`, which Redis runs whole.

Redis may lose everything. Then nothing waits any more, and whoever wants something says so again: `Desk.sweep` the
jobs, the API its calls. A delivery that is held meanwhile stays its holder's, until another is given the same call.
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
from service.jobs.broker import Delivery, Event, OutgoingEvent
from service.jobs.job_kinds import CALL_KINDS, WORK_KINDS
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

BLOCK_SECONDS = 1.5  #: seconds that Redis holds one question; more waiting is asking again
SOCKET_TIMEOUT = 5.0  #: seconds without an answer after which Redis counts as down: well above BLOCK
RECONNECT_TIMEOUT = 30.0  #: seconds for which a listener waits for a Redis that is down
RECONNECT_INTERVAL = 0.1  #: and between two tries
CANCEL_CACHE_SECONDS = 0.05  #: seconds for which `cancelled` knows without asking
MAX_IDLE = 2**53
READ_COUNT = 1000  #: events heard in one go
DEAD_LETTER_ERROR = error_document(
    AttemptsExhausted("every worker that started this request died. Reduce the request, or see the log.")
)


@dataclass(eq=False)
class _Lease:
    """What was taken here and not dealt with yet, and where it stands in Redis."""

    delivery: Delivery
    stream: str
    entry_id: str
    token: str  #: what `owner:` says while this call is ours
    epoch: str
    published_count: int = (
        0  #: events that Redis has acknowledged; one told again after an outage is said once
    )
    lost: bool = False


class RedisBroker:
    """Opens no connection before it is needed; every method raises `Unavailable` while Redis is down."""

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
        self._publish_lock = threading.Lock()  # the numbers of what is said have one order
        self._leases: dict[str, _Lease] = {}  # by the id of the delivery
        self._leases_by_job: dict[str, _Lease] = {}  # by its job or channel
        self._request_seq = count(1)
        self._unacked_requests: list[int] = []
        self._last_wakeup = ""
        self._receives_finished = threading.Condition(self._lock)
        self._active_receives = 0
        self._cancelled_channels: set[str] = set()
        self._cancels_read_at = float("-inf")
        self._clients_by_loop: dict[asyncio.AbstractEventLoop, tuple[AsyncGenerator[Any], Any]] = {}
        self._closed = threading.Event()
        self._lease_thread: threading.Thread | None = None

    # deliveries

    def notify(self, job_id: str, kind: str) -> None:
        self._run_script("announce", kind, job_id)

    def send_call(
        self, kind: str, payload: dict[str, Any], request_id: str = "", channel: str | None = None
    ) -> str:
        channel = channel or new_id("call")
        self._run_script("call", kind, channel, json.dumps(payload), request_id)
        return channel

    def is_pending(self, channel: str) -> bool:
        with translate_redis_errors(), self._redis.pipeline() as pipeline:
            for kind in CALL_KINDS:
                pipeline.zscore(self._key("waiting", kind), channel)
            pipeline.get(self._key("owner", channel))
            *waiting_since, owner = pipeline.execute()
            return bool(owner) or any(since is not None for since in waiting_since)

    def receive(self, kinds: Sequence[str], limit: int, timeout: float) -> list[Delivery]:
        deadline = time.monotonic() + timeout
        with self._lock:
            self._active_receives += 1
        try:
            self._start_lease_thread()
            while not self._closed.is_set():
                received, was_woken, last_wakeup = self._receive_once(kinds, limit)
                remaining = deadline - time.monotonic()
                if received or was_woken or remaining <= 0:
                    return received
                with translate_redis_errors():
                    wait = max(1, int(min(remaining, BLOCK_SECONDS) * 1000))  # 0 would be for ever
                    self._redis.xread({self._key("bell"): last_wakeup}, block=wait)
            return []
        finally:
            with self._receives_finished:
                self._active_receives -= 1
                self._receives_finished.notify_all()

    def _receive_once(self, kinds: Sequence[str], limit: int) -> tuple[list[Delivery], bool, str]:
        """What is there now, whether somebody called `wake` since the last time, and the last ring of the bell."""
        with self._lock:
            sequence = self._unacked_requests.pop() if self._unacked_requests else next(self._request_seq)
        try:
            entries, epoch, last_wakeup, last_explicit_wakeup = self._run_script(
                "take", self._consumer, f"{self._consumer}.{sequence}", int(self.lease * 1000), limit, *kinds
            )
        except Unavailable:
            self._unacked_requests.append(
                sequence
            )  # if Redis did give us something, the same turn gives it again
            raise
        with self._lock:
            received = [self._record_lease(epoch, *entry) for entry in entries]
            was_woken, self._last_wakeup = last_explicit_wakeup != self._last_wakeup, last_explicit_wakeup
        return [delivery for delivery in received if delivery is not None], was_woken, last_wakeup

    def _record_lease(
        self,
        epoch: str,
        stream: str,
        entry_id: str,
        token: str,
        kind: str,
        job_id: str,
        payload: str,
        request_id: str,
        failed_deliveries: str,
        last_publisher: str,
    ) -> Delivery | None:
        """Remember what was taken. None for a call that is worked on here all along, and came back: that goes on."""
        delivery = Delivery(
            token,
            kind,
            job_id,
            json.loads(payload) if payload else {},
            request_id,
            int(failed_deliveries) + 1,
        )
        lease = _Lease(delivery, stream, entry_id, token, epoch)
        previous = self._leases_by_job.get(job_id)
        if previous is not None and kind in CALL_KINDS and not previous.lost:
            if last_publisher in ("", previous.delivery.id):
                previous.stream, previous.entry_id, previous.token, previous.epoch = (
                    stream,
                    entry_id,
                    token,
                    epoch,
                )
                return None
            self._mark_lost(previous)  # another has spoken since, and died
        self._leases[token] = self._leases_by_job[job_id] = lease
        return delivery

    def holds_lease(self, delivery: Delivery) -> bool:
        with self._lock:
            lease = self._leases.get(delivery.id)
            return lease is not None and not lease.lost

    def ack(self, delivery: Delivery) -> None:
        if lease := self._lease_of(delivery):
            self._run_script(
                "done", self._consumer, lease.stream, lease.entry_id, delivery.job_id, lease.token
            )
            self._drop_lease(lease)

    def nack(self, delivery: Delivery) -> None:
        if lease := self._lease_of(delivery):
            payload = json.dumps(delivery.payload) if delivery.kind in CALL_KINDS else ""
            work = (delivery.kind, payload, delivery.request_id, delivery.deliveries - 1)
            position = (lease.stream, lease.entry_id, delivery.job_id, lease.token, lease.epoch)
            self._run_script("give_back", self._consumer, *position, *work)
            self._drop_lease(lease)

    def _lease_of(self, delivery: Delivery) -> _Lease | None:
        """How the delivery is held; None when it is not, and then nothing of it is kept here any more."""
        with self._lock:
            lease = self._leases.get(delivery.id)
            if lease is not None and lease.lost:
                self._drop_lease(lease)
                return None
            return lease

    def _drop_lease(self, lease: _Lease) -> None:
        with self._lock:
            self._leases.pop(lease.delivery.id, None)
            if self._leases_by_job.get(lease.delivery.job_id) is lease:
                del self._leases_by_job[lease.delivery.job_id]

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

    def queue_depth(self, kind: str) -> int:
        with translate_redis_errors():
            return int(self._redis.zcard(self._key("waiting", kind)))

    def oldest_age(self, kind: str) -> float:
        return float(self._run_script("oldest", kind)) / 1e6

    # leases

    def _start_lease_thread(self) -> None:
        with self._lock:
            if self._lease_thread is None and not self._closed.is_set():
                self._lease_thread = threading.Thread(
                    target=self._maintain_leases, name="leases", daemon=True
                )
                self._lease_thread.start()

    def _maintain_leases(self) -> None:
        """Renew what is held here and find what nobody renews, on a clock of its own and a connection of its own."""
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
            leases = [held for held in self._leases.values() if not held.lost]
            positions = [(h.stream, h.entry_id, h.epoch, h.delivery.job_id, h.token) for h in leases]
        if not leases:
            return
        for index in self._run_script("renew", self._consumer, *chain(*positions), script=script):
            if leases[index].hold == positions[index][-1]:  # and did not come back to us meanwhile
                self._mark_lost(leases[index])

    def _reclaim(self, script: Any) -> None:
        lease, error_json = int(self.lease * 1000), json.dumps(DEAD_LETTER_ERROR)
        for kind in WORK_KINDS:
            for queue in ("first", "work"):
                cursor = "0-0"
                while True:
                    cursor, dead_lettered = self._run_script(
                        "reclaim", queue, kind, cursor, lease, self.max_deliveries, error_json, script=script
                    )
                    for channel, request_id in dead_lettered:
                        metrics.GENERATIONS_DEAD_LETTERED.inc()
                        log.error(
                            "call given up", extra={"kind": kind, "job": channel, "request": request_id}
                        )
                    if cursor == "0-0":
                        break
        self._run_script("prune", "", 20 * lease, *self._streams(), script=script)

    # news

    def publish(self, channel: str, name: str, data: dict[str, Any], last: bool = False) -> None:
        self.publish_all([OutgoingEvent(channel, name, data, last)])

    def publish_all(self, messages: Sequence[OutgoingEvent]) -> None:
        with self._publish_lock:
            published: dict[_Lease, int] = {}
            arguments: list[str | int] = []
            for message in messages:
                with self._lock:
                    lease = self._leases_by_job.get(message.channel)
                    if lease is not None and lease.lost:
                        continue
                token = publisher = ""
                if lease is not None and lease.delivery.kind in CALL_KINDS:
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
        stream_key, shutdown_key = self._key("out", channel), self._key("hush", self._consumer)
        last_publisher = None if last_seen != "0" else ""  # not known yet
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
                if last_publisher and fields["by"] != last_publisher:
                    yield Event(last_seen, "restart", {})
                last_seen, last_publisher = entry.partition("-")[0], fields["by"]
                yield Event(last_seen, fields["name"], json.loads(fields["data"]))
                if "last" in fields:
                    return

    async def _async_client(self) -> Any:
        """The client of the running event loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._clients_by_loop:
            lifetime = self._client_of_loop(loop)
            self._clients_by_loop[loop] = (lifetime, await anext(lifetime))
        return self._clients_by_loop[loop][1]

    async def _client_of_loop(self, loop: asyncio.AbstractEventLoop) -> AsyncGenerator[Any]:
        """A client that is closed when its loop ends: that is when asyncio closes what is still generating."""
        loop_client = async_redis_client(self._url, SOCKET_TIMEOUT)
        try:
            yield loop_client
        finally:
            self._clients_by_loop.pop(loop, None)
            await loop_client.aclose()

    def delete_channel(self, channel: str) -> None:
        with translate_redis_errors():
            self._redis.delete(self._key("out", channel), self._key("cancel", channel))

    def cancel(self, channel: str) -> None:
        self._run_script("cancel", channel)
        self._cancels_read_at = float("-inf")

    def cancelled(self, channel: str) -> bool:
        with self._lock:
            is_leased = channel in self._leases_by_job
            if is_leased and time.monotonic() - self._cancels_read_at < CANCEL_CACHE_SECONDS:
                return channel in self._cancelled_channels
            channels = list(self._leases_by_job) if is_leased else [channel]
            self._cancels_read_at = time.monotonic() if is_leased else self._cancels_read_at
        with translate_redis_errors():
            flags = self._redis.mget([self._key("cancel", name) for name in channels])
        cancelled_channels = {name for name, flag in zip(channels, flags, strict=True) if flag}
        if is_leased:
            self._cancelled_channels = cancelled_channels
        return channel in cancelled_channels

    def close(self) -> None:
        """What is still held is taken over when its lease runs out."""
        if self._closed.is_set():
            return
        self._closed.set()
        with suppress(Unavailable):
            self._run_script("ring")
            with translate_redis_errors():
                shutdown_key = self._key("hush", self._consumer)
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
        return [self._key(where, kind) for kind in WORK_KINDS for where in ("first", "work")]

    def _run_script(self, command: str, *arguments: Any, script: Any = None) -> Any:
        with translate_redis_errors():
            return (script or self._script)(args=[command, self._prefix, *arguments])


async def _resume_state(listener: Any, stream_key: str, last_seen: str) -> tuple[str, bool]:
    """Who said the last thing that a listener has heard, and whether that was the end."""
    before = await listener.xrevrange(stream_key, f"{last_seen}-0", "-", count=1)
    newest = await listener.xrevrange(stream_key, "+", "-", count=1)
    ended = bool(newest) and newest == before and "last" in newest[0][1]
    return (before[0][1]["by"] if before else ""), ended
