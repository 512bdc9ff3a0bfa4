"""The real service in a process of its own, as a person starts it, and a client that speaks HTTP to it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

Resource = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
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


class Service:
    """`palimpsest serve` on a data folder. Closed by `stop`, which is kind, or by `kill`, which is not."""

    def __init__(self, data: Path, database_url: str | None = None, *flags: str) -> None:
        data.mkdir(parents=True, exist_ok=True)
        self.data = data
        self._said, self._log = data / "stdout.txt", data / "stderr.txt"
        command = [sys.executable, "-m", "cli.main", "serve", "--port", "0", "--data", str(data), *flags]
        if database_url is not None:
            command += ["--database-url", database_url]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PALIMPSEST_")}
        with self._said.open("wb") as out, self._log.open("wb") as err:
            self.process = subprocess.Popen(command, stdout=out, stderr=err, cwd=ROOT, env=environment)
        try:
            self.http = httpx.Client(base_url=self._address(), timeout=PATIENCE)
            until(lambda: self.http.get("/readyz").is_success, "readiness")
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    def _address(self) -> str:
        def told() -> str | None:
            assert self.process.poll() is None, f"the service ended:\n{self.log()}"
            found = ADDRESS.search(self._said.read_text(encoding="utf-8"))
            return found[1] if found else None

        return str(until(told, "the welcome"))

    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    # ends

    def stop(self) -> None:
        """SIGTERM: it ends with 0 and has nothing to complain about."""
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(PATIENCE)
        assert code == 0, f"ended with {code}:\n{self.log()}"
        assert "Traceback" not in self.log(), self.log()

    def kill(self) -> None:
        """SIGKILL: nothing is tidied up."""
        self.process.kill()
        self.process.wait(PATIENCE)
        self.http.close()

    # what a client does

    def get(self, path: str, **params: Any) -> Resource:
        answer = self.http.get(path, params=params)
        assert answer.is_success, answer.text
        return answer.json()  # type: ignore[no-any-return]

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

    def digest(self) -> str:
        """The digest of the weights at head, once the worker stands there."""

        def at_head() -> str | None:
            model = self.get("/models")["items"][0]
            (worker,) = model["workers"]
            return str(worker["digest"]) if worker["version"] == model["head"] and worker["digest"] else None

        return str(until(at_head, "the worker at head"))

    def verified(self) -> Resource:
        found = self.get("/ledger/verify")
        assert found["ok"], found["findings"]
        return found

    @contextmanager
    def events(self, method: str, path: str, **request: Any) -> Iterator[Iterator[tuple[str, Resource]]]:
        """(name, data) of each server-sent event."""
        with self.http.stream(method, path, **request) as answer:
            assert answer.status_code == 200
            yield _events(answer.iter_lines())


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
