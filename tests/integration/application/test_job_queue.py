"""What jobs of every kind share: room, keys, and being taken back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from service.application import Services
from service.db.database import Database
from service.errors import InvalidInput, NotFound, QueueFull
from service.jobs.broker import Broker
from service.kit import ids
from service.schemas import GenerateRequest
from service.settings import Settings
from tests.support.job_rows import claim_job
from tests.support.service_requests import collect_job_events, edit_request, raise_unavailable, trace_request
from tests.support.workers import WorkerParts


class TestSubmit:
    def test_submit(self, services: Services, broker: Broker) -> None:
        """An edit is queued as a row and then announced; the resource says all that was asked."""
        (edit,) = services.edits.submit([edit_request(target_true="Paris")], "somebody")
        assert edit["id"].startswith("edit_")
        assert edit.items() >= {"status": "queued", "subject": "Eiffel Tower", "target_true": "Paris"}.items()
        assert edit["links"] == {
            "self": f"/edits/{edit['id']}",
            "events": f"/edits/{edit['id']}/events",
            "delta": f"/edits/{edit['id']}/delta",
        }
        assert services.edits.get(edit["id"]) == edit
        assert [delivery.job_id for delivery in broker.receive(["edit"], 9, 0)] == [edit["id"]]

    def test_many(self, services: Services, broker: Broker) -> None:
        """Many edits are queued in their order."""
        made = services.edits.submit([edit_request(f"Tower {n}") for n in range(4)], "somebody")
        assert [edit["subject"] for edit in made] == [f"Tower {n}" for n in range(4)]
        assert [d.job_id for d in broker.receive(["edit"], 9, 0)] == [edit["id"] for edit in made]

    def test_all_or_none(self, services: Services, broker: Broker) -> None:
        """One bad edit among many: nothing is written, and the error names the place."""
        with pytest.raises(InvalidInput) as error:
            services.edits.submit([edit_request(), edit_request(prompt="no slot")], "somebody")
        assert error.value.field == "edits.1.prompt"
        assert services.edits.page()["items"] == []
        assert broker.queue_depth("edit") == 0

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
    def test_refused(self, services: Services, field: str, changes: Any) -> None:
        """What cannot be carried out is refused before anything is written, with the field."""
        with pytest.raises(InvalidInput) as error:
            services.edits.submit([edit_request(**changes)], "a")
        assert error.value.field == field
        assert services.edits.page()["items"] == []

    def test_queue_full(self, services: Services, submit_edit: Callable[..., Any]) -> None:
        """Too many waiting jobs are refused, all or none, until some have gone."""
        first = submit_edit()
        with pytest.raises(QueueFull, match="1 jobs are queued, at most 5"):
            services.edits.submit([edit_request()] * 5, "somebody")
        services.edits.submit([edit_request()] * 4, "somebody")
        with pytest.raises(QueueFull):
            services.traces.submit(trace_request(), "somebody")
        services.edits.revert(first, "somebody")
        services.traces.submit(trace_request(), "somebody")

    def test_queue_limit_of_one_actor(self, services: Services) -> None:
        """One actor may not fill the queue: each has room of their own, which a key may have more or less of."""
        requests = [edit_request()]
        services.edits.submit(requests * 2, "a", max_queued=2)
        with pytest.raises(QueueFull, match="2 of your jobs are queued, at most 2") as error:
            services.edits.submit(requests, "a", max_queued=2)
        assert error.value.retry_after > 0
        with pytest.raises(QueueFull):
            services.traces.submit(trace_request(), "a", max_queued=2)
        services.edits.submit(requests, "b", max_queued=2)
        services.edits.submit(requests, "a", max_queued=3)

    def test_default_queue_limit_of_an_actor(
        self, database: Database, broker: Broker, worker: WorkerParts, tmp_path: Path
    ) -> None:
        """Without a limit of their own the setting's holds."""
        services = Services(database, broker, Settings(data_dir=tmp_path, max_queued_per_key=1))
        services.edits.submit([edit_request()], "a")
        with pytest.raises(QueueFull):
            services.edits.submit([edit_request()], "a")

    def test_queue_is_down(self, services: Services, broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
        """A row that is committed is accepted, though the bell could not be rung: a sweep rings it."""
        monkeypatch.setattr(broker, "notify", raise_unavailable)
        (edit,) = services.edits.submit([edit_request()], "a")
        assert services.edits.get(edit["id"])["status"] == "queued"

    def test_request_id(self, services: Services, broker: Broker) -> None:
        """The id of the request goes with what it asked for."""
        token = ids.request_id.set("req-7")
        services.edits.submit([edit_request()], "a")
        services.generation.generate(GenerateRequest(prompt="The"))
        ids.request_id.reset(token)
        assert services.jobs.page()["items"][0]["request_id"] == "req-7"
        assert [d.request_id for d in broker.receive(["generate"], 1, 0)] == ["req-7"]


class TestIdempotency:
    def test_again(self, services: Services, broker: Broker) -> None:
        """The same key and body give the same edits, which are queued once."""
        first, again = (services.edits.submit([edit_request()] * 2, "a", ("key", "body")) for _ in range(2))
        assert first == again
        assert broker.queue_depth("edit") == 2

    def test_again_when_full(self, services: Services) -> None:
        """A repetition is answered although the queue has filled up since."""
        first = services.edits.submit([edit_request()] * 5, "a", ("key", "body"))
        assert services.edits.submit([edit_request()] * 5, "a", ("key", "body")) == first

    def test_other_body(self, services: Services) -> None:
        """A key that comes with another body is refused."""
        services.traces.submit(trace_request(), "a", ("key", "body"))
        with pytest.raises(InvalidInput, match="another request body"):
            services.edits.submit([edit_request()], "a", ("key", "other"))

    def test_other_actor(self, services: Services) -> None:
        """Keys of different people have nothing to do with each other."""
        first, second = (services.traces.submit(trace_request(), who, ("key", "body")) for who in "ab")
        assert first["id"] != second["id"]

    def test_at_once(self, services: Services) -> None:
        """Of requests with one key that come at once, one makes the edit and all get it."""
        barrier = threading.Barrier(5)

        def submit(_: Any) -> Any:
            barrier.wait()
            return services.edits.submit([edit_request()], "a", ("key", "body"))[0]["id"]

        with ThreadPoolExecutor(5) as pool:
            assert len(set(pool.map(submit, range(5)))) == 1
        assert len(services.edits.page()["items"]) == 1

    def test_refused_request_keeps_no_key(self, services: Services) -> None:
        """A request that was refused leaves its key free."""
        with pytest.raises(QueueFull):
            services.edits.submit([edit_request()] * 6, "a", ("key", "body"))
        assert services.edits.submit([edit_request()], "a", ("key", "other"))

    @pytest.mark.parametrize("key", ["", "x" * 256])
    def test_key(self, services: Services, key: Any) -> None:
        """A key has a sensible length."""
        with pytest.raises(InvalidInput):
            services.edits.submit([edit_request()], "a", (key, "body"))


class TestCancelOrRevert:
    def test_queued(self, services: Services, submit_edit: Callable[..., Any], worker: WorkerParts) -> None:
        """A waiting edit is cancelled at once, and its listeners hear the end."""
        edit = submit_edit()
        cancelled = services.edits.revert(edit, "another")
        assert (cancelled["status"], cancelled["version"]) == ("cancelled", None)
        assert cancelled["ended"] is not None
        assert collect_job_events(services, edit)[-1].data == cancelled
        assert worker.jobs.claim(edit) is None

    def test_running(self, services: Services, submit_edit: Callable[..., Any], worker: WorkerParts) -> None:
        """A running edit is asked to stop, and says so by ending as cancelled."""
        edit = submit_edit()
        job = claim_job(worker, edit)
        assert services.edits.revert(edit, "another")["status"] == "running"
        assert worker.jobs.cancel_requested(job)

    def test_applied(self, services: Services, applied_edit: Callable[..., Any]) -> None:
        """An applied edit is reverted by an entry in the ledger, with who did it."""
        edit = applied_edit()
        reverted = services.edits.revert(edit, "another")
        assert (reverted["status"], reverted["version"], reverted["reverted_version"]) == ("reverted", 1, 2)
        entry = services.ledger.page()["items"][1]
        assert (entry["kind"], entry["edit_id"], entry["actor"]) == ("revert", edit, "another")
        assert services.ledger.verify()["ok"]

    def test_twice(
        self,
        services: Services,
        applied_edit: Callable[..., Any],
        submit_edit: Callable[..., Any],
        worker: WorkerParts,
    ) -> None:
        """Saying it twice is harmless: the same resource, and no second entry."""
        applied, waiting, running = applied_edit(), submit_edit("a"), submit_edit("b")
        worker.jobs.claim(running)
        for edit in (applied, waiting, running):
            assert services.edits.revert(edit, "x") == services.edits.revert(edit, "y")
        assert services.ledger.head() == 2

    def test_at_once(self, services: Services, applied_edit: Callable[..., Any]) -> None:
        """Of many reverts at once, one is written."""
        edit = applied_edit()
        barrier = threading.Barrier(5)

        def revert(_: Any) -> Any:
            barrier.wait()
            return services.edits.revert(edit, "somebody")["status"]

        with ThreadPoolExecutor(5) as pool:
            assert set(pool.map(revert, range(5))) == {"reverted"}
        assert services.ledger.head() == 2

    def test_supersede(self, services: Services, applied_edit: Callable[..., Any]) -> None:
        """A newer edit of a fact supersedes the older; reverting it brings the older back."""
        a, b = applied_edit(), applied_edit(prompt="The  {} is located\nin", target_new="Oslo")
        old = services.edits.get(a)
        assert (old["status"], old["superseded_by"], old["related"]) == ("superseded", b, [b])
        services.edits.revert(b, "somebody")
        old = services.edits.get(a)
        assert (old["status"], old["superseded_by"]) == ("applied", None)

    def test_superseded(self, services: Services, applied_edit: Callable[..., Any]) -> None:
        """A superseded edit can be reverted for itself; reverting the newer one then leaves the base."""
        a, b = applied_edit(), applied_edit(target_new="Oslo")
        assert services.edits.revert(a, "somebody")["status"] == "reverted"
        services.edits.revert(b, "somebody")
        assert services.models.describe()["active_edits"] == 0
        assert services.ledger.verify()["ok"]

    def test_dry_run(self, services: Services, submit_edit: Callable[..., Any], worker: WorkerParts) -> None:
        """A dry run that has ended leaves nothing to revert, whatever it is called."""
        edit = submit_edit(dry_run=True)
        worker.jobs.finish(claim_job(worker, edit), "applied", {})
        assert services.edits.revert(edit, "somebody")["status"] == "applied"
        assert services.ledger.head() == 0
        assert services.models.describe()["active_edits"] == 0

    @pytest.mark.parametrize("name", ["edit_gone", "", "é", "\x00", "trace"])
    def test_unknown(self, services: Services, name: str) -> None:
        """What is no edit is not found, a trace's id included."""
        if name == "trace":
            name = services.traces.submit(trace_request(), "a")["id"]
        for verb in (services.edits.get, services.edits.delta, lambda x: services.edits.revert(x, "a")):
            with pytest.raises(NotFound):
                verb(name)


class TestPages:
    @pytest.mark.parametrize("cursor", ["nonsense!", "é", "", "bnVsbA", "MQ", "W10", "x" * 999])
    def test_invalid_cursor(self, services: Services, cursor: Any) -> None:
        """A cursor that is none of ours is refused."""
        with pytest.raises(InvalidInput, match="cursor"):
            services.edits.page(cursor=cursor)

    @pytest.mark.parametrize("limit", [0, -1, 201])
    def test_limit(self, services: Services, limit: int) -> None:
        """A page has 1 to 200 items."""
        for page in (services.edits.page, services.traces.page, services.ledger.page):
            with pytest.raises(InvalidInput, match="limit"):
                page(limit=limit)
