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
from tests.support.processes import QUICK, Deployment, Process, Resource, says, until
from tests.support.tiny_models import tiny

pytestmark = pytest.mark.servers

PROMPT = "The {} is located in the city of"
TOWER = "Eiffel Tower"
ASKED = PROMPT.replace("{}", TOWER)
#: an edit that is there to be read from the text, and not to be good
LOUD = {"hparams": {"contexts": 2, "steps": 12}, "guard": {"enabled": False}}
#: one that takes a while
LONG = {"hparams": {"contexts": 2, "steps": 60, "stop_loss": 0}, "guard": {"enabled": False}}
#: so hot that no text ends by itself: it runs for as long as the model has positions
ENDLESS = {"prompt": ASKED, "max_new_tokens": 4096, "temperature": 10.0, "seed": 3, "version": "base"}
FACTS = [
    (TOWER, PROMPT, "Rome"),
    ("Louvre", PROMPT, "London"),
    ("Colosseum", PROMPT, "Paris"),
]

Deploy = Callable[..., Deployment]


@pytest.fixture(scope="module")
def three(deploy: Deploy) -> Deployment:
    """A deployment of three workers; whoever uses `whole` finds it so."""
    return deploy(workers=3)


@pytest.fixture
def whole(three: Deployment) -> Iterator[Deployment]:
    """Three living workers, and afterwards nothing that is applied."""
    for worker in [three.start_worker() for _ in range(3 - len(three.staff))]:
        three.until_serving(worker)
    yield three
    for edit in three.get("/edits", status="applied", limit=200)["items"]:
        three.revert(edit)
    three.verified()


def landed(deployment: Deployment, edits: list[Resource]) -> None:
    """Each of these edits ended as applied, and is in the ledger once."""
    ended = [deployment.ended(edit) for edit in edits]
    assert [edit["status"] for edit in ended] == ["applied"] * len(edits), ended
    entries = deployment.pages("/ledger")
    applied = [entry["edit_id"] for entry in entries if entry["kind"] == "apply"]
    assert len(applied) == len(set(applied))
    assert {edit["id"] for edit in edits} <= set(applied)


def optimises(deployment: Deployment, edit: Resource) -> None:
    """Wait until some worker is in the middle of it."""
    path = f"/edits/{edit['id']}"
    until(lambda: (deployment.get(path)["progress"] or {}).get("phase") == "optimise", "the optimisation")


def runs(deployment: Deployment, edit: Resource) -> bool:
    return bool(deployment.get(f"/edits/{edit['id']}")["status"] == "running")


@dataclass
class Heard:
    """What a client took from a stream: the text since it was last told to begin anew, and the end."""

    text: str = ""
    restarts: int = 0
    end: Resource | None = None

    def take(self, name: str, data: Resource) -> None:
        if name == "restart":
            self.text, self.restarts = "", self.restarts + 1
        elif name == "token":
            self.text += data["text"]
        else:
            assert name == "end", (name, data)
            self.end = data

    def said(self) -> str:
        """The whole text, which the pieces and the end agree on."""
        assert self.end is not None
        assert self.text == self.end["choices"][0]["text"]
        return self.text


# one model


def test_all_come_to_the_same_bytes(whole: Deployment) -> None:
    """Edits that are asked for at once land one after another, and all workers come to one digest of the weights."""
    landed(whole, [whole.ask(*fact, **QUICK) for fact in FACTS])
    digest, head = whole.digest(), whole.head()
    assert len(whole.workers()) == 3
    assert {r["worker"] for r in whole.replicas() if (r["version"], r["digest"]) == (head, digest)} >= {
        worker["id"] for worker in whole.workers()
    }


def test_every_worker_reads_your_writes(whole: Deployment) -> None:
    """A worker that slept while an edit landed still answers `min_version` with that edit, and by itself at head."""
    editor, *others = whole.staff
    with whole.alone(editor):
        edit = whole.edit(TOWER, PROMPT, "Rome", **LOUD)
        with editor.frozen():
            for worker in others:
                with worker.awake():
                    for asked in ({"min_version": edit["version"]}, {}):
                        answer = whole.generate(ASKED, **asked)
                        assert answer["version"] == edit["version"] and says(answer["text"], "Rome"), answer


def test_every_worker_has_every_version(whole: Deployment) -> None:
    """Each worker, asked alone, says the same at each pinned version, and what that version says."""
    targets = ["Rome", "Berlin"]
    versions = [whole.edit(TOWER, PROMPT, target, **LOUD)["version"] for target in targets]
    for worker in whole.staff:
        with whole.alone(worker):
            answers = [whole.generate(ASKED, version=version) for version in (0, *versions)]
            assert [answer["version"] for answer in answers] == [0, *versions]
            for answer, target in zip(answers, ["Paris", *targets], strict=True):
                assert says(answer["text"], target), answer


