"""Several workers serve one model: equal digests and texts, and no job lost when workers or stores crash."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from service.db.database import Database
from service.db.models import Attestation, Worker, now
from service.kit.signing import KEY_FILE
from tests.support import postgres_server as postgres
from tests.support import redis_server
from tests.support.processes import (
    FAST_EDIT_OPTIONS,
    CliProcess,
    Deployment,
    Resource,
    starts_with_target,
    wait_until,
)
from tests.support.tiny_models import tiny

PROMPT = "The {} is located in the city of"
TOWER = "Eiffel Tower"
EDIT_PROMPT = PROMPT.replace("{}", TOWER)
#: an edit that is visible in the text, whatever its quality
READABLE_EDIT_OPTIONS = {"hparams": {"contexts": 2, "steps": 12}, "guard": {"enabled": False}}
#: a slow edit
SLOW_EDIT_OPTIONS: dict[str, Any] = {
    "hparams": {"contexts": 2, "steps": 60, "stop_loss": 0},
    "guard": {"enabled": False},
}
#: a temperature at which no text ends before the model's max positions
LONG_GENERATION: dict[str, Any] = {
    "prompt": EDIT_PROMPT,
    "max_new_tokens": 4096,
    "temperature": 10.0,
    "seed": 3,
    "version": "base",
}
FACTS = [
    (TOWER, PROMPT, "Rome"),
    ("Louvre", PROMPT, "London"),
    ("Colosseum", PROMPT, "Paris"),
]

StartDeployment = Callable[..., Deployment]


@pytest.fixture(scope="module")
def three_workers(start_deployment: StartDeployment) -> Deployment:
    """Run a deployment of three workers for the module."""
    return start_deployment(workers=3)


@pytest.fixture
def healthy_deployment(three_workers: Deployment) -> Iterator[Deployment]:
    """Return the deployment with three serving workers; revert all edits after the test."""
    for worker in [three_workers.start_worker() for _ in range(3 - len(three_workers.running_workers))]:
        three_workers.wait_until_serving(worker)
    yield three_workers
    for edit in three_workers.get("/edits", status="applied", limit=200)["items"]:
        three_workers.revert(edit)
    three_workers.verify_ledger()


def assert_applied_once(deployment: Deployment, edits: list[Resource]) -> None:
    """Assert that each edit is applied and in the ledger once."""
    ended = [deployment.wait_for_edit(edit) for edit in edits]
    assert [edit["status"] for edit in ended] == ["applied"] * len(edits), ended
    entries = deployment.list_all("/ledger")
    applied = [entry["edit_id"] for entry in entries if entry["kind"] == "apply"]
    assert len(applied) == len(set(applied))
    assert {edit["id"] for edit in edits} <= set(applied)


def wait_until_optimising(deployment: Deployment, edit: Resource) -> None:
    """Wait until a worker optimizes the edit."""
    path = f"/edits/{edit['id']}"
    wait_until(
        lambda: (deployment.get(path)["progress"] or {}).get("phase") == "optimize", "the optimisation"
    )


def is_running(deployment: Deployment, edit: Resource) -> bool:
    return bool(deployment.get(f"/edits/{edit['id']}")["status"] == "running")


@dataclass
class StreamTranscript:
    """What a client has read from a stream: the text since the last `reset` event, and the end event."""

    text: str = ""
    resets: int = 0
    end: Resource | None = None

    def add(self, name: str, data: Resource) -> None:
        if name == "reset":
            self.text, self.resets = "", self.resets + 1
        elif name == "token":
            self.text += data["text"]
        else:
            assert name == "end", (name, data)
            self.end = data

    def full_text(self) -> str:
        """Return the whole text, which must be equal in the tokens and in the end event."""
        assert self.end is not None
        assert self.text == self.end["choices"][0]["text"]
        return self.text


# one model


def test_all_come_to_the_same_bytes(healthy_deployment: Deployment) -> None:
    """Concurrent edits get consecutive versions, and all workers reach one digest."""
    assert_applied_once(
        healthy_deployment, [healthy_deployment.submit_edit(*fact, **FAST_EDIT_OPTIONS) for fact in FACTS]
    )
    digest, head = healthy_deployment.head_digest(), healthy_deployment.head()
    assert len(healthy_deployment.workers()) == 3
    assert {
        r["worker"] for r in healthy_deployment.replicas() if (r["version"], r["digest"]) == (head, digest)
    } >= {worker["id"] for worker in healthy_deployment.workers()}


def test_every_worker_reads_your_writes(healthy_deployment: Deployment) -> None:
    """A worker that was suspended during a commit serves `min_version` and head with that edit after it resumes."""
    editor, *others = healthy_deployment.running_workers
    with healthy_deployment.only_worker(editor):
        edit = healthy_deployment.edit(TOWER, PROMPT, "Rome", **READABLE_EDIT_OPTIONS)
        with editor.suspended():
            for worker in others:
                with worker.resumed():
                    for options in ({"min_version": edit["version"]}, {}):
                        answer = healthy_deployment.generate(EDIT_PROMPT, **options)
                        assert answer["version"] == edit["version"] and starts_with_target(
                            answer["text"], "Rome"
                        ), answer


def test_every_worker_has_every_version(healthy_deployment: Deployment) -> None:
    """Each worker alone generates the same text at each pinned version."""
    targets = ["Rome", "Berlin"]
    versions = [
        healthy_deployment.edit(TOWER, PROMPT, target, **READABLE_EDIT_OPTIONS)["version"]
        for target in targets
    ]
    for worker in healthy_deployment.running_workers:
        with healthy_deployment.only_worker(worker):
            answers = [
                healthy_deployment.generate(EDIT_PROMPT, version=version) for version in (0, *versions)
            ]
            assert [answer["version"] for answer in answers] == [0, *versions]
            for answer, target in zip(answers, ["Paris", *targets], strict=True):
                assert starts_with_target(answer["text"], target), answer


def test_roles_are_kept(start_deployment: StartDeployment) -> None:
    """A worker runs only the kinds of its roles: without a worker for edits, edits stay queued and generations run."""
    deployment = start_deployment(workers=0)
    generator, editor = (deployment.start_worker(roles=roles) for roles in ("generate", "edit"))
    for worker in (generator, editor):
        deployment.wait_until_serving(worker)
    roles = {worker["pid"]: worker["roles"] for worker in deployment.workers()}
    assert roles == {generator.pid: ["generate"], editor.pid: ["edit"]}
    edit = deployment.edit(TOWER, PROMPT, "Rome", **READABLE_EDIT_OPTIONS)
    assert starts_with_target(deployment.generate(EDIT_PROMPT, min_version=edit["version"])["text"], "Rome")
    editor.stop()
    waiting = deployment.submit_edit("Louvre", PROMPT, "London", **FAST_EDIT_OPTIONS)
    assert starts_with_target(deployment.generate(EDIT_PROMPT)["text"], "Rome")
    assert deployment.get(f"/edits/{waiting['id']}")["status"] == "queued"
    assert deployment.revert(waiting)["status"] == "cancelled"


def test_another_model_is_refused(healthy_deployment: Deployment, tmp_path: Path) -> None:
    """A worker with another model than the serving ones exits with an error."""
    model = tiny("gpt2")
    model.model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(f"{EDIT_PROMPT} Paris, and {i} is a number." for i in range(60)))
    shutil.copy(healthy_deployment.data / KEY_FILE, tmp_path)
    (tmp_path / "recipe.json").write_text(json.dumps({"source": "test", "rome": {"layers": [1], "steps": 5}}))
    foreign_worker = healthy_deployment.start(
        "worker", model=tmp_path, data_dir=tmp_path, corpus=corpus, covariance_tokens=1000
    )
    assert foreign_worker.wait() not in (0, None)
    assert "model" in foreign_worker.log() and "Traceback" not in foreign_worker.log()
    assert healthy_deployment.get("/models")["items"][0]["name"] == "almanac"
    assert len(healthy_deployment.workers()) == 3


def test_outvoted_worker_withdraws(start_deployment: StartDeployment) -> None:
    """A worker whose digest is in the minority is withdrawn, exits with 1, and is not counted in later votes."""
    deployment = start_deployment(workers=1)
    (worker,) = deployment.running_workers
    add_majority_votes(deployment, version=1)
    deployment.submit_edit(*FACTS[0], **FAST_EDIT_OPTIONS)
    assert worker.wait() == 1
    assert "digest" in worker.log() and "Traceback" not in worker.log()
    (listed,) = (one for one in deployment.get("/models")["items"][0]["workers"] if one["pid"] == worker.pid)
    assert listed["state"] == "withdrawn" and "digest" in listed["reason"]
    assert all(replica["withdrawn"] for replica in deployment.replicas() if replica["worker"] == listed["id"])


def add_majority_votes(deployment: Deployment, version: int) -> None:
    """Insert attestations of two other workers with another digest for a version."""
    database = Database(str(deployment.settings["database_url"]))
    model = deployment.get("/models")["items"][0]["fingerprint"]
    alive = {"heartbeat": now() + timedelta(hours=1), "started": now(), "host": "elsewhere", "pid": 0}
    with database.write_session() as session:
        for worker in ("worker_of_the_majority_1", "worker_of_the_majority_2"):
            session.add(Worker(id=worker, model=model, roles=["trace"], version=0, **alive))
            vote = {"worker": worker, "digest": "0" * 64, "device": "cpu", "at": now()}
            session.add(Attestation(model=model, version=version, **vote))
    database.close()


# workers that crash, are suspended, and stop


def test_a_stream_survives_its_worker(healthy_deployment: Deployment) -> None:
    """When the generating worker is killed, the stream sends `reset` and another worker sends the whole text."""
    expected, worker, transcript = (
        healthy_deployment.generate(**LONG_GENERATION)["text"],
        healthy_deployment.running_workers[0],
        StreamTranscript(),
    )
    with ExitStack() as stack:
        with healthy_deployment.only_worker(worker):
            events = stack.enter_context(
                healthy_deployment.stream_events("POST", "/generate", json=LONG_GENERATION | {"stream": True})
            )
            transcript.add(*next(events))
            worker.kill()
        for event in events:
            transcript.add(*event)
    assert transcript.full_text() == expected
    assert transcript.resets == 1


def test_a_completion_survives_its_worker(healthy_deployment: Deployment) -> None:
    """A client of the OpenAI-compatible stream receives every character and token once when the generating worker is
    killed and another worker generates the text again."""
    request: dict[str, Any] = {
        "model": "almanac@base",
        "prompt": EDIT_PROMPT,
        "max_tokens": 4096,
        "temperature": 10.0,
        "seed": 3,
    }
    worker = healthy_deployment.running_workers[0]
    with (
        OpenAI(base_url=f"{healthy_deployment.http.base_url}/v1", api_key="none", max_retries=0) as client,
        ExitStack() as stack,
    ):
        (expected,) = client.completions.create(**request, logprobs=0).choices
        with healthy_deployment.only_worker(worker):
            stream = stack.enter_context(client.completions.create(**request, logprobs=0, stream=True))
            chunks = [next(stream)]
            worker.kill()
        chunks += stream
    assert {chunk.model for chunk in chunks} == {"almanac@0"}
    choices = [chunk.choices[0] for chunk in chunks]
    assert "".join(choice.text for choice in choices) == expected.text
    tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.tokens or []]
    assert expected.logprobs is not None and tokens == expected.logprobs.tokens
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["length"]


def test_suspended_worker_publishes_no_tokens(healthy_deployment: Deployment) -> None:
    """A worker that is suspended during a generation publishes nothing after it resumes."""
    expected, worker, transcript = (
        healthy_deployment.generate(**LONG_GENERATION)["text"],
        healthy_deployment.running_workers[0],
        StreamTranscript(),
    )
    with ExitStack() as stack:
        with healthy_deployment.only_worker(worker):
            events = stack.enter_context(
                healthy_deployment.stream_events("POST", "/generate", json=LONG_GENERATION | {"stream": True})
            )
            transcript.add(*next(events))
            suspension = stack.enter_context(ExitStack())
            suspension.enter_context(worker.suspended())
        while transcript.resets == 0:
            transcript.add(*next(events))
        suspension.close()
        for event in events:
            transcript.add(*event)
    assert transcript.full_text() == expected
    assert transcript.resets == 1
    healthy_deployment.wait_until_serving(worker)


def test_suspended_worker_commits_nothing(healthy_deployment: Deployment) -> None:
    """An edit whose worker is suspended is committed once by another; after it resumes, the first drops the edit."""
    editor = healthy_deployment.running_workers[0]
    with edit_on_suspended_worker(healthy_deployment, editor, SLOW_EDIT_OPTIONS) as edit:
        ended = healthy_deployment.wait_for_edit(edit)
        assert (ended["status"], ended["attempts"]) == ("applied", 2)
    wait_until(lambda: "taken over" in editor.log(), "the sleeper to see it")
    assert_applied_once(healthy_deployment, [edit])
    healthy_deployment.wait_until_serving(editor)
    assert len(healthy_deployment.workers()) == 3
    assert healthy_deployment.head_digest()


@contextmanager
def edit_on_suspended_worker(
    deployment: Deployment, editor: CliProcess, options: Resource
) -> Iterator[Resource]:
    """Suspend the worker during an edit, until the end of the block."""
    with ExitStack() as asleep:
        with deployment.only_worker(editor):
            edit = deployment.submit_edit(*FACTS[0], **options)
            wait_until_optimising(deployment, edit)
            asleep.enter_context(editor.suspended())
        yield edit


def test_stopped_worker_requeues_its_edit(healthy_deployment: Deployment) -> None:
    """A worker that gets SIGTERM requeues its edit without counting the attempt, and another worker runs it."""
    editor = healthy_deployment.running_workers[0]
    with healthy_deployment.only_worker(editor):
        edit = healthy_deployment.submit_edit(*FACTS[0], **SLOW_EDIT_OPTIONS)
        wait_until_optimising(healthy_deployment, edit)
        editor.stop()
        left = healthy_deployment.get(f"/edits/{edit['id']}")
    assert (left["status"], left["attempts"]) == ("queued", 0)
    assert healthy_deployment.wait_for_edit(edit)["attempts"] == 1
    assert_applied_once(healthy_deployment, [edit])


def test_stopped_worker_finishes_its_stream(healthy_deployment: Deployment) -> None:
    """A worker that gets SIGTERM finishes its running generations."""
    expected, worker, transcript = (
        healthy_deployment.generate(**LONG_GENERATION)["text"],
        healthy_deployment.running_workers[0],
        StreamTranscript(),
    )
    with (
        healthy_deployment.only_worker(worker),
        healthy_deployment.stream_events(
            "POST", "/generate", json=LONG_GENERATION | {"stream": True}
        ) as events,
    ):
        transcript.add(*next(events))
        worker.stop()
        for event in events:
            transcript.add(*event)
    assert (transcript.full_text(), transcript.resets) == (expected, 0)


# crashes of stores and of the API


@contextmanager
def under_load(deployment: Deployment) -> Iterator[None]:
    """Run edits and generations during a fault; afterwards each must have ended, with nothing left in the queue."""
    expected = deployment.generate(EDIT_PROMPT, version="base")["text"]
    quiet = threading.Event()

    def talk() -> None:
        body = {"prompt": EDIT_PROMPT, "max_new_tokens": 5, "version": "base"}
        while not quiet.wait(0.1):
            answer = deployment.request_until_answered("POST", "/generate", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["text"] == expected

    with ThreadPoolExecutor() as clients:
        talking = [clients.submit(talk) for _ in range(2)]
        try:
            edits = [deployment.submit_edit(*fact, **FAST_EDIT_OPTIONS) for fact in FACTS]
            wait_until(lambda: any(is_running(deployment, edit) for edit in edits), "an edit to run")
            yield
            for edit in edits:
                deployment.request_until_answered(
                    "GET", f"/edits/{edit['id']}", headers={"Prefer": "wait=60"}
                )
        finally:
            quiet.set()
        for one in talking:
            one.result()
    assert_applied_once(deployment, edits)
    wait_until(lambda: not deployment.queue_leftovers(), "Redis to be empty")


def test_redis_flush_loses_nothing(
    healthy_deployment: Deployment, redis_server: redis_server.RedisServer
) -> None:
    """All edits and generations end after Redis is emptied."""
    with under_load(healthy_deployment):
        redis_server.flush()


def test_redis_restart_loses_nothing(
    healthy_deployment: Deployment, redis_server: redis_server.RedisServer
) -> None:
    """All edits and generations end after Redis is killed and restarts empty."""
    with under_load(healthy_deployment):
        redis_server.stop()
        time.sleep(1)
        redis_server.start()


@pytest.mark.parametrize("how", [postgres.FAST, postgres.IMMEDIATE])
def test_postgres_restart_loses_nothing(
    healthy_deployment: Deployment, postgres_server: postgres.PostgresServer, how: signal.Signals
) -> None:
    """All edits and generations end after a fast or immediate shutdown and a restart of PostgreSQL."""
    with under_load(healthy_deployment):
        postgres_server.stop(how)
        time.sleep(1)
        postgres_server.start()


def test_api_kill_loses_nothing(healthy_deployment: Deployment) -> None:
    """All accepted edits end after the API is killed and restarted."""
    with under_load(healthy_deployment):
        healthy_deployment.api.kill()
        healthy_deployment.start_api()
