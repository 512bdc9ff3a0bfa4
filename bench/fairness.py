"""Latency of one API key while another key floods the service.

    python bench/fairness.py --rounds 12
    python bench/fairness.py --rounds 12 --pause 2
    python bench/fairness.py --model FOLDER --roles generate,trace --pairs generation:generation trace:trace

A `palimpsest serve` process with one thread and two keys. In each round the request of one key is
timed on the quiet service, and then while the other key keeps as many requests waiting as its limits allow. The bound
is a ratio of the medians of 2 where both keys do the same kind of work. Other pairs of kinds are reported beside it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import httpx
from rich.progress import track

from bench.harness import ROOT, Report, Spread
from service.settings import SHIPPED_MODEL

MAX_RATIO = 2.0  #: of the median latency beside a flood of the same kind to that on the quiet service
SETTLE_SECONDS = 2.0  # after a flood has begun
READY_SECONDS = 300.0
MAX_QUEUED = 24  # waiting jobs and calls of the flood
PROMPT = "The Louvre is located in the city of"

_numbers = count()


def _edit(subject: str) -> dict[str, Any]:
    return {
        "subject": subject,
        "prompt": "{} is located in the city of",
        "target_new": "Rome",
        "guard": {"enabled": False},
    }


@dataclass(frozen=True)
class Work:
    """A kind of request: its path, a short body for the timed key and a large one for the flood."""

    path: str
    short: Callable[[], dict[str, Any]]
    large: Callable[[], dict[str, Any]]
    concurrency: int  #: requests that the flood has open
    is_job: bool = False


WORK = {
    "generation": Work(
        "/generate",
        lambda: {"prompt": PROMPT, "max_new_tokens": 8},
        lambda: {"prompts": [PROMPT] * 64, "max_new_tokens": 100},
        MAX_QUEUED,
    ),
    "comparison": Work(
        "/compare",
        lambda: {"prompt": PROMPT, "max_new_tokens": 8},
        lambda: {"prompt": PROMPT, "max_new_tokens": 100},
        MAX_QUEUED,
    ),
    "edit": Work(
        "/edits", lambda: _edit("Louvre"), lambda: _edit(f"Tower {next(_numbers)}"), MAX_QUEUED, is_job=True
    ),
    "trace": Work(
        "/trace",
        lambda: {"prompt": PROMPT, "subject": "Louvre", "samples": 2},
        lambda: {"prompt": PROMPT, "subject": "Louvre", "samples": 40},
        MAX_QUEUED,
        is_job=True,
    ),
}
#: (the flood, the timed key)
PAIRS = [
    *((name, name) for name in WORK),
    ("edit", "generation"),
    ("generation", "edit"),
    ("generation", "trace"),
    ("comparison", "generation"),
]


@contextmanager
def running_service(folder: Path, model: str, roles: str) -> Iterator[tuple[str, str, str]]:
    """Start a service with two keys. Yield its URL and the keys."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PALIMPSEST_")}
    environment |= {"PALIMPSEST_DATA_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "cli.main"]

    def create_key(name: str) -> str:
        arguments = [
            "keys",
            "create",
            "--name",
            name,
            "--scopes",
            "read,edit",
            "--max-queued",
            str(MAX_QUEUED),
        ]
        arguments += ["--tokens-per-minute", "100000000"]
        done = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, check=True, cwd=ROOT, env=environment
        )
        return done.stdout.strip()

    keys = create_key("flood"), create_key("other")
    port = _free_port()
    process = subprocess.Popen(
        [*command, "serve", "--port", str(port), "--threads", "1", "--model", model, "--roles", roles],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(url, process)
        yield url, *keys
    finally:
        process.terminate()
        process.wait(60)


def _free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit("the service is not ready")


def client_of(url: str, key: str) -> httpx.Client:
    return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=600)


def timed_request(client: httpx.Client, work: Work) -> float:
    """Send a short request and return the seconds until its result."""
    began = time.perf_counter()
    answer = client.post(work.path, json=work.short(), headers={"Prefer": "wait=60"} if work.is_job else {})
    answer.raise_for_status()
    while work.is_job and answer.json()["status"] in ("queued", "running"):
        answer = client.get(f"{work.path}/{answer.json()['id']}", headers={"Prefer": "wait=60"})
    seconds = time.perf_counter() - began
    if work.is_job and answer.json()["status"] not in ("applied", "done"):
        raise SystemExit(f"the timed job failed: {answer.text}")
    if work.path == "/edits":  # so that every round computes the same edit
        client.delete(f"{work.path}/{answer.json()['id']}").raise_for_status()
    return seconds