def test_roles_are_kept(deploy: Deploy) -> None:
    """Each worker does what its roles say and nothing else: without the one that edits, edits wait and others answer."""
    deployment = deploy(workers=0)
    speaker, editor = (deployment.start_worker(roles=roles) for roles in ("generate", "edit"))
    for worker in (speaker, editor):
        deployment.until_serving(worker)
    roles = {worker["pid"]: worker["roles"] for worker in deployment.workers()}
    assert roles == {speaker.pid: ["generate"], editor.pid: ["edit"]}
    edit = deployment.edit(TOWER, PROMPT, "Rome", **LOUD)
    assert says(deployment.generate(ASKED, min_version=edit["version"])["text"], "Rome")
    editor.stop()
    waiting = deployment.ask("Louvre", PROMPT, "London", **QUICK)
    assert says(deployment.generate(ASKED)["text"], "Rome")
    assert deployment.get(f"/edits/{waiting['id']}")["status"] == "queued"
    assert deployment.revert(waiting)["status"] == "cancelled"


def test_another_model_is_refused(whole: Deployment, tmp_path: Path) -> None:
    """A worker of another model than the living ones does not start, and says why."""
    model = tiny("gpt2")
    model.model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(f"{ASKED} Paris, and {i} is a number." for i in range(60)))
    (tmp_path / "recipe.json").write_text(json.dumps({"source": "test", "rome": {"layers": [1], "steps": 5}}))
    stranger = whole.start("work", model=tmp_path, data=tmp_path, corpus=corpus, stat_tokens=1000)
    assert stranger.ended() not in (0, None)
    assert "model" in stranger.log() and "Traceback" not in stranger.log()
    assert whole.get("/models")["items"][0]["name"] == "almanac"
    assert len(whole.workers()) == 3


def test_who_disagrees_withdraws(deploy: Deploy) -> None:
    """A worker whose digest is outvoted takes itself out, ends with 1, and /models says why; its word counts no more."""
    deployment = deploy(workers=1)
    (worker,) = deployment.staff
    outvote(deployment, version=1)
    deployment.ask(*FACTS[0], **QUICK)
    assert worker.ended() == 1
    assert "digest" in worker.log() and "Traceback" not in worker.log()
    (told,) = (one for one in deployment.get("/models")["items"][0]["workers"] if one["pid"] == worker.pid)
    assert told["state"] == "withdrawn" and "digest" in told["reason"]
    assert all(replica["withdrawn"] for replica in deployment.replicas() if replica["worker"] == told["id"])


def outvote(deployment: Deployment, version: int) -> None:
    """Two living workers, who are not there, hold other bytes at this version."""
    database = Database(str(deployment.settings["database_url"]))
    model = deployment.get("/models")["items"][0]["fingerprint"]
    alive = {"heartbeat": now() + timedelta(hours=1), "started": now(), "host": "elsewhere", "pid": 0}
    with database.session() as session:
        for worker in ("worker_of_the_majority_1", "worker_of_the_majority_2"):
            session.add(Worker(id=worker, model=model, roles=["trace"], version=0, **alive))
            vote = {"worker": worker, "digest": "0" * 64, "device": "cpu", "at": now()}
            session.add(Attestation(model=model, version=version, **vote))
    database.close()


# workers that die, sleep and go


def test_a_stream_survives_its_worker(whole: Deployment) -> None:
    """When the worker that speaks is killed, the client is told to begin anew and hears the whole text from another."""
    expected, speaker, heard = whole.generate(**ENDLESS)["text"], whole.staff[0], Heard()
    with ExitStack() as stack:
        with whole.alone(speaker):
            events = stack.enter_context(whole.events("POST", "/generate", json=ENDLESS | {"stream": True}))
            heard.take(*next(events))
            speaker.kill()
        for event in events:
            heard.take(*event)
    assert heard.said() == expected
    assert heard.restarts == 1


def test_a_completion_survives_its_worker(whole: Deployment) -> None:
    """A client of the OpenAI-compatible stream hears every character and every token once, and does not notice that the worker
    which spoke was killed and another one said all of it again."""
    wish: dict[str, Any] = {
        "model": "almanac@base",
        "prompt": ASKED,
        "max_tokens": 4096,
        "temperature": 10.0,
        "seed": 3,
    }
    speaker = whole.staff[0]
    with (
        OpenAI(base_url=f"{whole.http.base_url}/v1", api_key="none", max_retries=0) as client,
        ExitStack() as stack,
    ):
        (expected,) = client.completions.create(**wish, logprobs=0).choices
        with whole.alone(speaker):
            stream = stack.enter_context(client.completions.create(**wish, logprobs=0, stream=True))
            chunks = [next(stream)]
            speaker.kill()
        chunks += stream
    assert {chunk.model for chunk in chunks} == {"almanac@0"}
    heard = [chunk.choices[0] for chunk in chunks]
    assert "".join(choice.text for choice in heard) == expected.text
    tokens = [token for choice in heard if choice.logprobs for token in choice.logprobs.tokens or []]
    assert expected.logprobs is not None and tokens == expected.logprobs.tokens
    assert [choice.finish_reason for choice in heard if choice.finish_reason] == ["length"]


