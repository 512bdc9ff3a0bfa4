"""The verbs, seen from the doors: what is refused, what is written, and what comes back."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from resident import INFO, tokenizer_json
from sqlalchemy import event, update
from tampering import unguard

from service import ids
from service import operations as verbs
from service.errors import Conflict, InvalidInput, NotFound, QueueFull, Unavailable
from service.jobs.desk import Desk
from service.jobs.memory import MemoryBroker
from service.operations import Operations
from service.progress import Progress
from service.requests import CompareRequest, EditRequest, EvaluationRequest, GenerateRequest, TraceRequest
from service.settings import Settings
from service.store.tables import LedgerEntry, Worker, now

PROMPT = "The {} is located in"


def edit_request(subject="Eiffel Tower", prompt=PROMPT, target_new="Rome", **more):
    return EditRequest(subject=subject, prompt=prompt, target_new=target_new, **more)


def trace_request(**more):
    return TraceRequest(**{"prompt": "The Eiffel Tower is located in", "subject": "Eiffel Tower", **more})


def record(**more):
    return {"subject": "Eiffel Tower", "prompt": PROMPT, "target_new": "Rome", **more}


def evaluation_request(*records, **more):
    return EvaluationRequest(records=list(records) or [record()], **more)


@pytest.fixture
def database(wired):
    return wired.database


@pytest.fixture
def broker(wired):
    return wired.broker


@pytest.fixture
def bare(database, broker, tmp_path):
    """Before any worker has come up."""
    return Operations(database, broker, Settings(data=tmp_path, max_queue=5))


@pytest.fixture
def desk(database, broker):
    desk = Desk(database, broker, "fingerprint", "worker-1")
    desk.register(INFO, tokenizer_json(), ["generate", "edit"])
    return desk


@pytest.fixture
def operations(bare, desk):
    return bare


@pytest.fixture
def ask(operations):
    return lambda *args, **more: operations.submit_edits([edit_request(*args, **more)], "somebody")[0]["id"]


@pytest.fixture
def landed(ask, desk):
    """Ask for an edit, and have it applied."""

    def landed(*args, **more):
        edit = ask(*args, **more)
        desk.apply(desk.start(edit), desk.head(), edit.encode(), {}, {})
        return edit

    return landed


def heard(operations, job_id, after=None):
    async def listen():
        async with asyncio.timeout(20):
            return [event async for event in operations.events(job_id, after)]

    return asyncio.run(listen())


def listened(broker, channel):
    async def listen():
        async with asyncio.timeout(20):
            return [event async for event in broker.events(channel)]

    return asyncio.run(listen())


def down(*_, **__):
    raise Unavailable("the queue is down.")


class TestModel:
    def test_none_yet(self, bare):
        """Before a worker has come up every verb says so."""
        for verb in (
            bare.model,
            bare.models,
            bare.ready,
            bare.head,
            bare.verify,
            bare.edits,
            lambda: bare.submit_edits([edit_request()], "a"),
            lambda: bare.generate(GenerateRequest(prompt="x")),
        ):
            with pytest.raises(Unavailable, match="no worker has loaded a model"):
                verb()

    def test_model(self, operations, landed):
        """The resident model is described with its head, its active edits and its workers."""
        landed()
        model = operations.model()
        assert model.items() >= INFO.items()
        assert (model["fingerprint"], model["head"], model["active_edits"]) == ("fingerprint", 1, 1)
        assert model["jobs"] == {"queued": 0, "running": 0, "dead": 0}
        (worker,) = model["workers"]
        assert (worker["id"], worker["state"], worker["reason"]) == ("worker-1", "serving", None)
        assert (worker["roles"], worker["version"], worker["lag"]) == (["generate", "edit"], 0, 1)
        assert 0 <= worker["age"] < 60
        assert [model["fingerprint"] for model in operations.models()] == ["fingerprint"]

    def test_the_newest(self, operations, database, broker):
        """The resident model is the one that came up last; jobs of the one before are not listed with it."""
        operations.submit_edits([edit_request()], "a")
        Desk(database, broker, "other", "worker-2").register({**INFO, "name": "other"}, tokenizer_json())
        assert operations.model()["name"] == "other"
        assert operations.edits()["items"] == []

    def test_ready(self, operations):
        """Ready is a database and a queue that answer and a worker that lives."""
        assert operations.ready()["ready"]

    def test_no_worker(self, operations, desk):
        """Without a living worker the service is not ready, and says why."""
        desk.leave()
        with pytest.raises(Unavailable) as error:
            operations.ready()
        assert error.value.extra["reasons"] == ["no worker is alive"]
        assert operations.model()["workers"] == []

    def test_worker_behind(self, operations, landed, desk, database):
        """A worker has some time to reach the head; then the service is no longer ready."""
        landed()
        assert operations.ready()["head"] == 1
        with database.session() as session:
            unguard(session)
            session.execute(update(LedgerEntry).values(at=now() - timedelta(minutes=5)))
        with pytest.raises(Unavailable, match="no worker has reached version 1"):
            operations.ready()
        desk.heartbeat(1, "digest")
        assert operations.ready()["workers"][0]["version"] == 1

    def test_role_missing(self, operations, ask):
        """Work that waits and that no living worker does is named; a role that nobody asks for is not missed."""
        ask()
        assert operations.ready()["waiting"]["edit"] == 1
        operations.submit_trace(trace_request(), "somebody")
        with pytest.raises(Unavailable) as error:
            operations.ready()
        assert error.value.extra["reasons"] == ["1 jobs wait and no living worker does trace"]

    def test_nobody_speaks(self, operations, desk, database):
        """Readiness is to be able to speak: a worker that only edits is not enough."""
        desk.leave()
        Desk(database, operations.broker, "fingerprint", "w").register(INFO, tokenizer_json(), ["edit"])
        with pytest.raises(Unavailable, match="no living worker does generate"):
            operations.ready()
        operations.check_attended("edit")
        with pytest.raises(Unavailable, match="no worker is alive that does generate"):
            operations.check_attended("compare")

    def test_no_roles(self, operations, desk, database):
        """A worker without roles does everything."""
        desk.leave()
        Desk(database, operations.broker, "fingerprint", "w").register(INFO, tokenizer_json())
        operations.submit_trace(trace_request(), "somebody")
        assert operations.ready()["ready"]

    def test_withdrawn_worker(self, operations, desk):
        """A worker that took itself out is listed with its reason and counts for nothing."""
        desk.withdraw("its weights differ.")
        with pytest.raises(Unavailable, match="no worker is alive"):
            operations.ready()
        (worker,) = operations.model()["workers"]
        assert (worker["state"], worker["reason"]) == ("withdrawn", "its weights differ.")

    def test_every_reason(self, operations, desk, monkeypatch):
        """All that is down is named at once."""
        desk.leave()
        monkeypatch.setattr(operations.broker, "waiting", down)
        with pytest.raises(Unavailable) as error:
            operations.ready()
        assert error.value.extra["reasons"] == ["the queue is down", "no worker is alive"]
        monkeypatch.setattr(operations.database, "read", down)
        with pytest.raises(Unavailable) as error:
            operations.ready()
        assert error.value.extra["reasons"] == ["the queue is down"] * 2

    def test_lease(self, database, broker, operations, desk, tmp_path):
        """How long a silent worker counts as living is a setting."""
        with database.session() as session:
            session.execute(update(Worker).values(heartbeat=now() - timedelta(seconds=5)))
        assert operations.ready()["ready"]
        hasty = Operations(database, broker, Settings(data=tmp_path, lease=2))
        with pytest.raises(Unavailable, match="no worker is alive"):
            hasty.ready()

    def test_silent_worker(self, operations, database):
        """A worker without a heartbeat is dead."""
        with database.session() as session:
            session.execute(update(Worker).values(heartbeat=now() - timedelta(minutes=5)))
        with pytest.raises(Unavailable, match="no worker is alive"):
            operations.ready()


class TestSubmit:
    def test_submit(self, operations, broker):
        """An edit is queued as a row and then announced; the resource says all that was asked."""
        (edit,) = operations.submit_edits([edit_request(target_true="Paris")], "somebody")
        assert edit["id"].startswith("edit_")
        assert edit.items() >= {"status": "queued", "subject": "Eiffel Tower", "target_true": "Paris"}.items()
        assert edit["links"] == {
            "self": f"/edits/{edit['id']}",
            "events": f"/edits/{edit['id']}/events",
            "delta": f"/edits/{edit['id']}/delta",
        }
        assert operations.edit(edit["id"]) == edit
        assert [delivery.job_id for delivery in broker.take(["edit"], 9, 0)] == [edit["id"]]

    def test_many(self, operations, broker):
        """Many edits are queued in their order."""
        made = operations.submit_edits([edit_request(f"Tower {n}") for n in range(4)], "somebody")
        assert [edit["subject"] for edit in made] == [f"Tower {n}" for n in range(4)]
        assert [d.job_id for d in broker.take(["edit"], 9, 0)] == [edit["id"] for edit in made]

    def test_all_or_none(self, operations, broker):
        """One bad edit among many: nothing is written, and the error names the place."""
        with pytest.raises(InvalidInput) as error:
            operations.submit_edits([edit_request(), edit_request(prompt="no slot")], "somebody")
        assert error.value.field == "edits.1.prompt"
        assert operations.edits()["items"] == []
        assert broker.waiting("edit") == 0

    @pytest.mark.parametrize(
        ("field", "changes"),
        [
            ("prompt", {"prompt": "no slot"}),
            ("prompt", {"prompt": "{} and {}"}),
            ("prompt", {"prompt": "{} is " + "very " * 100 + "in"}),
            ("target_new", {"prompt": "{} is located in ", "target_new": "Paris"}),
            ("hparams", {"hparams": {"layers": [4]}}),
            ("hparams", {"hparams": {"speed": 3}}),
            ("hparams", {"hparams": {"steps": "many"}}),
            ("probes.paraphrase.1.prompt", {"probes": {"paraphrase": ["{} is in", "{} {}"]}}),
            (
                "probes.neighborhood.0.prompt",
                {"probes": {"neighborhood": [{"prompt": "x " * 99, "target": "y"}]}},
            ),
        ],
    )
    def test_refused(self, operations, field, changes):
        """What cannot be carried out is refused before anything is written, with the field."""
        with pytest.raises(InvalidInput) as error:
            operations.submit_edits([edit_request(**changes)], "a")
        assert error.value.field == field
        assert operations.edits()["items"] == []

    def test_queue_full(self, operations, ask):
        """Too many waiting jobs are refused, all or none, until some have gone."""
        first = ask()
        with pytest.raises(QueueFull, match="1 jobs wait already and at most 5"):
            operations.submit_edits([edit_request()] * 5, "somebody")
        operations.submit_edits([edit_request()] * 4, "somebody")
        with pytest.raises(QueueFull):
            operations.submit_trace(trace_request(), "somebody")
        operations.revert_edit(first, "somebody")
        operations.submit_trace(trace_request(), "somebody")

    def test_room_of_one(self, operations):
        """One actor may not fill the queue: each has room of their own, which a key may have more or less of."""
        asked = [edit_request()]
        operations.submit_edits(asked * 2, "a", max_queued=2)
        with pytest.raises(QueueFull, match="2 jobs of yours wait already and at most 2") as error:
            operations.submit_edits(asked, "a", max_queued=2)
        assert error.value.retry_after > 0
        with pytest.raises(QueueFull):
            operations.submit_trace(trace_request(), "a", max_queued=2)
        operations.submit_edits(asked, "b", max_queued=2)
        operations.submit_edits(asked, "a", max_queued=3)

    def test_room_by_default(self, database, broker, desk, tmp_path):
        """Without a limit of their own the setting's holds."""
        operations = Operations(database, broker, Settings(data=tmp_path, max_queued=1))
        operations.submit_edits([edit_request()], "a")
        with pytest.raises(QueueFull):
            operations.submit_edits([edit_request()], "a")

    def test_queue_is_down(self, operations, broker, monkeypatch):
        """A row that is committed is accepted, though the bell could not be rung: a sweep rings it."""
        monkeypatch.setattr(broker, "announce", down)
        (edit,) = operations.submit_edits([edit_request()], "a")
        assert operations.edit(edit["id"])["status"] == "queued"

    def test_request_id(self, operations, broker):
        """The id of the request goes with what it asked for."""
        token = ids.request_id.set("req-7")
        operations.submit_edits([edit_request()], "a")
        operations.generate(GenerateRequest(prompt="The"))
        ids.request_id.reset(token)
        assert operations.jobs()["items"][0]["request_id"] == "req-7"
        assert [d.request_id for d in broker.take(["generate"], 1, 0)] == ["req-7"]