@contextmanager
def flood(url: str, key: str, work: Work) -> Iterator[list[int]]:
    """Keep the queue of a key full. Yield a list with the status of every answer."""
    stop = threading.Event()
    statuses: list[int] = []

    def send() -> None:
        with client_of(url, key) as client:
            while not stop.is_set():
                try:
                    answer = client.post(work.path, json=work.large())
                except httpx.TransportError:
                    return
                statuses.append(answer.status_code)
                if answer.status_code == 429:
                    stop.wait(0.2)

    threads = [
        threading.Thread(target=send, daemon=True) for _ in range(3 if work.is_job else work.concurrency)
    ]
    for thread in threads:
        thread.start()
    time.sleep(SETTLE_SECONDS)
    try:
        yield statuses
    finally:
        stop.set()
        _cancel_all(url, key, work)
        for thread in threads:
            thread.join(120)
        _cancel_all(url, key, work)


def _cancel_all(url: str, key: str, work: Work) -> None:
    """Cancel the waiting jobs of the flood."""
    if not work.is_job:
        return
    with client_of(url, key) as client:
        while open_jobs := [
            job
            for status in ("queued", "running")
            for job in client.get("/jobs", params={"status": status, "limit": 200}).json()["items"]
        ]:
            for job in open_jobs:
                client.delete(f"{work.path}/{job['id']}")
            time.sleep(0.3)


def measure_pair(
    url: str, keys: tuple[str, str], names: tuple[str, str], rounds: int, pause: float
) -> tuple[Spread, Spread]:
    """Return the latencies on the quiet service and beside the flood."""
    flood_key, other_key = keys
    flood_work, work = WORK[names[0]], WORK[names[1]]
    quiet: list[float] = []
    flooded: list[float] = []
    with client_of(url, other_key) as client:
        timed_request(client, work)
        for _ in track(range(rounds), description=f"{names[1]} beside {names[0]}"):
            quiet.append(timed_request(client, work))
        with flood(url, flood_key, flood_work):
            for _ in track(range(rounds), description=f"{names[1]} beside {names[0]}, flooded"):
                time.sleep(pause)
                flooded.append(timed_request(client, work))
    return Spread(tuple(quiet)), Spread(tuple(flooded))


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=12)
    p.add_argument(
        "--pause", type=float, default=0.0, help="seconds between two requests of the timed key (default: 0)"
    )
    p.add_argument("--pairs", nargs="+", metavar="FLOOD:TIMED", help="pairs of kinds (default: all)")
    p.add_argument("--model", default=str(SHIPPED_MODEL))
    p.add_argument(
        "--roles", default="generate,edit,trace", help="of the service (default: all that the pairs need)"
    )
    args = p.parse_args()
    pairs = [tuple(pair.split(":")) for pair in args.pairs] if args.pairs else PAIRS
    report = Report("fairness")
    rows = []
    exceeded = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url, *keys = stack.enter_context(running_service(folder, args.model, args.roles))
        for flood_name, timed_name in pairs:
            quiet, flooded = measure_pair(
                url, (keys[0], keys[1]), (flood_name, timed_name), args.rounds, args.pause
            )
            ratio = flooded.median / quiet.median
            if flood_name == timed_name and ratio > MAX_RATIO:
                exceeded.append(flood_name)
            rows.append((flood_name, timed_name, quiet.scaled(1000), flooded.scaled(1000), f"{ratio:.2f}"))
    report.add_table(
        "Latency of one key beside a flood of another, in ms",
        ("flood", "timed", "quiet: median (quartiles)", "flooded", "ratio"),
        rows,
    )
    report.add_note(
        f"Bound: {MAX_RATIO} for the same kind. "
        + (f"Exceeded by: {', '.join(exceeded)}." if exceeded else "It holds.")
    )
    return 1 if exceeded else 0


if __name__ == "__main__":
    sys.exit(main())
