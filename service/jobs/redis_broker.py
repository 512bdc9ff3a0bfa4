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

from service.errors import Unavailable
from service.jobs.broker import CALLS, KINDS, Delivery, Event, Message
from service.jobs.redis_connection import answering, async_client, client, unavailable
from service.kit import metrics
from service.kit.ids import new_id

log = logging.getLogger(__name__)

STEPS = Path(__file__).with_name("redis_broker.lua").read_text(encoding="utf-8")

BLOCK = 1.5  #: seconds that Redis holds one question; more waiting is asking again
ANSWER = 5.0  #: seconds without an answer after which Redis counts as down: well above BLOCK
PATIENCE = 30.0  #: seconds for which a listener waits for a Redis that is down
PAUSE = 0.1  #: and between two tries
FRESH = 0.05  #: seconds for which `cancelled` knows without asking
NEVER = 2**53
ROOM = 1000  #: events heard in one go
DIED_TOO_OFTEN = {
    "title": "The work failed",
    "detail": "every worker that began this request died with it. Ask for less at once, or see the log.",
}


@dataclass(eq=False)
class _Held:
    """What was taken here and not dealt with yet, and where it stands in Redis."""

    delivery: Delivery
    stream: str
    entry: str
    hold: str  #: what `owner:` says while this call is ours
    epoch: str
    said: int = 0  #: events that Redis has acknowledged; one told again after an outage is said once
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
        self._name = new_id("consumer")
        self._redis = client(url, ANSWER)
        self._run = self._redis.register_script(STEPS)
        self._lock = threading.RLock()
        self._speech = threading.Lock()  # the numbers of what is said have one order
        self._held: dict[str, _Held] = {}  # by the id of the delivery
        self._holding: dict[str, _Held] = {}  # by its job or channel
        self._turns = count(1)
        self._unanswered: list[int] = []
        self._woken = ""
        self._takes = threading.Condition(self._lock)
        self._taking = 0
        self._cancels: set[str] = set()
        self._looked = float("-inf")
        self._loops: dict[asyncio.AbstractEventLoop, tuple[AsyncGenerator[Any], Any]] = {}
        self._closed = threading.Event()
        self._keeper: threading.Thread | None = None

    # deliveries

    def announce(self, job_id: str, kind: str) -> None:
        self._step("announce", kind, job_id)

    def call(
        self, kind: str, payload: dict[str, Any], request_id: str = "", channel: str | None = None
    ) -> str:
        channel = channel or new_id("call")
        self._step("call", kind, channel, json.dumps(payload), request_id)
        return channel

    def knows(self, channel: str) -> bool:
        with answering(), self._redis.pipeline() as asked:
            for kind in CALLS:
                asked.zscore(self._key("waiting", kind), channel)
            asked.get(self._key("owner", channel))
            *waits, owner = asked.execute()
            return bool(owner) or any(since is not None for since in waits)

    def take(self, kinds: Sequence[str], limit: int, timeout: float) -> list[Delivery]:
        deadline = time.monotonic() + timeout
        with self._lock:
            self._taking += 1
        try:
            self._keep_leases()
            while not self._closed.is_set():
                taken, woken, bell = self._take(kinds, limit)
                left = deadline - time.monotonic()
                if taken or woken or left <= 0:
                    return taken
                with answering():
                    wait = max(1, int(min(left, BLOCK) * 1000))  # 0 would be for ever
                    self._redis.xread({self._key("bell"): bell}, block=wait)
            return []
        finally:
            with self._takes:
                self._taking -= 1
                self._takes.notify_all()

    def _take(self, kinds: Sequence[str], limit: int) -> tuple[list[Delivery], bool, str]:
        """What is there now, whether somebody called `wake` since the last time, and the last ring of the bell."""
        with self._lock:
            turn = self._unanswered.pop() if self._unanswered else next(self._turns)
        try:
            found, epoch, bell, woken = self._step(
                "take", self._name, f"{self._name}.{turn}", int(self.lease * 1000), limit, *kinds
            )
        except Unavailable:
            self._unanswered.append(turn)  # if Redis did give us something, the same turn gives it again
            raise
        with self._lock:
            taken = [self._hold(epoch, *entry) for entry in found]
            awake, self._woken = woken != self._woken, woken
        return [delivery for delivery in taken if delivery is not None], awake, bell

    def _hold(
        self,
        epoch: str,
        stream: str,
        entry: str,
        hold: str,
        kind: str,
        job_id: str,
        payload: str,
        request_id: str,
        deaths: str,
        speaker: str,
    ) -> Delivery | None:
        """Remember what was taken. None for a call that is worked on here all along, and came back: that goes on."""
        delivery = Delivery(
            hold, kind, job_id, json.loads(payload) if payload else {}, request_id, int(deaths) + 1
        )
        held = _Held(delivery, stream, entry, hold, epoch)
        older = self._holding.get(job_id)
        if older is not None and kind in CALLS and not older.lost:
            if speaker in ("", older.delivery.id):
                older.stream, older.entry, older.hold, older.epoch = stream, entry, hold, epoch
                return None
            self._lose(older)  # another has spoken since, and died
        self._held[hold] = self._holding[job_id] = held
        return delivery

    def owns(self, delivery: Delivery) -> bool:
        with self._lock:
            held = self._held.get(delivery.id)
            return held is not None and not held.lost

    def done(self, delivery: Delivery) -> None:
        if held := self._of(delivery):
            self._step("done", self._name, held.stream, held.entry, delivery.job_id, held.hold)
            self._let_go(held)

    def give_back(self, delivery: Delivery) -> None:
        if held := self._of(delivery):
            payload = json.dumps(delivery.payload) if delivery.kind in CALLS else ""
            what = (delivery.kind, payload, delivery.request_id, delivery.deliveries - 1)
            where = (held.stream, held.entry, delivery.job_id, held.hold, held.epoch)
            self._step("give_back", self._name, *where, *what)
            self._let_go(held)

    def _of(self, delivery: Delivery) -> _Held | None:
        """How the delivery is held; None when it is not, and then nothing of it is kept here any more."""
        with self._lock:
            held = self._held.get(delivery.id)
            if held is not None and held.lost:
                self._let_go(held)
                return None
            return held

    def _let_go(self, held: _Held) -> None:
        with self._lock:
            self._held.pop(held.delivery.id, None)
            if self._holding.get(held.delivery.job_id) is held:
                del self._holding[held.delivery.job_id]

    def _lose(self, held: _Held) -> None:
        with self._lock:
            if held.lost:
                return
            held.lost = True
        metrics.LEASE_LOSSES.inc()
        delivery = held.delivery
        log.warning("lease lost", extra={"kind": delivery.kind, "job": delivery.job_id})

    def wake(self) -> None:
        self._step("wake")

    def waiting(self, kind: str) -> int:
        with answering():
            return int(self._redis.zcard(self._key("waiting", kind)))

    def oldest(self, kind: str) -> float:
        return float(self._step("oldest", kind)) / 1e6

    # leases

    def _keep_leases(self) -> None:
        with self._lock:
            if self._keeper is None and not self._closed.is_set():
                self._keeper = threading.Thread(target=self._keep, name="leases", daemon=True)
                self._keeper.start()

    def _keep(self) -> None:
        """Renew what is held here and find what nobody renews, on a clock of its own and a connection of its own."""
        connection = client(self._url, max(1.0, self.lease / 3))
        run = connection.register_script(STEPS)
        while not self._closed.wait(self.lease / 3):
            try:
                self._renew(run)
                self._reclaim(run)
            except Unavailable as error:
                log.warning("leases not renewed", extra={"detail": error.detail})
            except Exception:
                log.exception("leases not renewed")
        connection.close()

    def _renew(self, run: Any) -> None:
        with self._lock:
            every = [held for held in self._held.values() if not held.lost]
            where = [(h.stream, h.entry, h.epoch, h.delivery.job_id, h.hold) for h in every]
        if not every:
            return
        for place in self._step("renew", self._name, *chain(*where), run=run):
            if every[place].hold == where[place][-1]:  # and did not come back to us meanwhile
                self._lose(every[place])

    def _reclaim(self, run: Any) -> None:
        lease, failure = int(self.lease * 1000), json.dumps(DIED_TOO_OFTEN)
        for kind in KINDS:
            for where in ("first", "work"):
                cursor = "0-0"
                while True:
                    cursor, given_up = self._step(
                        "reclaim", where, kind, cursor, lease, self.max_deliveries, failure, run=run
                    )
                    for channel, request_id in given_up:
                        metrics.CALLS_GIVEN_UP.inc()
                        log.error(
                            "call given up", extra={"kind": kind, "job": channel, "request": request_id}
                        )
                    if cursor == "0-0":
                        break
        self._step("prune", "", 20 * lease, *self._streams(), run=run)

    # news

    def publish(self, channel: str, name: str, data: dict[str, Any], last: bool = False) -> None:
        self.publish_all([Message(channel, name, data, last)])

    def publish_all(self, messages: Sequence[Message]) -> None:
        with self._speech:
            said: dict[_Held, int] = {}
            arguments: list[str | int] = []
            for message in messages:
                with self._lock:
                    held = self._holding.get(message.channel)
                    if held is not None and held.lost:
                        continue
                hold = by = ""
                if held is not None and held.delivery.kind in CALLS:
                    hold, by = held.hold, held.delivery.id
                    said[held] = said.get(held, held.said) + 1
                number = said.get(held, 0) if held else 0
                body = (message.name, json.dumps(message.data), int(message.last))
                arguments += (message.channel, hold, by, number, *body)
            if not arguments:
                return
            fenced = set(self._step("publish", *arguments))
            for held, number in said.items():
                held.said = number
                if held.delivery.job_id in fenced:
                    self._lose(held)

    def events(self, channel: str, after: str | None = None) -> AsyncIterator[Event]:
        return self._listen(channel, after if after and re.fullmatch("[0-9]{1,19}", after) else "0")

    async def _listen(self, channel: str, seen: str) -> AsyncIterator[Event]:
        listener = await self._listener()
        out, hush = self._key("out", channel), self._key("hush", self._name)
        speaker = None if seen != "0" else ""  # not known yet
        down: float | None = None
        while not self._closed.is_set():
            try:
                if speaker is None:
                    speaker, over = await _heard(listener, out, seen)
                    if over:
                        return
                places = {out: f"{seen}-0", hush: "0"}
                found = await listener.xread(places, count=ROOM, block=int(BLOCK * 1000))
            except RedisError as error:
                down = down or time.monotonic()
                if (away := unavailable(error)) is None:
                    raise
                if time.monotonic() - down > PATIENCE:
                    raise away from None
                await asyncio.sleep(PAUSE)
                continue
            down = None
            for entry, said in (pair for stream, entries in found if stream == out for pair in entries):
                if speaker and said["by"] != speaker:
                    yield Event(seen, "restart", {})
                seen, speaker = entry.partition("-")[0], said["by"]
                yield Event(seen, said["name"], json.loads(said["data"]))
                if "last" in said:
                    return

    async def _listener(self) -> Any:
        """The client of the running event loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._loops:
            keeper = self._kept(loop)
            self._loops[loop] = (keeper, await anext(keeper))
        return self._loops[loop][1]

    async def _kept(self, loop: asyncio.AbstractEventLoop) -> AsyncGenerator[Any]:
        """A client that is closed when its loop ends: that is when asyncio closes what is still generating."""
        listener = async_client(self._url, ANSWER)
        try:
            yield listener
        finally:
            self._loops.pop(loop, None)
            await listener.aclose()

    def forget(self, channel: str) -> None:
        with answering():
            self._redis.delete(self._key("out", channel), self._key("cancel", channel))

    def cancel(self, channel: str) -> None:
        self._step("cancel", channel)
        self._looked = float("-inf")

    def cancelled(self, channel: str) -> bool:
        with self._lock:
            held = channel in self._holding
            if held and time.monotonic() - self._looked < FRESH:
                return channel in self._cancels
            every = list(self._holding) if held else [channel]
            self._looked = time.monotonic() if held else self._looked
        with answering():
            flags = self._redis.mget([self._key("cancel", name) for name in every])
        found = {name for name, flag in zip(every, flags, strict=True) if flag}
        if held:
            self._cancels = found
        return channel in found

    def close(self) -> None:
        """What is still held is taken over when its lease runs out."""
        if self._closed.is_set():
            return
        self._closed.set()
        with suppress(Unavailable):
            self._step("ring")
            with answering():
                hush = self._key("hush", self._name)
                self._redis.xadd(hush, {"closed": ""})
                self._redis.expire(hush, 60)
        with self._takes:
            self._takes.wait_for(lambda: self._taking == 0, ANSWER)
        if self._keeper is not None:
            self._keeper.join(ANSWER)
            with suppress(Unavailable):
                self._step("prune", self._name, NEVER, *self._streams())
        self._redis.close()

    # Redis

    def _key(self, *names: str) -> str:
        return ":".join((self._prefix, *names))

    def _streams(self) -> list[str]:
        return [self._key(where, kind) for kind in KINDS for where in ("first", "work")]

    def _step(self, step: str, *arguments: Any, run: Any = None) -> Any:
        with answering():
            return (run or self._run)(args=[step, self._prefix, *arguments])


async def _heard(listener: Any, out: str, seen: str) -> tuple[str, bool]:
    """Who said the last thing that a listener has heard, and whether that was the end."""
    before = await listener.xrevrange(out, f"{seen}-0", "-", count=1)
    newest = await listener.xrevrange(out, "+", "-", count=1)
    over = bool(newest) and newest == before and "last" in newest[0][1]
    return (before[0][1]["by"] if before else ""), over