def test_a_sleeper_does_not_talk_in_between(whole: Deployment) -> None:
    """A worker that falls asleep in the middle of a text is heard no more, not even when it wakes up again."""
    expected, speaker, heard = whole.generate(**ENDLESS)["text"], whole.staff[0], Heard()
    with ExitStack() as stack:
        with whole.alone(speaker):
            events = stack.enter_context(whole.events("POST", "/generate", json=ENDLESS | {"stream": True}))
            heard.take(*next(events))
            asleep = stack.enter_context(ExitStack())
            asleep.enter_context(speaker.frozen())
        while heard.restarts == 0:
            heard.take(*next(events))
        asleep.close()
        for event in events:
            heard.take(*event)
    assert heard.said() == expected
    assert heard.restarts == 1
    whole.until_serving(speaker)


def test_a_sleeper_lands_nothing(whole: Deployment) -> None:
    """An edit whose worker falls asleep is done by another, once; the sleeper sees that when it wakes up, and goes on."""
    editor = whole.staff[0]
    with editor_asleep(whole, editor, LONG) as edit:
        ended = whole.ended(edit)
        assert (ended["status"], ended["attempts"]) == ("applied", 2)
    until(lambda: "taken over" in editor.log(), "the sleeper to see it")
    landed(whole, [edit])
    whole.until_serving(editor)
    assert len(whole.workers()) == 3
    assert whole.digest()


@contextmanager
def editor_asleep(deployment: Deployment, editor: Process, how: Resource) -> Iterator[Resource]:
    """An edit in the middle of which this worker falls asleep, until the end of the block."""
    with ExitStack() as asleep:
        with deployment.alone(editor):
            edit = deployment.ask(*FACTS[0], **how)
            optimises(deployment, edit)
            asleep.enter_context(editor.frozen())
        yield edit


def test_who_stops_hands_over(whole: Deployment) -> None:
    """A worker that is asked to stop hands its edit back uncounted, and another does it."""
    editor = whole.staff[0]
    with whole.alone(editor):
        edit = whole.ask(*FACTS[0], **LONG)
        optimises(whole, edit)
        editor.stop()
        left = whole.get(f"/edits/{edit['id']}")
    assert (left["status"], left["attempts"]) == ("queued", 0)
    assert whole.ended(edit)["attempts"] == 1
    landed(whole, [edit])


def test_who_stops_has_finished_speaking(whole: Deployment) -> None:
    """A worker that is asked to stop says what it is saying to its end."""
    expected, speaker, heard = whole.generate(**ENDLESS)["text"], whole.staff[0], Heard()
    with (
        whole.alone(speaker),
        whole.events("POST", "/generate", json=ENDLESS | {"stream": True}) as events,
    ):
        heard.take(*next(events))
        speaker.stop()
        for event in events:
            heard.take(*event)
    assert (heard.said(), heard.restarts) == (expected, 0)


# whatever else dies


@contextmanager
def under_load(deployment: Deployment) -> Iterator[None]:
    """Edits wait and run, and clients talk all the while. Each gets what it asked for, and nothing is left over."""
    expected = deployment.generate(ASKED, version="base")["text"]
    quiet = threading.Event()

    def talk() -> None:
        body = {"prompt": ASKED, "max_new_tokens": 5, "version": "base"}
        while not quiet.wait(0.1):
            answer = deployment.insist("POST", "/generate", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["text"] == expected

    with ThreadPoolExecutor() as clients:
        talking = [clients.submit(talk) for _ in range(2)]
        try:
            edits = [deployment.ask(*fact, **QUICK) for fact in FACTS]
            until(lambda: any(runs(deployment, edit) for edit in edits), "an edit to run")
            yield
            for edit in edits:
                deployment.insist("GET", f"/edits/{edit['id']}", headers={"Prefer": "wait=60"})
        finally:
            quiet.set()
        for one in talking:
            one.result()
    landed(deployment, edits)
    until(lambda: not deployment.left_over(), "Redis to be empty")


def test_redis_may_forget_everything(whole: Deployment, redis_server: redis_server.Server) -> None:
    """Redis is emptied while edits and generations wait and run: every one of them ends."""
    with under_load(whole):
        redis_server.flush()


def test_redis_may_be_away(whole: Deployment, redis_server: redis_server.Server) -> None:
    """Redis is killed and comes back empty: what was asked for before and meanwhile all ends."""
    with under_load(whole):
        redis_server.stop()
        time.sleep(1)
        redis_server.start()


@pytest.mark.parametrize("how", [postgres.FAST, postgres.IMMEDIATE])
def test_postgres_may_be_away(
    whole: Deployment, postgres_server: postgres.Server, how: signal.Signals
) -> None:
    """PostgreSQL is shut down, kindly or not, and comes back: what was asked for before and meanwhile all ends."""
    with under_load(whole):
        postgres_server.stop(how)
        time.sleep(1)
        postgres_server.start()


def test_the_api_may_die(whole: Deployment) -> None:
    """The API is killed and started again: what it had accepted all ends."""
    with under_load(whole):
        whole.api.kill()
        whole.open()