class TestIdempotency:
    def test_again(self, operations, broker):
        """The same key and body give the same edits, which are queued once."""
        first, again = (operations.submit_edits([edit_request()] * 2, "a", ("key", "body")) for _ in range(2))
        assert first == again
        assert broker.waiting("edit") == 2

    def test_again_when_full(self, operations):
        """A repetition is answered although the queue has filled up since."""
        first = operations.submit_edits([edit_request()] * 5, "a", ("key", "body"))
        assert operations.submit_edits([edit_request()] * 5, "a", ("key", "body")) == first

    def test_other_body(self, operations):
        """A key that comes with another body is refused."""
        operations.submit_trace(trace_request(), "a", ("key", "body"))
        with pytest.raises(InvalidInput, match="another body"):
            operations.submit_edits([edit_request()], "a", ("key", "other"))

    def test_other_actor(self, operations):
        """Keys of different people have nothing to do with each other."""
        first, second = (operations.submit_trace(trace_request(), who, ("key", "body")) for who in "ab")
        assert first["id"] != second["id"]

    def test_at_once(self, operations):
        """Of requests with one key that come at once, one makes the edit and all get it."""
        barrier = threading.Barrier(5)

        def submit(_):
            barrier.wait()
            return operations.submit_edits([edit_request()], "a", ("key", "body"))[0]["id"]

        with ThreadPoolExecutor(5) as pool:
            assert len(set(pool.map(submit, range(5)))) == 1
        assert len(operations.edits()["items"]) == 1

    def test_refused_request_keeps_no_key(self, operations):
        """A request that was refused leaves its key free."""
        with pytest.raises(QueueFull):
            operations.submit_edits([edit_request()] * 6, "a", ("key", "body"))
        assert operations.submit_edits([edit_request()], "a", ("key", "other"))

    @pytest.mark.parametrize("key", ["", "x" * 256])
    def test_key(self, operations, key):
        """A key has a sensible length."""
        with pytest.raises(InvalidInput):
            operations.submit_edits([edit_request()], "a", (key, "body"))


