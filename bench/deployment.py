"""A deployment on loopback: durable PostgreSQL and Redis, each behind a proxy, API processes and workers.

A supervisor restarts processes that exit. An exit of a process that the bench did not kill is recorded as a defect.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import redis

from bench.client_log import Resource
from bench.proxy import LOCALHOST, Proxy
from tests.support import postgres_server, redis_server

ROOT = Path(__file__).resolve().parent.parent


REDIS_PREFIX = "chaos"
READY_TIMEOUT = 300.0  # seconds within which the deployment becomes ready
SUPERVISOR_INTERVAL = 0.2  # seconds between two checks of the supervisor
RESTART_DELAY = 1.0  # seconds before an exited process is restarted


@dataclass
class SupervisedProcess:
    """A process of the service that is restarted under one name. `unexpected_exits` are the exits that the
    bench did not cause by SIGKILL."""

    name: str
    arguments: Sequence[str]
    log: Path
    environment: dict[str, str]
    unexpected_exits: list[str] = field(default_factory=list)
    starts: int = 0
    _running: subprocess.Popen[bytes] | None = None
    _killed: bool = False

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._running = subprocess.Popen(
                [sys.executable, "-m", "cli.main", *self.arguments],
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env=self.environment,
            )
        self._killed = False
        self.starts += 1

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the running process, if there is one."""
        if self._running is not None and self._running.poll() is None:
            self._killed |= number == signal.SIGKILL
            self._running.send_signal(number)

    def has_exited(self) -> bool:
        """Return whether the process has exited; record the exit if the bench did not kill it."""
        if self._running is None or self._running.poll() is None:
            return self._running is None
        if not self._killed:
            self.unexpected_exits.append(f"{self.name} ended with {self._running.returncode}: see {self.log}")
        self._running = None
        return True

    def kill(self) -> None:
        if self._running is not None:
            self.send_signal(signal.SIGKILL)
            self._running.wait()

    def stop(self) -> None:
        """Send SIGTERM and record an exit code other than 0."""
        if self._running is None:
            return
        self.send_signal(signal.SIGCONT)
        self.send_signal(signal.SIGTERM)
        try:
            code = self._running.wait(READY_TIMEOUT)
            if code != 0:
                self.unexpected_exits.append(f"{self.name} ended with {code} after SIGTERM: see {self.log}")
        except subprocess.TimeoutExpired:
            self.unexpected_exits.append(f"{self.name} did not stop after SIGTERM")
            self._running.kill()
            self._running.wait()
        self._running = None


