"""Latency that HTTP, Redis, PostgreSQL and a worker process add to a short generation.

    python bench/http_overhead.py --repeat 300

The baseline is the engine in process, with MemoryBroker and SQLite. It is compared with the same request over
a persistent HTTP connection to `palimpsest api`, which passes it through Redis to `palimpsest worker`. Both
have the same model and one thread, and are measured in turn, a few requests at a time. Under load, a second
client sends requests to the side that is measured.
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

from bench.deployment import REDIS_PREFIX, SupervisedDeployment, managed_deployment
from cli.worker_process import make_worker
from service.bootstrap import Container, build_container
from service.jobs.broker import Broker
from service.ledger import ledger
from service.schemas import GenerateRequest
from service.settings import Settings

MAX_ADDED_MS = 10.0  #: limit of the added milliseconds, as a median
REQUESTS_PER_TURN = 10  #: consecutive requests on one side
WARMUP_REQUESTS = 30
TINY_REQUEST = {"prompt": "The Louvre is located in the city of", "max_new_tokens": 1}
LOAD_REQUEST = {"prompt": "The Louvre is located in the city of", "max_new_tokens": 12}
LOAD_INTERVAL = 0.1  #: seconds between two requests of the second client

console = Console(stderr=True)
SendRequest = Callable[[dict[str, Any]], Any]
Timings = dict[str, list[float]]


async def _wait_for_end(broker: Broker, channel: str) -> dict[str, Any]:
    async with aclosing(broker.events(channel)) as events:  # type: ignore[type-var]
        async for event in events:
            if event.name == "end":
                return event.data
    raise RuntimeError("the channel closed without an end")


class InProcessClient:
    """The baseline: a worker in a thread of this process, called through the broker."""

    def __init__(self, folder: Path) -> None:
        settings = Settings(data_dir=folder, threads=1, redis_url=None, database_url=None)
        self.container = build_container(settings)
        self.worker = make_worker(settings, self.container)
        self._loops = threading.local()

    def start(self) -> None:
        self.worker.start_in_thread()
        while not self.worker.ready.wait(0.2):
            self.worker.check()

    def send(self, body: dict[str, Any]) -> dict[str, Any]:
        payload = GenerateRequest(**body).model_dump(mode="json")
        channel = self.container.broker.send_call("generate", payload)
        return self._loop().run_until_complete(_wait_for_end(self.container.broker, channel))

    def _loop(self) -> asyncio.AbstractEventLoop:
        if not hasattr(self._loops, "loop"):
            self._loops.loop = asyncio.new_event_loop()
        return self._loops.loop  # type: ignore[no-any-return]

    def close(self) -> None:
        self.worker.stop()
        self._loop().close()
        self.container.close()


class HttpClient:
    """The production wiring, over persistent connections."""

    def __init__(self, deployment: SupervisedDeployment) -> None:
        self._address = deployment.addresses[0]
        self._clients = threading.local()

    def send(self, body: dict[str, Any]) -> dict[str, Any]:
        answer = self.client().post("/generate", json=body)
        answer.raise_for_status()
        return answer.json()  # type: ignore[no-any-return]

    def client(self) -> httpx.Client:
        if not hasattr(self._clients, "client"):
            self._clients.client = httpx.Client(base_url=self._address, timeout=60)
        return self._clients.client  # type: ignore[no-any-return]


@contextmanager
def background_load(send: SendRequest) -> Iterator[None]:
    """Run a second client that sends longer requests."""
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.wait(LOAD_INTERVAL):
            send(LOAD_REQUEST)

    load_thread = threading.Thread(target=keep_asking)
    load_thread.start()
    try:
        yield
    finally:
        stop.set()
        load_thread.join()


def time_alternately(sides: dict[str, SendRequest], repeat: int, load: bool, what: str) -> Timings:
    """Return the milliseconds of every request by side; "decode" is the time that the worker reports."""
    timings: Timings = {name: [] for name in (*sides, "decode")}
    for _ in track(range(repeat // REQUESTS_PER_TURN), what, console=console, transient=True):
        for name, send in sides.items():
            with background_load(send) if load else _no_load():
                for _ in range(REQUESTS_PER_TURN):
                    began = time.perf_counter()
                    answer = send(TINY_REQUEST)
                    timings[name].append(1000 * (time.perf_counter() - began))
                    if name == "by HTTP":
                        timings["decode"].append(1000 * answer["seconds"])
    return timings


@contextmanager
def _no_load() -> Iterator[None]:
    yield


# components


def time_components(
    deployment: SupervisedDeployment, http_client: HttpClient, repeat: int, folder: Path
) -> Timings:
    """Time each component alone on the same servers."""
    settings = Settings(
        data_dir=folder,
        database_url=deployment.database_url,
        redis_url=deployment.redis_url,
        redis_prefix=f"{REDIS_PREFIX}-pieces",
    )
    container = build_container(settings)
    fingerprint = container.services.models.describe()["fingerprint"]
    try:
        components = {
            "HTTP alone (GET /healthz)": lambda: http_client.client().get("/healthz"),
            "API: validation and the call": lambda: container.services.generation.generate(
                GenerateRequest(**TINY_REQUEST)
            ),
            "worker: read the ledger's head": lambda: _ledger_head(container, fingerprint),
        }
        timings = {name: _time_calls(act, repeat) for name, act in components.items()}
        return timings | {
            "Redis: send, receive, publish, ack, read": _time_redis_round_trip(container.broker, repeat)
        }
    finally:
        container.close()


def _ledger_head(container: Container, fingerprint: str) -> int:
    with container.database.autocommit_read() as connection:
        return ledger.head(connection, fingerprint)


def _time_calls(action: Callable[[], object], repeat: int) -> list[float]:
    milliseconds = []
    for _ in range(repeat):
        began = time.perf_counter()
        action()
        milliseconds.append(1000 * (time.perf_counter() - began))
    return milliseconds


def _time_redis_round_trip(broker: Broker, repeat: int) -> list[float]:
    """Time a call that another thread answers at once, from its submission to its end event."""
    while deliveries := broker.receive(("generate",), 1000, 0):  # calls left by the timing of validation
        for delivery in deliveries:
            broker.ack(delivery)
    stop = threading.Event()

    def echo() -> None:
        while not stop.is_set():
            for delivery in broker.receive(("generate",), 1, 1.0):
                broker.publish(delivery.job_id, "end", {"text": ""}, last=True)
                broker.ack(delivery)

    echo_thread = threading.Thread(target=echo)
    echo_thread.start()
    loop = asyncio.new_event_loop()
    try:
        payload = GenerateRequest(**TINY_REQUEST).model_dump(mode="json")

        def round_trip() -> None:
            loop.run_until_complete(_wait_for_end(broker, broker.send_call("generate", payload)))

        return _time_calls(round_trip, repeat)
    finally:
        stop.set()
        broker.wake()
        echo_thread.join()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


# the report


def print_timings(title: str, timings: Timings) -> None:
    table = Table(title=title)
    for name in ("milliseconds", "count", "median", "p10", "p90", "p99"):
        table.add_column(name, justify="left" if name == "milliseconds" else "right")
    for name, values in timings.items():
        figures = (np.quantile(values, q) for q in (0.5, 0.1, 0.9, 0.99))
        table.add_row(name, str(len(values)), *(f"{x:.2f}" for x in figures))
    console.print(table)


def added_milliseconds(timings: Timings) -> float:
    """Return the difference of the medians in milliseconds."""
    return float(np.median(timings["by HTTP"]) - np.median(timings["engine in process"]))


def run_measurements(repeat: int, folder: Path) -> dict[str, Timings]:
    torch.set_num_threads(1)
    in_process_client = InProcessClient(folder / "near")
    with managed_deployment(folder, workers=1, apis=1, lease=30.0, direct=True) as deployment:
        deployment.start()
        in_process_client.start()
        http_client = HttpClient(deployment)
        sides: dict[str, SendRequest] = {
            "engine in process": in_process_client.send,
            "by HTTP": http_client.send,
        }
        try:
            time_alternately(sides, WARMUP_REQUESTS, load=False, what="warming up")
            results = {
                "alone": time_alternately(sides, repeat, load=False, what="alone"),
                "beside another client": time_alternately(sides, repeat, load=True, what="under load"),
                "each component alone": time_components(deployment, http_client, repeat, folder / "pieces"),
            }
        finally:
            in_process_client.close()
        deployment.stop()
    return results


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repeat", type=int, default=300)
    p.add_argument("--json", type=Path, metavar="FILE", help="write the timings to FILE")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="roundtrip"))
    try:
        results = run_measurements(args.repeat, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for title, timings in results.items():
        print_timings(title, timings)
    overhead = added_milliseconds(results["alone"])
    comparison = "within" if overhead <= MAX_ADDED_MS else "ABOVE"
    console.print(
        f"median overhead: {overhead:.2f} ms alone, {comparison} {MAX_ADDED_MS:.0f} ms;",
        end=" ",
    )
    console.print(f"{added_milliseconds(results['beside another client']):.2f} ms beside another client")
    if args.json:
        args.json.write_text(json.dumps(results), encoding="utf-8")
    return 0 if overhead <= MAX_ADDED_MS else 1


if __name__ == "__main__":
    sys.exit(main())