class TestTakeBack:
    def test_queued(self, operations, ask, desk):
        """A waiting edit is cancelled at once, and its listeners hear the end."""
        edit = ask()
        found = operations.revert_edit(edit, "another")
        assert (found["status"], found["version"]) == ("cancelled", None)
        assert found["ended"] is not None
        assert heard(operations, edit)[-1].data == found
        assert desk.start(edit) is None

    def test_running(self, operations, ask, desk):
        """A running edit is asked to stop, and says so by ending as cancelled."""
        edit = ask()
        job = desk.start(edit)
        assert operations.revert_edit(edit, "another")["status"] == "running"
        assert desk.cancel_requested(job)

    def test_applied(self, operations, landed):
        """An applied edit is reverted by an entry in the ledger, with who did it."""
        edit = landed()
        found = operations.revert_edit(edit, "another")
        assert (found["status"], found["version"], found["reverted_version"]) == ("reverted", 1, 2)
        entry = operations.ledger()["items"][1]
        assert (entry["kind"], entry["edit_id"], entry["actor"]) == ("revert", edit, "another")
        assert operations.verify()["ok"]

    def test_twice(self, operations, landed, ask, desk):
        """Saying it twice is harmless: the same resource, and no second entry."""
        applied, waiting, running = landed(), ask("a"), ask("b")
        desk.start(running)
        for edit in (applied, waiting, running):
            assert operations.revert_edit(edit, "x") == operations.revert_edit(edit, "y")
        assert operations.head() == 2

    def test_at_once(self, operations, landed):
        """Of many reverts at once, one is written."""
        edit = landed()
        barrier = threading.Barrier(5)

        def take_back(_):
            barrier.wait()
            return operations.revert_edit(edit, "somebody")["status"]

        with ThreadPoolExecutor(5) as pool:
            assert set(pool.map(take_back, range(5))) == {"reverted"}
        assert operations.head() == 2

    def test_supersede(self, operations, landed):
        """A newer edit of a fact supersedes the older; reverting it brings the older back."""
        a, b = landed(), landed(prompt="The  {} is located\nin", target_new="Oslo")
        old = operations.edit(a)
        assert (old["status"], old["superseded_by"], old["related"]) == ("superseded", b, [b])
        operations.revert_edit(b, "somebody")
        old = operations.edit(a)
        assert (old["status"], old["superseded_by"]) == ("applied", None)

    def test_superseded(self, operations, landed):
        """A superseded edit can be reverted for itself; reverting the newer one then leaves the base."""
        a, b = landed(), landed(target_new="Oslo")
        assert operations.revert_edit(a, "somebody")["status"] == "reverted"
        operations.revert_edit(b, "somebody")
        assert operations.model()["active_edits"] == 0
        assert operations.verify()["ok"]

    def test_dry_run(self, operations, ask, desk):
        """A dry run that has ended leaves nothing to revert, whatever it is called."""
        edit = ask(dry_run=True)
        desk.finish(desk.start(edit), "applied", {})
        assert operations.revert_edit(edit, "somebody")["status"] == "applied"
        assert operations.head() == 0
        assert operations.model()["active_edits"] == 0

    @pytest.mark.parametrize("name", ["edit_gone", "", "é", "\x00", "trace"])
    def test_unknown(self, operations, name):
        """What is no edit is not found, a trace's id included."""
        if name == "trace":
            name = operations.submit_trace(trace_request(), "a")["id"]
        for verb in (operations.edit, operations.delta, lambda x: operations.revert_edit(x, "a")):
            with pytest.raises(NotFound):
                verb(name)


