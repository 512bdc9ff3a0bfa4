"""Inject planned faults into a deployment. A fault with a duration ends in a thread, so that faults overlap."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import redis

from bench.chaos_plan import Fault
from bench.deployment import SupervisedDeployment, SupervisedProcess
from bench.proxy import LOCALHOST, Proxy
from tests.support.postgres_server import PostgresServer
from tests.support.redis_server import RedisServer

#: signals: PostgreSQL's fast and immediate shutdown, Redis's shutdown, and SIGKILL
STOP_SIGNALS = {
    "restart postgres": signal.SIGINT,
    "crash postgres": signal.SIGQUIT,
    "restart redis": signal.SIGTERM,
    "kill redis": signal.SIGKILL,
}


@dataclass(frozen=True)
class InjectedFault:
    """A fault and the time of its start."""

    started_at: float
    fault: Fault


class FaultInjector:
    """Injects faults. `inject` and `heal` are called by one thread."""

    def __init__(self, deployment: SupervisedDeployment) -> None:
        self.injected_faults: list[InjectedFault] = []
        self._deployment = deployment
        self._servers: dict[str, PostgresServer | RedisServer] = {
            "postgres": deployment.database_server,
            "redis": deployment.broker_server,
        }
        self._locks = {name: threading.Lock() for name in self._servers}  # one restart of a server at a time
        self._threads: list[threading.Thread] = []

    def inject(self, fault: Fault) -> None:
        """Start a fault."""
        verb, target = fault.kind.split()
        deployment = self._deployment
        self.injected_faults.append(InjectedFault(time.monotonic(), fault))
        if target in ("api", "worker"):
            self._signal_process(verb, fault, deployment.apis if target == "api" else deployment.workers)
        elif fault.kind in STOP_SIGNALS:
            self._run_in_background(self._restart, target, STOP_SIGNALS[fault.kind], fault.seconds)
        elif fault.kind == "empty redis":
            self._run_in_background(self._flush_redis)
        else:
            self._disrupt_network(
                verb, fault, deployment.redis_proxy if target == "redis" else deployment.postgres_proxy
            )

    def heal(self) -> None:
        """Wait until all faults have ended and the servers are running."""
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _signal_process(self, verb: str, fault: Fault, processes: Sequence[SupervisedProcess]) -> None:
        process = processes[fault.number % len(processes)]
        if verb == "kill":
            process.send_signal(signal.SIGKILL)
        else:
            process.send_signal(signal.SIGSTOP)
            self._run_after(fault.seconds, process.send_signal, signal.SIGCONT)

    def _disrupt_network(self, verb: str, fault: Fault, proxy: Proxy) -> None:
        getattr(proxy, verb)()
        if verb != "cut":
            self._run_after(fault.seconds, proxy.heal)

    def _restart(self, name: str, stop_signal: signal.Signals, seconds: float) -> None:
        server = self._servers[name]
        with self._locks[name]:
            server.stop(stop_signal)
            time.sleep(seconds)
            server.start()

    def _flush_redis(self) -> None:
        with (
            self._locks["redis"],
            redis.Redis(host=LOCALHOST, port=self._deployment.broker_server.port) as queue,
        ):
            queue.flushall()

    def _run_after(self, seconds: float, action: Callable[..., object], *arguments: Any) -> None:
        def later() -> None:
            time.sleep(seconds)
            action(*arguments)

        self._run_in_background(later)

    def _run_in_background(self, action: Callable[..., object], *arguments: Any) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=action, args=arguments, name="fault", daemon=True)
        thread.start()
        self._threads.append(thread)
