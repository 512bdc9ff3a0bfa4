"""What the way through HTTP, Redis, PostgreSQL and a worker's process adds to a tiny generation.

    python bench/roundtrip.py --repeat 300

The baseline is the engine called in process: one process, MemoryBroker and SQLite, the request put into the broker by the
thread that then hears its end. Beside it: the same request by HTTP on a connection that stays open, to `palimpsest api`,
which passes it through Redis to `palimpsest work`. Both have the same model, one thread, and take turns; each turn is a few
requests. Under load another client keeps whichever side has its turn speaking.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.deployment import PREFIX, Deployment, deployed
from cli.worker_process import make_worker
from service.bootstrap import Wired, wire
from service.jobs.broker import Broker
from service.ledger import ledger
from service.schemas import GenerateRequest
from service.settings import Settings

LIMIT = 10.0  #: milliseconds that may be added, as a median
TURN = 10  #: requests in a row on one side
WARM = 30
TINY = {"prompt": "The Louvre is located in the city of", "max_new_tokens": 1}
LOAD = {"prompt": "The Louvre is located in the city of", "max_new_tokens": 12}
LOAD_PAUSE = 0.1  #: seconds between two requests of the other client

console = Console(stderr=True)
Ask = Callable[[dict[str, Any]], Any]
Timings = dict[str, list[float]]


async def _end(broker: Broker, channel: str) -> dict[str, Any]:
    async with aclosing(broker.events(channel)) as events:  # type: ignore[type-var]
        async for event in events:
            if event.name == "end":
                return event.data
    raise RuntimeError("the channel closed without an end")


class InProcess:
    """The baseline: a worker in a thread of this process, and the broker between us."""

    def __init__(self, folder: Path) -> None:
        settings = Settings(data=folder, threads=1, redis_url=None, database_url=None)
        self.wired = wire(settings)
        self.worker = make_worker(settings, self.wired)
        self._loops = threading.local()

    def start(self) -> None:
        self.worker.start_in_thread()
        while not self.worker.ready.wait(0.2):
            self.worker.check()

    def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        payload = GenerateRequest(**body).model_dump(mode="json")
        channel = self.wired.broker.call("generate", payload)
        return self._loop().run_until_complete(_end(self.wired.broker, channel))

    def _loop(self) -> asyncio.AbstractEventLoop:
        if not hasattr(self._loops, "loop"):
            self._loops.loop = asyncio.new_event_loop()
        return self._loops.loop  # type: ignore[no-any-return]

    def close(self) -> None:
        self.worker.stop()
        self._loop().close()
        self.wired.close()


class ByHttp:
    """The production shape, asked by clients that keep their connection."""

    def __init__(self, house: Deployment) -> None:
        self._address = house.addresses[0]
        self._clients = threading.local()

    def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        answer = self.client().post("/generate", json=body)
        answer.raise_for_status()
        return answer.json()  # type: ignore[no-any-return]

    def client(self) -> httpx.Client:
        if not hasattr(self._clients, "client"):
            self._clients.client = httpx.Client(base_url=self._address, timeout=60)
        return self._clients.client  # type: ignore[no-any-return]


@contextmanager
def loaded(ask: Ask) -> Iterator[None]:
    """Another client that keeps asking for a longer answer."""
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.wait(LOAD_PAUSE):
            ask(LOAD)

    other = threading.Thread(target=keep_asking)
    other.start()
    try:
        yield
    finally:
        stop.set()
        other.join()


def alternate(sides: dict[str, Ask], repeat: int, load: bool, what: str) -> Timings:
    """Milliseconds of every request, the sides taking turns; "decode" is what the worker says that it needed."""
    found: Timings = {name: [] for name in (*sides, "decode")}
    for _ in track(range(repeat // TURN), what, console=console, transient=True):
        for name, ask in sides.items():
            with loaded(ask) if load else _nothing():
                for _ in range(TURN):
                    began = time.perf_counter()
                    answer = ask(TINY)
                    found[name].append(1000 * (time.perf_counter() - began))
                    if name == "by HTTP":
                        found["decode"].append(1000 * answer["seconds"])
    return found


@contextmanager
def _nothing() -> Iterator[None]:
    yield


# where the time goes


def pieces(house: Deployment, over: ByHttp, repeat: int, folder: Path) -> Timings:
    """Each part of the way alone, on the same servers: what is left of the whole is the passing from hand to hand."""
    settings = Settings(
        data=folder,
        database_url=house.database_url,
        redis_url=house.redis_url,
        redis_prefix=f"{PREFIX}-pieces",
    )
    wired = wire(settings)
    fingerprint = wired.operations.models.resident()["fingerprint"]
    try:
        parts = {
            "HTTP without work (GET /healthz)": lambda: over.client().get("/healthz"),
            "API: checks and the call": lambda: wired.operations.calls.generate(GenerateRequest(**TINY)),
            "worker: the ledger's head": lambda: _head(wired, fingerprint),
        }
        found = {name: _timed(act, repeat) for name, act in parts.items()}
        return found | {"Redis: call, take, publish, done, hear": _through_redis(wired.broker, repeat)}
    finally:
        wired.close()


def _head(wired: Wired, fingerprint: str) -> int:
    with wired.database.glance() as connection:
        return ledger.head(connection, fingerprint)


def _timed(act: Callable[[], object], repeat: int) -> list[float]:
    found = []
    for _ in range(repeat):
        began = time.perf_counter()
        act()
        found.append(1000 * (time.perf_counter() - began))
    return found


def _through_redis(broker: Broker, repeat: int) -> list[float]:
    """A call that is answered at once by another thread, until its end is heard. Nothing is computed."""
    while taken := broker.take(("generate",), 1000, 0):  # what the timing of the checks has left
        for delivery in taken:
            broker.done(delivery)
    stop = threading.Event()

    def echo() -> None:
        while not stop.is_set():
            for delivery in broker.take(("generate",), 1, 1.0):
                broker.publish(delivery.job_id, "end", {"text": ""}, last=True)
                broker.done(delivery)

    other = threading.Thread(target=echo)
    other.start()
    loop = asyncio.new_event_loop()
    try:
        payload = GenerateRequest(**TINY).model_dump(mode="json")
        once = lambda: loop.run_until_complete(_end(broker, broker.call("generate", payload)))  # noqa: E731
        return _timed(once, repeat)
    finally:
        stop.set()
        broker.wake()
        other.join()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


# the report


def show(title: str, timings: Timings) -> None:
    table = Table(title=title)
    for name in ("milliseconds", "count", "median", "p10", "p90", "p99"):
        table.add_column(name, justify="left" if name == "milliseconds" else "right")
    for name, values in timings.items():
        figures = (np.quantile(values, q) for q in (0.5, 0.1, 0.9, 0.99))
        table.add_row(name, str(len(values)), *(f"{x:.2f}" for x in figures))
    console.print(table)


def added(timings: Timings) -> float:
    """Milliseconds between the medians."""
    return float(np.median(timings["by HTTP"]) - np.median(timings["engine in process"]))


def measure(repeat: int, folder: Path) -> dict[str, Timings]:
    torch.set_num_threads(1)
    near = InProcess(folder / "near")
    with deployed(folder, workers=1, apis=1, lease=30.0, direct=True) as house:
        house.start()
        near.start()
        over = ByHttp(house)
        sides: dict[str, Ask] = {"engine in process": near.ask, "by HTTP": over.ask}
        try:
            alternate(sides, WARM, load=False, what="warming up")
            found = {
                "alone": alternate(sides, repeat, load=False, what="alone"),
                "beside another client": alternate(sides, repeat, load=True, what="under load"),
                "where the time goes: each part alone": pieces(house, over, repeat, folder / "pieces"),
            }
        finally:
            near.close()
        house.stop()
    return found


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repeat", type=int, default=300)
    p.add_argument("--json", type=Path, metavar="FILE", help="keep the timings")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="roundtrip"))
    try:
        found = measure(args.repeat, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for title, timings in found.items():
        show(title, timings)
    much = added(found["alone"])
    word = "within" if much <= LIMIT else "ABOVE"
    console.print(f"added by the way, as a median: {much:.2f} ms alone, {word} {LIMIT:.0f} ms;", end=" ")
    console.print(f"{added(found['beside another client']):.2f} ms beside another client")
    if args.json:
        args.json.write_text(json.dumps(found), encoding="utf-8")
    return 0 if much <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