class TestRead:
    def test_related(self, operations, landed, ask):
        """An edit names the active edits of its subject, however its spaces run, and no others."""
        a, b = landed("Eiffel Tower"), landed("Eiffel  Tower", prompt="{} was built by")
        landed("Colosseum")
        waiting = ask("Eiffel Tower", prompt="{} is made of")
        assert operations.edit(waiting)["related"] == [a, b]
        assert operations.edit(a)["related"] == [b]
        operations.revert_edit(a, "somebody")
        assert operations.edit(waiting)["related"] == [b]

    def test_delta(self, operations, landed, ask):
        """The vectors of an applied edit can be had, also after it is reverted; others have none."""
        edit = landed()
        assert operations.delta(edit) == edit.encode()
        operations.revert_edit(edit, "somebody")
        assert operations.delta(edit) == edit.encode()
        with pytest.raises(Conflict):
            operations.delta(ask())

    def test_filters(self, operations, landed, ask):
        """Edits are listed by status and by subject."""
        applied, waiting = landed(), ask("Colosseum")
        assert [edit["id"] for edit in operations.edits(status="applied")["items"]] == [applied]
        assert [edit["id"] for edit in operations.edits(subject=" Colosseum")["items"]] == [waiting]
        with pytest.raises(InvalidInput, match="queued, running"):
            operations.edits(status="done")

    def test_pages(self, operations, ask):
        """Pages follow each other newest first, without gap or repetition, also when edits come meanwhile."""
        ids = [ask(f"Tower {n}") for n in range(4)]
        seen, cursor = [], None
        while True:
            page = operations.edits(cursor=cursor, limit=1)
            seen += [edit["id"] for edit in page["items"]]
            if cursor is None:
                ask("Tower late")
            cursor = page["next"]
            if cursor is None:
                break
        assert seen == ids[::-1]

    def test_ledger_pages(self, operations, landed):
        """The ledger is paged oldest first, and up to a version."""
        for n in range(5):
            landed(f"Tower {n}")
        first = operations.ledger(limit=3)
        rest = operations.ledger(cursor=first["next"], limit=3)
        assert [entry["version"] for entry in first["items"] + rest["items"]] == [1, 2, 3, 4, 5]
        assert (rest["next"], rest["head"]) == (None, 5)
        assert [entry["version"] for entry in operations.ledger(version=2)["items"]] == [1, 2]

    def test_the_ledger_turned_round(self, operations, landed):
        """Newest first, the ledger has the same entries and pages, and `version` cuts the same ones off."""
        for n in range(5):
            landed(f"Tower {n}")
        first = operations.ledger(limit=3, newest_first=True)
        rest = operations.ledger(cursor=first["next"], limit=3, newest_first=True)
        assert [entry["version"] for entry in first["items"] + rest["items"]] == [5, 4, 3, 2, 1]
        assert rest["next"] is None
        cut = operations.ledger(version=2, limit=1, newest_first=True)
        rest = operations.ledger(cursor=cut["next"], version=2, newest_first=True)
        assert [entry["version"] for entry in cut["items"] + rest["items"]] == [2, 1]

    @pytest.mark.parametrize("cursor", ["nonsense!", "é", "", "bnVsbA", "MQ", "W10", "x" * 999])
    def test_strange_cursor(self, operations, cursor):
        """A cursor that is none of ours is refused."""
        with pytest.raises(InvalidInput, match="cursor"):
            operations.edits(cursor=cursor)

    @pytest.mark.parametrize("limit", [0, -1, 201])
    def test_limit(self, operations, limit):
        """A page has 1 to 200 items."""
        for page in (operations.edits, operations.traces, operations.ledger):
            with pytest.raises(InvalidInput, match="limit"):
                page(limit=limit)

    def test_verify(self, operations, landed, desk):
        """Verifying tells the entries, the head and what the replicas said."""
        landed()
        desk.attest(1, "digest")
        found = operations.verify()
        assert (found["ok"], found["findings"], found["entries"], found["head"]) == (True, [], 1, 1)
        assert [(r["worker"], r["version"], r["digest"]) for r in found["replicas"]] == [
            ("worker-1", 1, "digest")
        ]

    def test_tampered(self, operations, landed, database):
        """Verifying a changed ledger says what is wrong, as JSON."""
        landed()
        with database.session() as session:
            unguard(session)
            session.execute(update(LedgerEntry).values(actor="nobody"))
        found = operations.verify()
        assert not found["ok"]
        assert (found["findings"][0]["where"], found["findings"][0]["version"]) == ("chain", 1)