class SupervisedDeployment:
    """The processes of a deployment, supervised from `start` to `stop`. Created by `managed_deployment`."""

    def __init__(
        self,
        database_server: postgres_server.PostgresServer,
        broker_server: redis_server.RedisServer,
        logs: Path,
        workers: int,
        apis: int,
        lease: float,
        flags: Sequence[str] = (),
        direct: bool = False,
    ) -> None:
        self.database_server, self.broker_server, self.logs, self.lease = (
            database_server,
            broker_server,
            logs,
            lease,
        )
        self.postgres_proxy, self.redis_proxy = Proxy(database_server.port), Proxy(broker_server.port)
        self.database_url = (
            database_server.url
            if direct
            else f"postgresql://postgres@{LOCALHOST}:{self.postgres_proxy.port}/postgres"
        )
        self.redis_url = broker_server.url if direct else f"redis://{LOCALHOST}:{self.redis_proxy.port}/0"
        self.data_dir = logs / "data"  # shared, so that all processes have one key of the ledger
        common = ["--database-url", self.database_url, "--redis-url", self.redis_url]
        common += ["--data-dir", str(self.data_dir)]
        common += [
            "--redis-prefix",
            REDIS_PREFIX,
            "--worker-timeout",
            str(lease),
            "--log-level",
            "info",
            *flags,
        ]
        ports = _free_ports(apis)
        self.addresses = [f"http://{LOCALHOST}:{port}" for port in ports]
        self.apis = [
            self._process(f"api{i}", "api", "--development", "--port", str(p), *common)
            for i, p in enumerate(ports)
        ]
        worker = ["worker", "--threads", "1", *common]
        self.workers = [self._process(f"worker{i}", *worker) for i in range(workers)]
        self._stop = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, name="supervisor", daemon=True)

    def _process(self, name: str, *arguments: str) -> SupervisedProcess:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PALIMPSEST_")}
        return SupervisedProcess(
            name, arguments, self.logs / f"{name}.log", environment | {"OMP_NUM_THREADS": "1"}
        )

    @property
    def processes(self) -> list[SupervisedProcess]:
        return [*self.apis, *self.workers]

    def start(self) -> None:
        """Start the APIs and one worker, which collects the key statistics; then the other workers, which load them."""
        for process in [*self.apis, *self.workers[:1]]:
            process.start()
        wait_until(lambda: self._count_workers_at_head() > 0, "the first worker", READY_TIMEOUT)
        for process in self.workers[1:]:
            process.start()
        self._supervisor.start()
        self.wait_until_ready()

    def stop(self) -> list[str]:
        """Stop every process with SIGTERM. Return the unexpected exits of the whole run."""
        self._stop_supervisor()
        stopping = [threading.Thread(target=process.stop) for process in self.processes]
        for thread in stopping:
            thread.start()
        for thread in stopping:
            thread.join()
        return [words for process in self.processes for words in process.unexpected_exits]

    def kill_all(self) -> None:
        """Kill every running process and close the proxies."""
        self._stop_supervisor()
        for process in self.processes:
            process.kill()
        self.postgres_proxy.close()
        self.redis_proxy.close()

    def _stop_supervisor(self) -> None:
        self._stop.set()
        if self._supervisor.is_alive():
            self._supervisor.join()

    def _supervise(self) -> None:
        exited_at: dict[str, float] = {}
        while not self._stop.wait(SUPERVISOR_INTERVAL):
            for process in self.processes:
                if not process.has_exited():
                    exited_at.pop(process.name, None)
                elif time.monotonic() - exited_at.setdefault(process.name, time.monotonic()) > RESTART_DELAY:
                    process.start()

    # state

    def get(self, path: str, **params: Any) -> Resource:
        answer = httpx.get(self.addresses[0] + path, params=params, timeout=60)
        answer.raise_for_status()
        return answer.json()  # type: ignore[no-any-return]

    def list_all(self, path: str) -> list[Resource]:
        """Return every item of a paginated list."""
        items, cursor = [], None
        while True:
            page = self.get(path, limit=200, **({"cursor": cursor} if cursor else {}))
            items += page["items"]
            if (cursor := page["next"]) is None:
                return items

    def model(self) -> Resource:
        model: Resource = self.get("/models")["items"][0]
        return model

    def wait_until_ready(self) -> None:
        """Wait until every API is ready and every worker serves head."""
        wait_until(
            lambda: self._count_workers_at_head() == len(self.workers),
            "all processes to serve",
            READY_TIMEOUT,
        )

    def _count_workers_at_head(self) -> int:
        """Return how many workers serve head; 0 while an API is not ready or a dead worker is still listed."""
        with suppress(httpx.HTTPError):
            if all(httpx.get(f"{address}/readyz", timeout=10).is_success for address in self.addresses):
                model = self.model()
                at_head = [w for w in model["workers"] if w["version"] == model["head"]]
                return len(at_head) if len(at_head) == len(model["workers"]) else 0
        return 0

    def queue_leftovers(self) -> list[str]:
        """Return what is left in Redis: streams with entries, waiting ids, and leases."""
        with redis.Redis(host=LOCALHOST, port=self.broker_server.port, decode_responses=True) as queue:
            leftovers = []
            for key in sorted(queue.scan_iter(f"{REDIS_PREFIX}:*", count=1000)):
                kind = key.removeprefix(f"{REDIS_PREFIX}:").split(":")[0]
                if kind in ("work", "first"):
                    pending = sum(group["pending"] for group in queue.xinfo_groups(key))
                    if pending or queue.xlen(key):
                        leftovers.append(f"{key}: {queue.xlen(key)} entries, {pending} pending")
                elif kind == "waiting" and queue.zcard(key):
                    leftovers.append(f"{key}: {queue.zcard(key)} waiting")
                elif kind == "owner":
                    leftovers.append(f"{key} is leased by {queue.get(key)}")
            return leftovers


@contextmanager
def managed_deployment(
    logs: Path,
    workers: int = 3,
    apis: int = 2,
    lease: float = 3.0,
    flags: Sequence[str] = (),
    direct: bool = False,
) -> Iterator[SupervisedDeployment]:
    """Create a deployment with its own servers, not yet started. On exit, kill its remaining processes.

    With `direct`, processes connect to the servers without the proxies.
    """
    with (
        postgres_server.run_postgres(durable=True) as database_server,
        redis_server.run_redis(durable=True, fsync="everysec") as broker_server,
    ):
        deployment = SupervisedDeployment(
            database_server, broker_server, logs, workers, apis, lease, flags, direct
        )
        try:
            yield deployment
        finally:
            deployment.kill_all()


def wait_until(condition: Callable[[], Any], description: str, timeout: float) -> None:
    """Poll until a condition is true; raise TimeoutError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:.0f} s for {description}")
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    probes = [socket.create_server((LOCALHOST, 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
