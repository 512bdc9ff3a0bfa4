"""Processes of the service, and an HTTP client of them."""

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
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import redis
from httpx_sse import EventSource

from palimpsest import Client, Edit
from tests.support.forked_commands import ForkedCommand
from tests.support.free_ports import free_port
from tests.support.paths import ROOT

Resource = dict[str, Any]

LEASE_SECONDS = 2  # seconds without a heartbeat after which a worker is lost
WAIT_TIMEOUT = 300.0  # seconds after which `wait_until` fails
READY_LINE = re.compile(r"Palimpsest is ready on (http://\S+)")
#: options of an edit that is committed fast, whatever its quality: few contexts, few steps, no guard
FAST_EDIT_OPTIONS: Resource = {"hparams": {"contexts": 2, "steps": 5}, "guard": {"enabled": False}}


def wait_until(condition: Callable[[], Any], description: str) -> Any:
    """Poll until `condition` returns a true value, and return it."""
    deadline = time.monotonic() + WAIT_TIMEOUT
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(0.02)
    raise AssertionError(f"waited {WAIT_TIMEOUT:.0f} s for {description}")


class CliProcess:
    """A process of one `palimpsest` command. Its settings are environment variables; those of the machine are
    removed. With `forked=False` a new interpreter runs it, and `open_files` is its limit of open files."""

    def __init__(
        self,
        folder: Path,
        *command: str,
        forked: bool = True,
        open_files: int | None = None,
        **settings: Any,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.name = f"palimpsest {command[0]}"
        self._stdout_path, self._stderr_path = folder / "stdout.txt", folder / "stderr.txt"
        for path in (self._stdout_path, self._stderr_path):
            path.write_bytes(b"")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PALIMPSEST_")}
        environment |= {f"PALIMPSEST_{k.upper()}": str(v) for k, v in settings.items() if v is not None}
        self._process: ForkedCommand | subprocess.Popen[bytes]
        if forked:
            self._process = ForkedCommand(command, environment, self._stdout_path, self._stderr_path)
        else:
            line = [sys.executable, "-m", "cli.main", *command]
            if open_files is not None:
                line = ["sh", "-c", f'ulimit -n {open_files}; exec "$@"', "sh", *line]
            with self._stdout_path.open("wb") as out, self._stderr_path.open("wb") as err:
                self._process = subprocess.Popen(line, stdout=out, stderr=err, cwd=ROOT, env=environment)
        self.pid = self._process.pid

    def stdout(self) -> str:
        return self._stdout_path.read_text(encoding="utf-8", errors="replace")

    def log(self) -> str:
        return self._stderr_path.read_text(encoding="utf-8", errors="replace")

    def alive(self) -> bool:
        return self._process.poll() is None

    def wait(self) -> int:
        """Wait for the process to exit. Return the exit code; after a signal, its negative number."""
        return self._process.wait(WAIT_TIMEOUT)

    def stop(self) -> None:
        """Send SIGTERM; the process must exit with 0 and log no traceback."""
        if self.alive():
            self._process.send_signal(signal.SIGTERM)
        code = self.wait()
        assert code == 0, f"{self.name} ended with {code}:\n{self.log()}"
        assert "Traceback" not in self.log(), self.log()

    def kill(self) -> None:
        """Send SIGKILL and wait."""
        self._process.kill()
        self.wait()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Send SIGSTOP, and SIGCONT on exit, as when its machine is suspended."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    @contextmanager
    def resumed(self) -> Iterator[None]:
        """Send SIGCONT to a stopped process, and SIGSTOP on exit."""
        self._process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGSTOP)