class TestJobs:
    @pytest.fixture
    def every(self, operations, ask):
        """A job of each kind, oldest first."""
        return [ask("a"), operations.submit_trace(trace_request(), "somebody")["id"], ask("b")]

    @pytest.fixture
    def failed(self, ask, desk, broker):
        edit = ask()
        broker.take(["edit"], 1, 0)
        desk.fail(desk.start(edit), "out of memory")
        return edit

    def test_all_kinds(self, operations, every):
        """Jobs of all kinds are in one list, newest first, page by page."""
        assert [job["id"] for job in operations.jobs()["items"]] == every[::-1]
        assert [job["kind"] for job in operations.jobs()["items"]] == ["edit", "trace", "edit"]
        paged, cursor = [], None
        while True:
            page = operations.jobs(cursor=cursor, limit=1)
            paged += [job["id"] for job in page["items"]]
            if not (cursor := page["next"]):
                break
        assert paged == every[::-1]

    def test_narrowed(self, operations, every, failed):
        """The list can be narrowed by kind, by status and to the dead."""
        assert [job["id"] for job in operations.jobs(kind="trace")["items"]] == [every[1]]
        assert [job["id"] for job in operations.jobs(status="failed")["items"]] == [failed]
        assert operations.jobs(dead=True)["items"] == []
        assert len(operations.jobs(dead=False)["items"]) == 4

    @pytest.mark.parametrize(
        "bad", [{"status": "x"}, {"kind": "generate"}, {"limit": 0}, {"cursor": "x"}, {"cursor": "ImdvbmUi"}]
    )
    def test_refused(self, operations, bad):
        """What cannot be listed is refused."""
        with pytest.raises(InvalidInput):
            operations.jobs(**bad)

    def test_retry(self, operations, failed, broker, desk):
        """A failed job waits again as if it had never been tried, and its listeners hear the new end."""
        job = operations.retry(failed, "admin")
        assert (job["status"], job["attempts"], job["error"], job["dead"]) == ("queued", 0, None, False)
        assert operations.edit(failed)["ended"] is None
        assert [d.job_id for d in broker.take(["edit"], 1, 0)] == [failed]
        again = desk.start(failed)
        assert again.attempt == 1
        desk.finish(again, "rejected")
        assert [(e.name, e.data["status"]) for e in heard(operations, failed)] == [("end", "rejected")]
        assert [event.data["status"] for event in listened(broker, failed)] == ["rejected"]

    def test_retry_what_did_not_fail(self, operations, ask, landed):
        """Nothing but a failed job is tried again."""
        for job in (ask("a"), landed("b")):
            with pytest.raises(Conflict, match="only a job that failed"):
                operations.retry(job, "admin")
        with pytest.raises(NotFound):
            operations.retry("edit_gone", "admin")

    def test_retry_twice(self, operations, failed, broker):
        """Of retries that come at once one is carried out."""
        barrier = threading.Barrier(4)

        def retry(_):
            barrier.wait()
            try:
                return operations.retry(failed, "admin")["status"]
            except Conflict:
                return None

        with ThreadPoolExecutor(4) as pool:
            assert sorted(pool.map(retry, range(4)), key=str) == [None] * 3 + ["queued"]
        assert broker.waiting("edit") == 1

    def test_retry_while_the_queue_is_down(self, operations, failed, broker, monkeypatch):
        """A job whose old end cannot be unsaid is not tried again: nothing has happened then."""
        monkeypatch.setattr(broker, "forget", down)
        with pytest.raises(Unavailable):
            operations.retry(failed, "admin")
        assert operations.edit(failed)["status"] == "failed"


