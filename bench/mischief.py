"""Carries out planned faults on a deployment. What lasts is ended by a thread beside the next ones: faults overlap."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import redis

from bench.deployment import Deployment, Process
from bench.plan import Fault
from bench.proxy import HERE, Proxy

#: how a server is ended: PostgreSQL's fast and immediate shutdown, Redis's shutdown and its sudden death
ENDINGS = {
    "restart postgres": signal.SIGINT,
    "crash postgres": signal.SIGQUIT,
    "restart redis": signal.SIGTERM,
    "kill redis": signal.SIGKILL,
}


@dataclass(frozen=True)
class Done:
    """A fault that was begun, and when."""

    at: float
    fault: Fault


class Mischief:
    """`do` and `heal` belong to one thread."""

    def __init__(self, deployment: Deployment) -> None:
        self.done: list[Done] = []
        self._deployment = deployment
        self._servers = {"postgres": deployment.store, "redis": deployment.queue}
        self._locks = {name: threading.Lock() for name in self._servers}  # one restart of a server at a time
        self._lasting: list[threading.Thread] = []

    def do(self, fault: Fault) -> None:
        """Begin a fault."""
        verb, what = fault.kind.split()
        house = self._deployment
        self.done.append(Done(time.monotonic(), fault))
        if what in ("api", "worker"):
            self._disturb(verb, fault, house.apis if what == "api" else house.workers)
        elif fault.kind in ENDINGS:
            self._beside(self._restart, what, ENDINGS[fault.kind], fault.seconds)
        elif fault.kind == "empty redis":
            self._beside(self._empty)
        else:
            self._come_between(verb, fault, house.redis if what == "redis" else house.postgres)

    def heal(self) -> None:
        """End what still lasts, and wait until the servers are back."""
        for thread in self._lasting:
            thread.join()
        self._lasting = []

    def _disturb(self, verb: str, fault: Fault, crowd: Sequence[Process]) -> None:
        process = crowd[fault.number % len(crowd)]
        if verb == "kill":
            process.send(signal.SIGKILL)
        else:
            process.send(signal.SIGSTOP)
            self._after(fault.seconds, process.send, signal.SIGCONT)

    def _come_between(self, verb: str, fault: Fault, proxy: Proxy) -> None:
        getattr(proxy, verb)()
        if verb != "cut":
            self._after(fault.seconds, proxy.heal)

    def _restart(self, name: str, how: signal.Signals, seconds: float) -> None:
        server = self._servers[name]
        with self._locks[name]:
            server.stop(how)
            time.sleep(seconds)
            server.start()

    def _empty(self) -> None:
        with self._locks["redis"], redis.Redis(host=HERE, port=self._deployment.queue.port) as queue:
            queue.flushall()

    def _after(self, seconds: float, act: Callable[..., object], *arguments: Any) -> None:
        def later() -> None:
            time.sleep(seconds)
            act(*arguments)

        self._beside(later)

    def _beside(self, act: Callable[..., object], *arguments: Any) -> None:
        self._lasting = [thread for thread in self._lasting if thread.is_alive()]
        thread = threading.Thread(target=act, args=arguments, name="mischief", daemon=True)
        thread.start()
        self._lasting.append(thread)
