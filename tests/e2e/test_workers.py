"""Several workers are one model: the same bytes, the same answers, and nothing lost when they, or the stores, die."""

from __future__ import annotations

import json
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
#: an edit that is there to be read from the text, and not to be good
READABLE_EDIT_OPTIONS = {"hparams": {"contexts": 2, "steps": 12}, "guard": {"enabled": False}}
#: one that takes a while
SLOW_EDIT_OPTIONS = {"hparams": {"contexts": 2, "steps": 60, "stop_loss": 0}, "guard": {"enabled": False}}
#: so hot that no text ends by itself: it runs for as long as the model has positions
LONG_GENERATION = {
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
    """A deployment of three workers; whoever uses `whole` finds it so."""
    return start_deployment(workers=3)


@pytest.fixture
def healthy_deployment(three_workers: Deployment) -> Iterator[Deployment]:
    """Three living workers, and afterwards nothing that is applied."""
    for worker in [three_workers.start_worker() for _ in range(3 - len(three_workers.running_workers))]:
        three_workers.wait_until_serving(worker)
    yield three_workers
    for edit in three_workers.get("/edits", status="applied", limit=200)["items"]:
        three_workers.revert(edit)
    three_workers.verify_ledger()


def assert_applied_once(deployment: Deployment, edits: list[Resource]) -> None:
    """Each of these edits ended as applied, and is in the ledger once."""
    ended = [deployment.wait_for_edit(edit) for edit in edits]
    assert [edit["status"] for edit in ended] == ["applied"] * len(edits), ended
    entries = deployment.list_all("/ledger")
    applied = [entry["edit_id"] for entry in entries if entry["kind"] == "apply"]
    assert len(applied) == len(set(applied))
    assert {edit["id"] for edit in edits} <= set(applied)


def wait_until_optimising(deployment: Deployment, edit: Resource) -> None:
    """Wait until some worker is in the middle of it."""
    path = f"/edits/{edit['id']}"
    wait_until(
        lambda: (deployment.get(path)["progress"] or {}).get("phase") == "optimize", "the optimisation"
    )


def is_running(deployment: Deployment, edit: Resource) -> bool:
    return bool(deployment.get(f"/edits/{edit['id']}")["status"] == "running")


@dataclass
class StreamTranscript:
    """What a client took from a stream: the text since it was last told to begin anew, and the end."""

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
        """The whole text, which the pieces and the end agree on."""
        assert self.end is not None
        assert self.text == self.end["choices"][0]["text"]
        return self.text


# one model


def test_all_come_to_the_same_bytes(healthy_deployment: Deployment) -> None:
    """Edits that are asked for at once land one after another, and all workers come to one digest of the weights."""
    assert_applied_once(
        healthy_deployment, [healthy_deployment.submit_edit(*fact, **FAST_EDIT_OPTIONS) for fact in FACTS]
    )
    digest, head = healthy_deployment.head_digest(), healthy_deployment.head()
    assert len(healthy_deployment.workers()) == 3
    assert {
        r["worker"] for r in healthy_deployment.replicas() if (r["version"], r["digest"]) == (head, digest)
    } >= {worker["id"] for worker in healthy_deployment.workers()}


def test_every_worker_reads_your_writes(healthy_deployment: Deployment) -> None:
    """A worker that slept while an edit landed still answers `min_version` with that edit, and by itself at head."""
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
    """Each worker, asked alone, says the same at each pinned version, and what that version says."""
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
    """Each worker does what its roles say and nothing else: without the one that edits, edits wait and others answer."""
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
    """A worker of another model than the living ones does not start, and says why."""
    model = tiny("gpt2")
    model.model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(f"{EDIT_PROMPT} Paris, and {i} is a number." for i in range(60)))
    (tmp_path / "recipe.json").write_text(json.dumps({"source": "test", "rome": {"layers": [1], "steps": 5}}))
    foreign_worker = healthy_deployment.start(
        "worker", model=tmp_path, data_dir=tmp_path, corpus=corpus, covariance_tokens=1000
    )
    assert foreign_worker.wait() not in (0, None)
    assert "model" in foreign_worker.log() and "Traceback" not in foreign_worker.log()
    assert healthy_deployment.get("/models")["items"][0]["name"] == "almanac"
    assert len(healthy_deployment.workers()) == 3


def test_outvoted_worker_withdraws(start_deployment: StartDeployment) -> None:
    """A worker whose digest is outvoted takes itself out, ends with 1, and /models says why; its word counts no more."""
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
    """Two living workers, who are not there, hold other bytes at this version."""
    database = Database(str(deployment.settings["database_url"]))
    model = deployment.get("/models")["items"][0]["fingerprint"]
    alive = {"heartbeat": now() + timedelta(hours=1), "started": now(), "host": "elsewhere", "pid": 0}
    with database.write_session() as session:
        for worker in ("worker_of_the_majority_1", "worker_of_the_majority_2"):
            session.add(Worker(id=worker, model=model, roles=["trace"], version=0, **alive))
            vote = {"worker": worker, "digest": "0" * 64, "device": "cpu", "at": now()}
            session.add(Attestation(model=model, version=version, **vote))
    database.close()


# workers that die, sleep and go


def test_a_stream_survives_its_worker(healthy_deployment: Deployment) -> None:
    """When the worker that speaks is killed, the client is told to begin anew and hears the whole text from another."""
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
    """A client of the OpenAI-compatible stream hears every character and every token once, and does not notice that the
    worker which spoke was killed and another one said all of it again."""
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
    """A worker that falls asleep in the middle of a text is heard no more, not even when it wakes up again."""
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
    """An edit whose worker falls asleep is done by another, once; the sleeper sees that when it wakes up, and goes on."""
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
    """An edit in the middle of which this worker falls asleep, until the end of the block."""
    with ExitStack() as asleep:
        with deployment.only_worker(editor):
            edit = deployment.submit_edit(*FACTS[0], **options)
            wait_until_optimising(deployment, edit)
            asleep.enter_context(editor.suspended())
        yield edit


def test_stopped_worker_requeues_its_edit(healthy_deployment: Deployment) -> None:
    """A worker that is asked to stop hands its edit back uncounted, and another does it."""
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
    """A worker that is asked to stop says what it is saying to its end."""
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


# whatever else dies


@contextmanager
def under_load(deployment: Deployment) -> Iterator[None]:
    """Edits wait and run, and clients talk all the while. Each gets what it asked for, and nothing is left over."""
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
    """Redis is emptied while edits and generations wait and run: every one of them ends."""
    with under_load(healthy_deployment):
        redis_server.flush()


def test_redis_restart_loses_nothing(
    healthy_deployment: Deployment, redis_server: redis_server.RedisServer
) -> None:
    """Redis is killed and comes back empty: what was asked for before and meanwhile all ends."""
    with under_load(healthy_deployment):
        redis_server.stop()
        time.sleep(1)
        redis_server.start()


@pytest.mark.parametrize("how", [postgres.FAST, postgres.IMMEDIATE])
def test_postgres_restart_loses_nothing(
    healthy_deployment: Deployment, postgres_server: postgres.PostgresServer, how: signal.Signals
) -> None:
    """PostgreSQL is shut down, kindly or not, and comes back: what was asked for before and meanwhile all ends."""
    with under_load(healthy_deployment):
        postgres_server.stop(how)
        time.sleep(1)
        postgres_server.start()


def test_api_kill_loses_nothing(healthy_deployment: Deployment) -> None:
    """The API is killed and started again: what it had accepted all ends."""
    with under_load(healthy_deployment):
        healthy_deployment.api.kill()
        healthy_deployment.start_api()