class TestEvents:
    def test_end_that_nobody_told(self, operations, ask, desk, monkeypatch):
        """An end that was committed and never told, because the worker died, is found in the row."""
        monkeypatch.setattr(verbs, "LOOK", 0.05)
        edit = ask()
        job = desk.start(edit)

        async def listen():
            async with asyncio.timeout(20):
                events = operations.events(edit)
                listener = asyncio.ensure_future(anext(events))
                await asyncio.sleep(0.2)
                monkeypatch.setattr(operations.broker, "publish", lambda *_, **__: None)
                await asyncio.to_thread(desk.finish, job, "rejected")
                return [await listener] + [event async for event in events]

        assert [(e.name, e.data["status"]) for e in asyncio.run(listen())] == [("end", "rejected")]

    def test_from_first_to_last(self, operations, ask, desk):
        """A listener hears the progress and then the end, with the resource."""
        edit = ask()

        async def listen():
            async with asyncio.timeout(20):
                events = operations.events(edit)
                job = await asyncio.to_thread(desk.start, edit)
                listener = asyncio.ensure_future(anext(events))
                await asyncio.to_thread(desk.progress, job, Progress("value", 1, 2))
                first = await listener
                await asyncio.to_thread(desk.finish, job, "rejected", {})
                return [first] + [event async for event in events]

        events = asyncio.run(listen())
        assert [event.name for event in events] == ["progress", "end"]
        assert events[-1].data == operations.edit(edit)

    def test_long_ended(self, operations, ask, database, tmp_path):
        """A job whose news nobody remembers gives its end from its row."""
        edit = ask()
        operations.revert_edit(edit, "somebody")
        restarted = Operations(database, MemoryBroker(), Settings(data=tmp_path))
        (event,) = heard(restarted, edit, "1")
        assert (event.name, event.data) == ("end", operations.edit(edit))
        assert event.id.isdecimal()

    def test_unknown(self, operations):
        """There is no news of what is not there."""
        with pytest.raises(NotFound):
            heard(operations, "edit_gone")


