"""The real service in processes of its own, as a person starts it, and a client that speaks HTTP to it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import redis

from tests.support.free_ports import free_port
from tests.support.paths import ROOT

Resource = dict[str, Any]

LEASE = 2  # seconds; a worker that is killed is missed soon
PATIENCE = 300.0  # seconds after which something that should have come never will
ADDRESS = re.compile(r"Palimpsest is ready on (http://\S+)")
#: an edit that is there to land and not to be good: few contexts, few steps, and no guard
QUICK: Resource = {"hparams": {"contexts": 2, "steps": 5}, "guard": {"enabled": False}}


def until(true: Callable[[], Any], what: str) -> Any:
    """What `true` gives, as soon as it gives something."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := true():
            return found
        time.sleep(0.02)
    raise AssertionError(f"waited {PATIENCE:.0f} s in vain for {what}")


class Process:
    """One `palimpsest` command. Settings are its environment, and nothing of the machine's is."""

    def __init__(self, folder: Path, *command: str, **settings: object) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.name = f"palimpsest {command[0]}"
        self._said, self._log = folder / "stdout.txt", folder / "stderr.txt"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PALIMPSEST_")}
        environment |= {f"PALIMPSEST_{k.upper()}": str(v) for k, v in settings.items() if v is not None}
        line = [sys.executable, "-m", "cli.main", *command]
        with self._said.open("wb") as out, self._log.open("wb") as err:
            self._process = subprocess.Popen(line, stdout=out, stderr=err, cwd=ROOT, env=environment)
        self.pid = self._process.pid

    def said(self) -> str:
        return self._said.read_text(encoding="utf-8", errors="replace")

    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def alive(self) -> bool:
        return self._process.poll() is None

    def ended(self) -> int:
        """Its exit code, once it has ended; that of one killed by a signal is the signal's number, negative."""
        return self._process.wait(PATIENCE)

    def stop(self) -> None:
        """SIGTERM: it ends with 0 and has nothing to complain about."""
        if self.alive():
            self._process.send_signal(signal.SIGTERM)
        code = self.ended()
        assert code == 0, f"{self.name} ended with {code}:\n{self.log()}"
        assert "Traceback" not in self.log(), self.log()

    def kill(self) -> None:
        """SIGKILL: nothing is tidied up."""
        self._process.kill()
        self.ended()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """SIGSTOP, and SIGCONT at the end: as when its machine falls asleep for a while."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """The other way round, for one that is frozen."""
        self._process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGSTOP)


class Client:
    """What a client does, on a service of whatever shape."""

    http: httpx.Client

    def get(self, path: str, **params: Any) -> Resource:
        answer = self.http.get(path, params=params)
        assert answer.is_success, answer.text
        return answer.json()  # type: ignore[no-any-return]

    def pages(self, path: str, **params: Any) -> list[Resource]:
        """Every item of a list."""
        items: list[Resource] = []
        after: Resource = {}
        while True:
            page = self.get(path, limit=200, **after, **params)
            items += page["items"]
            if page["next"] is None:
                return items
            after = {"cursor": page["next"]}

    def generate(self, prompt: str, **asked: Any) -> Resource:
        body = {"prompt": prompt, "max_new_tokens": 5, **asked}
        answer = self.http.post("/generate", json=body)
        assert answer.is_success, answer.text
        return answer.json()  # type: ignore[no-any-return]

    def texts(self, prompts: list[str], **asked: Any) -> list[str]:
        """What follows each of many prompts."""
        found: list[str] = []
        for at in range(0, len(prompts), 64):
            body = {"prompts": prompts[at : at + 64], "max_new_tokens": 5, **asked}
            answer = self.http.post("/generate", json=body)
            assert answer.is_success, answer.text
            found += [choice["text"] for choice in answer.json()["choices"]]
        return found

    def ask(self, subject: str, prompt: str, target_new: str, **more: Any) -> Resource:
        """Queue an edit and go on."""
        headers = more.pop("headers", {})
        body = {"subject": subject, "prompt": prompt, "target_new": target_new, **more}
        answer = self.http.post("/edits", json=body, headers=headers)
        assert answer.status_code in (200, 202), answer.text
        return answer.json()  # type: ignore[no-any-return]

    def edit(self, subject: str, prompt: str, target_new: str, **more: Any) -> Resource:
        """Ask for an edit and wait for its end."""
        return self.ended(self.ask(subject, prompt, target_new, headers={"Prefer": "wait=60"}, **more))

    def ended(self, edit: Resource) -> Resource:
        """The edit, once it has ended."""

        def look() -> Resource | None:
            answer = self.http.get(f"/edits/{edit['id']}", headers={"Prefer": "wait=60"})
            assert answer.is_success, answer.text
            found: Resource = answer.json()
            return None if found["status"] in ("queued", "running") else found

        return until(look, f"the end of {edit['id']}")  # type: ignore[no-any-return]

    def revert(self, edit: Resource) -> Resource:
        answer = self.http.delete(f"/edits/{edit['id']}", headers={"Prefer": "wait=60"})
        assert answer.status_code == 200, answer.text
        return answer.json()  # type: ignore[no-any-return]

    def head(self) -> int:
        return int(self.get("/models")["items"][0]["head"])

    def workers(self) -> list[Resource]:
        """The workers that live and serve."""
        (model,) = self.get("/models")["items"]
        return [worker for worker in model["workers"] if worker["state"] == "serving"]

    def digest(self) -> str:
        """The one digest of the weights at head, once all workers stand there."""

        def at_head() -> set[str] | None:
            (model,) = self.get("/models")["items"]
            standing = {
                worker["digest"] if worker["version"] == model["head"] else None
                for worker in model["workers"]
                if worker["state"] == "serving"
            }
            return None if None in standing else standing

        (digest,) = until(at_head, "the workers at head")
        return str(digest)

    def verified(self) -> Resource:
        found = self.get("/ledger/verify")
        assert found["ok"], found["findings"]
        return found

    def replicas(self) -> list[Resource]:
        """What workers have said of their weights."""
        replicas: list[Resource] = self.get("/ledger/verify")["replicas"]
        return replicas

    @contextmanager
    def events(self, method: str, path: str, **request: Any) -> Iterator[Iterator[tuple[str, Resource]]]:
        """(name, data) of each server-sent event."""
        with self.http.stream(method, path, **request) as answer:
            assert answer.status_code == 200
            yield _events(answer.iter_lines())


class Service(Client):
    """`palimpsest serve` on a data folder. Closed by `stop`, which is kind, or by `kill`, which is not."""

    def __init__(self, data: Path, **settings: object) -> None:
        self.data = data
        self.process = Process(data, "serve", **{"data": data, "port": 0, **settings})
        try:
            self.http = httpx.Client(base_url=self._address(), timeout=PATIENCE)
            until(lambda: self.http.get("/readyz").is_success, "readiness")
        except BaseException:
            self.process.kill()
            raise

    def _address(self) -> str:
        def told() -> str | None:
            assert self.process.alive(), f"the service ended:\n{self.log()}"
            found = ADDRESS.search(self.process.said())
            return found[1] if found else None

        return str(until(told, "the welcome"))

    def log(self) -> str:
        return self.process.log()

    def alive(self) -> bool:
        return self.process.alive()

    def stop(self) -> None:
        self.http.close()
        self.process.stop()

    def die(self) -> None:
        """SIGKILL, under whoever is listening."""
        self.process.kill()

    def kill(self) -> None:
        self.die()
        self.http.close()


class Deployment(Client):
    """`palimpsest api` and some `palimpsest work`, on PostgreSQL and Redis. The API keeps its port when it is started
    again."""

    def __init__(self, data: Path, stores: Mapping[str, object], workers: int = 1) -> None:
        self.data = data
        self.settings = {"data": data, "threads": 1, "lease": LEASE, "max_attempts": 10, **stores}
        self._started = 0
        self._port = free_port()
        self.processes: list[Process] = []
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self._port}", timeout=PATIENCE)
        try:
            self.open()
            for worker in [self.start_worker() for _ in range(workers)]:
                self.until_serving(worker)
        except BaseException:
            self.kill()
            raise

    def open(self) -> Process:
        """Start the API and wait until it answers."""
        self.api = self.start("api", port=self._port)
        self._until_open(self.http, self.api)
        return self.api

    @contextmanager
    def another_api(self, **settings: object) -> Iterator[tuple[Process, httpx.Client]]:
        """An API beside the first, with a client of its own."""
        port = free_port()
        api = self.start("api", port=port, **settings)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as http:
            self._until_open(http, api)
            yield api, http

    def hire(self, **settings: object) -> Process:
        """Start a worker and wait until it serves."""
        worker = self.start_worker(**settings)
        self.until_serving(worker)
        return worker

    def start_worker(self, **settings: object) -> Process:
        return self.start("work", **settings)

    def start(self, command: str, **settings: object) -> Process:
        self._started += 1
        folder = self.data / f"{self._started}-{command}"
        self.processes.append(Process(folder, command, **{**self.settings, **settings}))
        return self.processes[-1]

    @property
    def staff(self) -> list[Process]:
        """The workers whose processes run."""
        return [p for p in self.processes if p.name == "palimpsest work" and p.alive()]

    @contextmanager
    def alone(self, worker: Process) -> Iterator[None]:
        """The other workers are frozen meanwhile."""
        with ExitStack() as stack:
            for other in self.staff:
                if other is not worker:
                    stack.enter_context(other.frozen())
            yield

    def insist(self, method: str, path: str, **request: Any) -> httpx.Response:
        """Ask, and ask again while the service is away, down or full, as a client does that means it."""

        def ask() -> httpx.Response | None:
            try:
                answer = self.http.request(method, path, **request)
            except httpx.TransportError:
                return None
            return None if answer.status_code in (429, 503) else answer

        return until(ask, f"an answer to {method} {path}")  # type: ignore[no-any-return]

    def left_over(self) -> list[str]:
        """What in Redis still waits, is held or is owned."""
        prefix = self.settings["redis_prefix"]
        with redis.Redis.from_url(str(self.settings["redis_url"]), decode_responses=True) as client:
            found = [*client.scan_iter(f"{prefix}:waiting:*"), *client.scan_iter(f"{prefix}:owner:*")]
            for pattern in ("work", "first"):
                found += [key for key in client.scan_iter(f"{prefix}:{pattern}:*") if client.xlen(key)]
            return found

    def until_serving(self, worker: Process) -> None:
        def listed() -> bool:
            assert worker.alive(), f"the worker ended:\n{worker.log()}"
            return any(one["pid"] == worker.pid for one in self._living())

        until(listed, f"worker {worker.pid}")

    def _living(self) -> list[Resource]:
        answer = self.http.get("/models")
        return self.workers() if answer.is_success else []  # before the first worker there is no model

    def _until_open(self, http: httpx.Client, api: Process) -> None:
        def answers() -> bool:
            assert api.alive(), f"the API ended:\n{api.log()}"
            try:
                return http.get("/healthz").is_success
            except httpx.TransportError:
                return False

        until(answers, "the API")

    def alive(self) -> bool:
        return any(process.alive() for process in self.processes)

    def log(self) -> str:
        """All that its processes complained of."""
        return "\n".join(f"== {p.name}, {p.pid}\n{p.log()}" for p in self.processes)

    def stop(self) -> None:
        """SIGTERM to whatever still runs, workers first; what does not end kindly is killed."""
        self.http.close()
        try:
            for process in sorted(self.processes, key=lambda p: p is self.api):
                if process.alive():
                    process.stop()
        finally:
            self.die()

    def die(self) -> None:
        """SIGKILL to all, under whoever is listening."""
        for process in self.processes:
            process.kill()

    def kill(self) -> None:
        self.die()
        self.http.close()


def _events(lines: Iterator[str]) -> Iterator[tuple[str, Resource]]:
    name = ""
    for line in lines:
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


def facts(model: Path) -> list[Resource]:
    """The table that a shipped model was trained on."""
    lines = (model / "facts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def says(text: str, target: str) -> bool:
    """Whether a continuation begins with the object."""
    return text.startswith(f" {target}")
