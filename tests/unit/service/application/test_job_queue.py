"""What jobs of every kind share: room, keys, and being taken back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from service.application import Operations
from service.db.database import Database
from service.errors import InvalidInput, NotFound, QueueFull
from service.jobs.broker import Broker
from service.jobs.job_store import Desk
from service.kit import ids
from service.schemas import GenerateRequest
from service.settings import Settings
from tests.support.service_requests import down, edit_request, heard, trace_request


class TestSubmit:
    def test_submit(self, operations: Operations, broker: Broker) -> None:
        """An edit is queued as a row and then announced; the resource says all that was asked."""
        (edit,) = operations.edits.submit([edit_request(target_true="Paris")], "somebody")
        assert edit["id"].startswith("edit_")
        assert edit.items() >= {"status": "queued", "subject": "Eiffel Tower", "target_true": "Paris"}.items()
        assert edit["links"] == {
            "self": f"/edits/{edit['id']}",
            "events": f"/edits/{edit['id']}/events",
            "delta": f"/edits/{edit['id']}/delta",
        }
        assert operations.edits.get(edit["id"]) == edit
        assert [delivery.job_id for delivery in broker.take(["edit"], 9, 0)] == [edit["id"]]

    def test_many(self, operations: Operations, broker: Broker) -> None:
        """Many edits are queued in their order."""
        made = operations.edits.submit([edit_request(f"Tower {n}") for n in range(4)], "somebody")
        assert [edit["subject"] for edit in made] == [f"Tower {n}" for n in range(4)]
        assert [d.job_id for d in broker.take(["edit"], 9, 0)] == [edit["id"] for edit in made]

    def test_all_or_none(self, operations: Operations, broker: Broker) -> None:
        """One bad edit among many: nothing is written, and the error names the place."""
        with pytest.raises(InvalidInput) as error:
            operations.edits.submit([edit_request(), edit_request(prompt="no slot")], "somebody")
        assert error.value.field == "edits.1.prompt"
        assert operations.edits.page()["items"] == []
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
    def test_refused(self, operations: Operations, field: str, changes: Any) -> None:
        """What cannot be carried out is refused before anything is written, with the field."""
        with pytest.raises(InvalidInput) as error:
            operations.edits.submit([edit_request(**changes)], "a")
        assert error.value.field == field
        assert operations.edits.page()["items"] == []

    def test_queue_full(self, operations: Operations, ask: Callable[..., Any]) -> None:
        """Too many waiting jobs are refused, all or none, until some have gone."""
        first = ask()
        with pytest.raises(QueueFull, match="1 jobs wait already and at most 5"):
            operations.edits.submit([edit_request()] * 5, "somebody")
        operations.edits.submit([edit_request()] * 4, "somebody")
        with pytest.raises(QueueFull):
            operations.traces.submit(trace_request(), "somebody")
        operations.edits.revert(first, "somebody")
        operations.traces.submit(trace_request(), "somebody")

    def test_room_of_one(self, operations: Operations) -> None:
        """One actor may not fill the queue: each has room of their own, which a key may have more or less of."""
        asked = [edit_request()]
        operations.edits.submit(asked * 2, "a", max_queued=2)
        with pytest.raises(QueueFull, match="2 jobs of yours wait already and at most 2") as error:
            operations.edits.submit(asked, "a", max_queued=2)
        assert error.value.retry_after > 0
        with pytest.raises(QueueFull):
            operations.traces.submit(trace_request(), "a", max_queued=2)
        operations.edits.submit(asked, "b", max_queued=2)
        operations.edits.submit(asked, "a", max_queued=3)

    def test_room_by_default(self, database: Database, broker: Broker, desk: Desk, tmp_path: Path) -> None:
        """Without a limit of their own the setting's holds."""
        operations = Operations(database, broker, Settings(data=tmp_path, max_queued=1))
        operations.edits.submit([edit_request()], "a")
        with pytest.raises(QueueFull):
            operations.edits.submit([edit_request()], "a")

    def test_queue_is_down(
        self, operations: Operations, broker: Broker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A row that is committed is accepted, though the bell could not be rung: a sweep rings it."""
        monkeypatch.setattr(broker, "announce", down)
        (edit,) = operations.edits.submit([edit_request()], "a")
        assert operations.edits.get(edit["id"])["status"] == "queued"

    def test_request_id(self, operations: Operations, broker: Broker) -> None:
        """The id of the request goes with what it asked for."""
        token = ids.request_id.set("req-7")
        operations.edits.submit([edit_request()], "a")
        operations.calls.generate(GenerateRequest(prompt="The"))
        ids.request_id.reset(token)
        assert operations.jobs.page()["items"][0]["request_id"] == "req-7"
        assert [d.request_id for d in broker.take(["generate"], 1, 0)] == ["req-7"]


class TestIdempotency:
    def test_again(self, operations: Operations, broker: Broker) -> None:
        """The same key and body give the same edits, which are queued once."""
        first, again = (operations.edits.submit([edit_request()] * 2, "a", ("key", "body")) for _ in range(2))
        assert first == again
        assert broker.waiting("edit") == 2

    def test_again_when_full(self, operations: Operations) -> None:
        """A repetition is answered although the queue has filled up since."""
        first = operations.edits.submit([edit_request()] * 5, "a", ("key", "body"))
        assert operations.edits.submit([edit_request()] * 5, "a", ("key", "body")) == first

    def test_other_body(self, operations: Operations) -> None:
        """A key that comes with another body is refused."""
        operations.traces.submit(trace_request(), "a", ("key", "body"))
        with pytest.raises(InvalidInput, match="another body"):
            operations.edits.submit([edit_request()], "a", ("key", "other"))

    def test_other_actor(self, operations: Operations) -> None:
        """Keys of different people have nothing to do with each other."""
        first, second = (operations.traces.submit(trace_request(), who, ("key", "body")) for who in "ab")
        assert first["id"] != second["id"]

    def test_at_once(self, operations: Operations) -> None:
        """Of requests with one key that come at once, one makes the edit and all get it."""
        barrier = threading.Barrier(5)

        def submit(_: Any) -> Any:
            barrier.wait()
            return operations.edits.submit([edit_request()], "a", ("key", "body"))[0]["id"]

        with ThreadPoolExecutor(5) as pool:
            assert len(set(pool.map(submit, range(5)))) == 1
        assert len(operations.edits.page()["items"]) == 1

    def test_refused_request_keeps_no_key(self, operations: Operations) -> None:
        """A request that was refused leaves its key free."""
        with pytest.raises(QueueFull):
            operations.edits.submit([edit_request()] * 6, "a", ("key", "body"))
        assert operations.edits.submit([edit_request()], "a", ("key", "other"))

    @pytest.mark.parametrize("key", ["", "x" * 256])
    def test_key(self, operations: Operations, key: Any) -> None:
        """A key has a sensible length."""
        with pytest.raises(InvalidInput):
            operations.edits.submit([edit_request()], "a", (key, "body"))


class TestTakeBack:
    def test_queued(self, operations: Operations, ask: Callable[..., Any], desk: Desk) -> None:
        """A waiting edit is cancelled at once, and its listeners hear the end."""
        edit = ask()
        found = operations.edits.revert(edit, "another")
        assert (found["status"], found["version"]) == ("cancelled", None)
        assert found["ended"] is not None
        assert heard(operations, edit)[-1].data == found
        assert desk.start(edit) is None

    def test_running(self, operations: Operations, ask: Callable[..., Any], desk: Desk) -> None:
        """A running edit is asked to stop, and says so by ending as cancelled."""
        edit = ask()
        job = desk.start(edit)
        assert operations.edits.revert(edit, "another")["status"] == "running"
        assert desk.cancel_requested(job)

    def test_applied(self, operations: Operations, landed: Callable[..., Any]) -> None:
        """An applied edit is reverted by an entry in the ledger, with who did it."""
        edit = landed()
        found = operations.edits.revert(edit, "another")
        assert (found["status"], found["version"], found["reverted_version"]) == ("reverted", 1, 2)
        entry = operations.ledger.page()["items"][1]
        assert (entry["kind"], entry["edit_id"], entry["actor"]) == ("revert", edit, "another")
        assert operations.ledger.verify()["ok"]

    def test_twice(
        self, operations: Operations, landed: Callable[..., Any], ask: Callable[..., Any], desk: Desk
    ) -> None:
        """Saying it twice is harmless: the same resource, and no second entry."""
        applied, waiting, running = landed(), ask("a"), ask("b")
        desk.start(running)
        for edit in (applied, waiting, running):
            assert operations.edits.revert(edit, "x") == operations.edits.revert(edit, "y")
        assert operations.ledger.head() == 2

    def test_at_once(self, operations: Operations, landed: Callable[..., Any]) -> None:
        """Of many reverts at once, one is written."""
        edit = landed()
        barrier = threading.Barrier(5)

        def take_back(_: Any) -> Any:
            barrier.wait()
            return operations.edits.revert(edit, "somebody")["status"]

        with ThreadPoolExecutor(5) as pool:
            assert set(pool.map(take_back, range(5))) == {"reverted"}
        assert operations.ledger.head() == 2

    def test_supersede(self, operations: Operations, landed: Callable[..., Any]) -> None:
        """A newer edit of a fact supersedes the older; reverting it brings the older back."""
        a, b = landed(), landed(prompt="The  {} is located\nin", target_new="Oslo")
        old = operations.edits.get(a)
        assert (old["status"], old["superseded_by"], old["related"]) == ("superseded", b, [b])
        operations.edits.revert(b, "somebody")
        old = operations.edits.get(a)
        assert (old["status"], old["superseded_by"]) == ("applied", None)

    def test_superseded(self, operations: Operations, landed: Callable[..., Any]) -> None:
        """A superseded edit can be reverted for itself; reverting the newer one then leaves the base."""
        a, b = landed(), landed(target_new="Oslo")
        assert operations.edits.revert(a, "somebody")["status"] == "reverted"
        operations.edits.revert(b, "somebody")
        assert operations.models.resident()["active_edits"] == 0
        assert operations.ledger.verify()["ok"]

    def test_dry_run(self, operations: Operations, ask: Callable[..., Any], desk: Desk) -> None:
        """A dry run that has ended leaves nothing to revert, whatever it is called."""
        edit = ask(dry_run=True)
        desk.finish(desk.start(edit), "applied", {})
        assert operations.edits.revert(edit, "somebody")["status"] == "applied"
        assert operations.ledger.head() == 0
        assert operations.models.resident()["active_edits"] == 0

    @pytest.mark.parametrize("name", ["edit_gone", "", "é", "\x00", "trace"])
    def test_unknown(self, operations: Operations, name: str) -> None:
        """What is no edit is not found, a trace's id included."""
        if name == "trace":
            name = operations.traces.submit(trace_request(), "a")["id"]
        for verb in (operations.edits.get, operations.edits.delta, lambda x: operations.edits.revert(x, "a")):
            with pytest.raises(NotFound):
                verb(name)


class TestPages:
    @pytest.mark.parametrize("cursor", ["nonsense!", "é", "", "bnVsbA", "MQ", "W10", "x" * 999])
    def test_strange_cursor(self, operations: Operations, cursor: Any) -> None:
        """A cursor that is none of ours is refused."""
        with pytest.raises(InvalidInput, match="cursor"):
            operations.edits.page(cursor=cursor)

    @pytest.mark.parametrize("limit", [0, -1, 201])
    def test_limit(self, operations: Operations, limit: int) -> None:
        """A page has 1 to 200 items."""
        for page in (operations.edits.page, operations.traces.page, operations.ledger.page):
            with pytest.raises(InvalidInput, match="limit"):
                page(limit=limit)