class TestTrace:
    def test_trace(self, operations, broker):
        """A trace is queued and announced, listed, and cancelled, twice without harm."""
        trace = operations.submit_trace(trace_request(), "somebody")
        assert (trace["status"], trace["version"]) == ("queued", None)
        assert trace["request"]["subject"] == "Eiffel Tower"
        assert trace["links"]["self"] == f"/trace/{trace['id']}"
        assert [d.job_id for d in broker.take(["trace"], 1, 0)] == [trace["id"]]
        assert operations.traces()["items"] == [trace]
        assert operations.cancel_trace(trace["id"])["status"] == "cancelled"
        assert operations.cancel_trace(trace["id"])["status"] == "cancelled"

    @pytest.mark.parametrize(
        ("field", "changes"),
        [
            ("subject", {"subject": "Colosseum"}),
            ("version", {"version": 1}),
            ("version", {"version": -1}),
            ("prompt", {"prompt": "Eiffel Tower " * 50}),
            ("noise", {"noise": "loud"}),
            ("noise", {"noise": -1.0}),
            ("noise", {"noise": float("inf")}),
        ],
    )
    def test_refused(self, operations, field, changes):
        """A trace that cannot be run is refused, with the field."""
        with pytest.raises(InvalidInput) as error:
            operations.submit_trace(trace_request(**changes), "a")
        assert error.value.field == field
        assert operations.traces()["items"] == []


class TestEvaluation:
    def test_evaluation(self, operations, broker):
        """An evaluation is queued and announced, listed, and cancelled, twice without harm."""
        asked = evaluation_request(record(), record(target_true="Paris"), method="memit")
        evaluation = operations.submit_evaluation(asked, "somebody")
        assert evaluation["status"] == "queued"
        assert (evaluation["request"]["method"], evaluation["request"]["records"]) == ("memit", 2)
        assert evaluation["links"]["self"] == f"/evaluations/{evaluation['id']}"
        assert [d.job_id for d in broker.take(["evaluation"], 1, 0)] == [evaluation["id"]]
        (job,) = operations.jobs()["items"]
        assert (job["subject"], job["links"]["self"]) == ("memit on 2 records", evaluation["links"]["self"])
        for _ in range(2):
            assert operations.cancel_evaluation(evaluation["id"])["status"] == "cancelled"

    def test_lists_are_light(self, operations, desk, database):
        """What was found is read where one evaluation is asked for, and by no list."""
        evaluation = operations.submit_evaluation(evaluation_request(), "somebody")["id"]
        desk.finish(desk.start(evaluation), "done", {"found": [1.0, None]})
        statements = []
        event.listen(database.engine, "before_cursor_execute", lambda *a: statements.append(a[2]))
        for found in (operations.evaluations(), operations.jobs()):
            (shown,) = found["items"]
            assert (shown["id"], shown["status"]) == (evaluation, "done")
            assert "result" not in shown
        assert not any("jobs.result" in statement for statement in statements)
        assert operations.evaluation(evaluation)["result"] == {"found": [1.0, None]}

    def test_facts(self, operations, desk):
        """The table beside the model is evaluated where there is one."""
        asked = EvaluationRequest(dataset="facts", limit=3)
        with pytest.raises(InvalidInput, match="no table of facts") as error:
            operations.submit_evaluation(asked, "a")
        assert error.value.field == "dataset"
        desk.register(INFO | {"facts": True}, tokenizer_json())
        evaluation = operations.submit_evaluation(asked, "a")
        assert (evaluation["request"]["records"], evaluation["request"]["limit"]) == (None, 3)

    @pytest.mark.parametrize(
        ("field", "changes"),
        [
            ("hparams", {"hparams": {"layers": [9]}}),
            ("hparams", {"hparams": {"soul": 1}}),
            ("strengths", {"mode": "sequence", "found_on": "edited", "strengths": [1.0, 2.0]}),
            ("records", {"records": None}),
            ("records", {"dataset": "facts"}),
            ("records", {"records": [{}]}),
            ("records", {"records": [record(), record(subject="")]}),
            ("records", {"records": [record(prompt="{} and {}")]}),
            ("records", {"records": [record(prompt="{} is" + " far" * 80)]}),
            ("records", {"records": [record(paraphrases=["far " * 80])]}),
            ("records", {"records": [record()], "objective": "erase"}),
        ],
    )
    def test_refused(self, operations, field, changes):
        """An evaluation that cannot be run is refused, with the field."""
        with pytest.raises(InvalidInput) as error:
            operations.submit_evaluation(EvaluationRequest(**{"records": [record()], **changes}), "a")
        assert error.value.field == field
        assert operations.evaluations()["items"] == []

    def test_which_record(self, operations):
        """The refusal names the record."""
        with pytest.raises(InvalidInput, match="record 2: the prompt has"):
            operations.submit_evaluation(
                evaluation_request(record(), record(prompt="{} is" + " far" * 80)), "a"
            )