class ServiceClient:
    """HTTP calls that work with an embedded service and with a deployment."""

    http: httpx.Client

    def get(self, path: str, **params: Any) -> Resource:
        answer = self.http.get(path, params=params)
        assert answer.is_success, answer.text
        return answer.json()  # type: ignore[no-any-return]

    @cached_property
    def client(self) -> Client:
        """The client of the project, without retries: a lost response fails the test."""
        return Client(str(self.http.base_url), timeout=WAIT_TIMEOUT, retries=0)

    def close_clients(self) -> None:
        """Close the connections of both clients."""
        self.http.close()
        if (client := self.__dict__.pop("client", None)) is not None:
            client.close()

    def list_all(self, path: str, **params: Any) -> list[Resource]:
        """Return every item of a paginated list."""
        items: list[Resource] = []
        cursor_params: Resource = {}
        while True:
            page = self.get(path, limit=200, **cursor_params, **params)
            items += page["items"]
            if page["next"] is None:
                return items
            cursor_params = {"cursor": page["next"]}

    def generate(self, prompt: str, **options: Any) -> Resource:
        return dict(self.client.generate(prompt, **{"max_new_tokens": 5, **options}).raw)

    def generate_texts(self, prompts: list[str], **options: Any) -> list[str]:
        """Return the continuation of each prompt."""
        options = {"max_new_tokens": 5, **options}
        batches = [prompts[start : start + 64] for start in range(0, len(prompts), 64)]
        return [one.text for batch in batches for one in self.client.generate_many(batch, **options)]

    def submit_edit(self, subject: str, prompt: str, target_new: str, **options: Any) -> Resource:
        """Submit an edit without waiting."""
        headers = options.pop("headers", {})
        body = {"subject": subject, "prompt": prompt, "target_new": target_new, **options}
        answer = self.http.post("/edits", json=body, headers=headers)
        assert answer.status_code in (200, 202), answer.text
        return answer.json()  # type: ignore[no-any-return]

    def edit(self, subject: str, prompt: str, target_new: str, **options: Any) -> Resource:
        """Submit an edit and wait for its end."""
        return self.wait_for_edit(
            self.submit_edit(subject, prompt, target_new, headers={"Prefer": "wait=60"}, **options)
        )

    def wait_for_edit(self, edit: Resource) -> Resource:
        """Return the edit after it has ended."""
        return dict(self.client.wait_for(Edit.from_json(edit)).raw)

    def revert(self, edit: Resource) -> Resource:
        return dict(self.client.revert(edit["id"]).raw)

    def head(self) -> int:
        return int(self.get("/models")["items"][0]["head"])

    def workers(self) -> list[Resource]:
        """Return the serving workers."""
        (model,) = self.get("/models")["items"]
        return [worker for worker in model["workers"] if worker["state"] == "serving"]

    def head_digest(self) -> str:
        """Wait until all workers serve head, and return their common digest."""

        def at_head() -> set[str] | None:
            (model,) = self.get("/models")["items"]
            digests: set[Any] = {
                worker["digest"] if worker["version"] == model["head"] else None
                for worker in model["workers"]
                if worker["state"] == "serving"
            }
            return None if None in digests else digests

        (digest,) = wait_until(at_head, "the workers at head")
        return str(digest)

    def verify_ledger(self) -> Resource:
        verification = self.client.verify()
        assert verification.ok, verification.findings
        return dict(verification.raw)

    def replicas(self) -> list[Resource]:
        """Return the attestations of the workers."""
        return [dict(replica) for replica in self.client.verify().replicas]

    @contextmanager
    def stream_events(
        self, method: str, path: str, **request: Any
    ) -> Iterator[Iterator[tuple[str, Resource]]]:
        """Yield (name, data) of each server-sent event."""
        with self.http.stream(method, path, **request) as answer:
            assert answer.status_code == 200
            yield ((e.event, e.json()) for e in EventSource(answer).iter_sse() if e.data)


class EmbeddedService(ServiceClient):
    """`palimpsest serve` with a data folder. `stop` shuts it down; `kill` sends SIGKILL."""

    def __init__(self, data: Path, **settings: Any) -> None:
        self.data = data
        self.process = CliProcess(data, "serve", **{"data_dir": data, "port": 0, **settings})
        try:
            self.http = httpx.Client(base_url=self._wait_for_address(), timeout=WAIT_TIMEOUT)
            wait_until(lambda: self.http.get("/readyz").is_success, "readiness")
        except BaseException:
            self.process.kill()
            raise

    def _wait_for_address(self) -> str:
        def address() -> str | None:
            assert self.process.alive(), f"the service ended:\n{self.log()}"
            found = READY_LINE.search(self.process.stdout())
            return found[1] if found else None

        return str(wait_until(address, "the startup message"))

    def log(self) -> str:
        return self.process.log()

    def alive(self) -> bool:
        return self.process.alive()

    def stop(self) -> None:
        self.close_clients()
        self.process.stop()

    def sigkill(self) -> None:
        """Send SIGKILL while clients stay connected."""
        self.process.kill()

    def kill(self) -> None:
        self.sigkill()
        self.close_clients()


class Deployment(ServiceClient):
    """`palimpsest api` and workers on PostgreSQL and Redis. A restarted API has the same port."""

    def __init__(self, data: Path, stores: Mapping[str, object], workers: int = 1) -> None:
        self.data = data
        self.settings: dict[str, Any] = {
            "data_dir": data,
            "threads": 1,
            "development": True,
            "worker_timeout": LEASE_SECONDS,
            "max_attempts": 10,
            **stores,
        }
        self._process_count = 0
        self._port = free_port()
        self.processes: list[CliProcess] = []
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self._port}", timeout=WAIT_TIMEOUT)
        try:
            self.start_api()
            for worker in [self.start_worker() for _ in range(workers)]:
                self.wait_until_serving(worker)
        except BaseException:
            self.kill()
            raise

    def start_api(self) -> CliProcess:
        """Start the API and wait until it is healthy."""
        self.api = self.start("api", port=self._port)
        self._wait_for_api(self.http, self.api)
        return self.api

    @contextmanager
    def another_api(self, **settings: object) -> Iterator[tuple[CliProcess, httpx.Client]]:
        """Run a second API, with a client of it."""
        port = free_port()
        api = self.start("api", port=port, **settings)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=WAIT_TIMEOUT) as http:
            self._wait_for_api(http, api)
            yield api, http

    def start_serving_worker(self, **settings: Any) -> CliProcess:
        """Start a worker and wait until it serves."""
        worker = self.start_worker(**settings)
        self.wait_until_serving(worker)
        return worker

    def start_worker(self, **settings: Any) -> CliProcess:
        return self.start("worker", **settings)

    def start(self, command: str, **settings: Any) -> CliProcess:
        self._process_count += 1
        folder = self.data / f"{self._process_count}-{command}"
        self.processes.append(CliProcess(folder, command, **{**self.settings, **settings}))
        return self.processes[-1]

    @property
    def running_workers(self) -> list[CliProcess]:
        """Return the running worker processes."""
        return [p for p in self.processes if p.name == "palimpsest worker" and p.alive()]

    @contextmanager
    def only_worker(self, worker: CliProcess) -> Iterator[None]:
        """Suspend all other workers within the context."""
        with ExitStack() as stack:
            for other in self.running_workers:
                if other is not worker:
                    stack.enter_context(other.suspended())
            yield

    def request_until_answered(self, method: str, path: str, **request: Any) -> httpx.Response:
        """Send a request, and retry it after a transport error, a 429 or a 503."""

        def ask() -> httpx.Response | None:
            try:
                answer = self.http.request(method, path, **request)
            except httpx.TransportError:
                return None
            return None if answer.status_code in (429, 503) else answer

        return wait_until(ask, f"a response to {method} {path}")  # type: ignore[no-any-return]

    def queue_leftovers(self) -> list[str]:
        """Return the keys in Redis of what still waits or is leased."""
        prefix = self.settings["redis_prefix"]
        with redis.Redis.from_url(str(self.settings["redis_url"]), decode_responses=True) as client:
            leftovers = [*client.scan_iter(f"{prefix}:waiting:*"), *client.scan_iter(f"{prefix}:owner:*")]
            for pattern in ("ready", "retry"):
                leftovers += [key for key in client.scan_iter(f"{prefix}:{pattern}:*") if client.xlen(key)]
            return leftovers

    def wait_until_serving(self, worker: CliProcess) -> None:
        def listed() -> bool:
            assert worker.alive(), f"the worker ended:\n{worker.log()}"
            return any(one["pid"] == worker.pid for one in self._serving_workers())

        wait_until(listed, f"worker {worker.pid}")

    def _serving_workers(self) -> list[Resource]:
        answer = self.http.get("/models")
        return self.workers() if answer.is_success else []  # there is no model before the first worker

    def _wait_for_api(self, http: httpx.Client, api: CliProcess) -> None:
        def answers() -> bool:
            assert api.alive(), f"the API ended:\n{api.log()}"
            try:
                return http.get("/healthz").is_success
            except httpx.TransportError:
                return False

        wait_until(answers, "the API")

    def alive(self) -> bool:
        return any(process.alive() for process in self.processes)

    def log(self) -> str:
        """Return the logs of all processes."""
        return "\n".join(f"== {p.name}, {p.pid}\n{p.log()}" for p in self.processes)

    def stop(self) -> None:
        """Stop the running processes, workers first; kill those that do not stop."""
        self.close_clients()
        try:
            for process in sorted(self.processes, key=lambda p: p is self.api):
                if process.alive():
                    process.stop()
        finally:
            self.sigkill()

    def sigkill(self) -> None:
        """Send SIGKILL to all processes while clients stay connected."""
        for process in self.processes:
            process.kill()

    def kill(self) -> None:
        self.sigkill()
        self.close_clients()


RunningService = EmbeddedService | Deployment


def read_fact_rows(model: Path) -> list[Resource]:
    """Return the rows of a model's facts.jsonl."""
    lines = (model / "facts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def starts_with_target(text: str, target: str) -> bool:
    """Return whether a continuation begins with the object."""
    return text.startswith(f" {target}")