class TestSpeech:
    def test_generate(self, operations, broker):
        """A generation goes to the workers as it was asked."""
        request = GenerateRequest(prompt="The Eiffel Tower", seed=7, stop=["."])
        channel = operations.generate(request)
        (delivery,) = broker.take(["generate"], 1, 0)
        assert delivery.job_id == channel
        assert GenerateRequest.model_validate(delivery.payload) == request

    def test_compare(self, operations, broker, landed):
        """So does a comparison."""
        landed()
        request = CompareRequest(prompt="The Eiffel Tower", versions=(0, 1))
        operations.compare(request)
        (delivery,) = broker.take(["compare"], 1, 0)
        assert CompareRequest.model_validate(delivery.payload) == request

    @pytest.mark.parametrize(
        ("field", "changes"),
        [
            ("version", {"version": 1}),
            ("version", {"version": -1}),
            ("min_version", {"min_version": 1}),
            ("prompt", {"prompts": ["both"]}),
            ("prompt", {"prompt": "word " * 100}),
        ],
    )
    def test_refused(self, operations, broker, field, changes):
        """A generation that cannot be had is refused before a worker hears of it."""
        with pytest.raises(InvalidInput) as error:
            operations.generate(GenerateRequest(**{"prompt": "The", **changes}))
        assert error.value.field == field
        assert broker.waiting("generate") == 0

    def test_older_than_wanted(self, operations, landed):
        """A pinned version must not be older than the one that the client has seen."""
        landed()
        assert operations.generate(GenerateRequest(prompt="The", min_version=1))
        assert operations.generate(GenerateRequest(prompt="The", version=1, min_version=1))
        with pytest.raises(InvalidInput, match="older"):
            operations.generate(GenerateRequest(prompt="The", version="base", min_version=1))

    def test_unknown_side(self, operations):
        """Both versions of a comparison must exist."""
        with pytest.raises(InvalidInput, match="no version 3"):
            operations.compare(CompareRequest(prompt="The", versions=("base", 3)))

    def test_ask_again(self, operations, broker):
        """A call that the queue lost is asked again as it was, on its channel."""
        request = GenerateRequest(prompt="The", seed=3)
        channel = operations.generate(request)
        (first,) = broker.take(["generate"], 1, 0)
        broker.done(first)
        operations.ask_again("generate", channel, request)
        (second,) = broker.take(["generate"], 1, 0)
        assert (second.job_id, second.payload) == (channel, first.payload)

    def test_most_tokens(self, database, broker, desk, tmp_path):
        """No more tokens can be asked for than the settings allow."""
        operations = Operations(database, broker, Settings(data=tmp_path, max_new_tokens=7))
        operations.generate(GenerateRequest(prompt="The", max_new_tokens=7))
        for verb, request in (
            (operations.generate, GenerateRequest(prompt="The", max_new_tokens=8)),
            (operations.compare, CompareRequest(prompt="The", max_new_tokens=8)),
        ):
            with pytest.raises(InvalidInput, match="at most 7") as error:
                verb(request)
            assert error.value.field == "max_new_tokens"

    def test_the_tokenizer_is_read_once(self, operations, database, desk):
        """Of the megabytes of a tokenizer nothing is read by a request, but by the first after a worker came up."""
        asked = []

        def note(*args):
            asked.append("tokenizer" in args[2])

        event.listen(database.engine, "before_cursor_execute", note)
        for _ in range(3):
            operations.generate(GenerateRequest(prompt="The"))
        assert sum(asked) == 1
        desk.register(INFO, tokenizer_json())
        asked.clear()
        for _ in range(2):
            operations.generate(GenerateRequest(prompt="The"))
        assert sum(asked) == 1
        event.remove(database.engine, "before_cursor_execute", note)

    def test_queue_full(self, operations):
        """Too many waiting generations are refused with the time after which to try again."""
        for _ in range(5):
            operations.generate(GenerateRequest(prompt="The"))
        with pytest.raises(QueueFull) as error:
            operations.generate(GenerateRequest(prompt="The"))
        assert error.value.retry_after > 0


def test_free_of_torch():
    """Operations, and all that they are wired with, never import torch."""
    code = "import service.bootstrap, sys; raise SystemExit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
