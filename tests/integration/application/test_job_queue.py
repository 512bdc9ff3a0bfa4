"""Submission of jobs of all kinds: queue limits, idempotency keys, cancel and revert, pages."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from service.application import Services
from service.application.caller import CallerLimits
from service.db.database import Database
from service.errors import InvalidInput, NotFound, QueueFull
from service.jobs.broker import Broker
from service.kit import ids
from service.schemas import GenerateRequest
from service.settings import Settings
from tests.support.job_rows import claim_job
from tests.support.service_requests import (
    collect_job_events,
    edit_request,
    evaluation_request,
    raise_unavailable,
    trace_request,
)
from tests.support.workers import WorkerParts


class TestSubmit:
    def test_submit(self, services: Services, broker: Broker) -> None:
        """An edit is stored as a queued row and announced; its resource has the fields of the request."""
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
        """Several edits of one request are queued in their order."""
        made = services.edits.submit([edit_request(f"Tower {n}") for n in range(4)], "somebody")
        assert [edit["subject"] for edit in made] == [f"Tower {n}" for n in range(4)]
        assert [d.job_id for d in broker.receive(["edit"], 9, 0)] == [edit["id"] for edit in made]

    def test_all_or_none(self, services: Services, broker: Broker) -> None:
        """If one edit of a request is invalid nothing is queued, and the error names the index and field."""
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
        """An invalid edit is rejected with the name of the field, and nothing is queued."""
        with pytest.raises(InvalidInput) as error:
            services.edits.submit([edit_request(**changes)], "a")
        assert error.value.field == field
        assert services.edits.page()["items"] == []

    def test_queue_full(self, services: Services, submit_edit: Callable[..., Any]) -> None:
        """A request that exceeds the queue limit is rejected as a whole; a cancelled job makes room."""
        first = submit_edit()
        with pytest.raises(QueueFull, match="1 jobs are queued, at most 5"):
            services.edits.submit([edit_request()] * 5, "somebody")
        services.edits.submit([edit_request()] * 4, "somebody")
        with pytest.raises(QueueFull):
            services.traces.submit(trace_request(), "somebody")
        services.edits.revert(first, "somebody")
        services.traces.submit(trace_request(), "somebody")

    def test_queue_limit_of_one_actor(self, services: Services) -> None:
        """Each actor has a separate limit of queued jobs; the rejection has `retry_after`."""
        requests = [edit_request()]
        services.edits.submit(requests * 2, "a", limits=CallerLimits(max_queued=2))
        with pytest.raises(QueueFull, match="2 of your jobs are queued, at most 2") as error:
            services.edits.submit(requests, "a", limits=CallerLimits(max_queued=2))
        assert error.value.retry_after > 0
        with pytest.raises(QueueFull):
            services.traces.submit(trace_request(), "a", limits=CallerLimits(max_queued=2))
        services.edits.submit(requests, "b", limits=CallerLimits(max_queued=2))
        services.edits.submit(requests, "a", limits=CallerLimits(max_queued=3))

    def test_default_queue_limit_of_an_actor(
        self, database: Database, broker: Broker, worker: WorkerParts, tmp_path: Path
    ) -> None:
        """Without a limit of its own an actor has the limit of the settings."""
        services = Services(database, broker, Settings(data_dir=tmp_path, max_queued_per_key=1))
        services.edits.submit([edit_request()], "a")
        with pytest.raises(QueueFull):
            services.edits.submit([edit_request()], "a")

    def test_queue_is_down(self, services: Services, broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
        """When the broker is down after the commit of the row, the edit is accepted as queued."""
        monkeypatch.setattr(broker, "notify", raise_unavailable)
        (edit,) = services.edits.submit([edit_request()], "a")
        assert services.edits.get(edit["id"])["status"] == "queued"

    def test_request_id(self, services: Services, broker: Broker) -> None:
        """The request id is stored with the job and sent with the call."""
        token = ids.request_id.set("req-7")
        services.edits.submit([edit_request()], "a")
        services.generation.generate(GenerateRequest(prompt="The"))
        ids.request_id.reset(token)
        assert services.jobs.page()["items"][0]["request_id"] == "req-7"
        assert [d.request_id for d in broker.receive(["generate"], 1, 0)] == ["req-7"]


class TestIdempotency:
    def test_again(self, services: Services, broker: Broker) -> None:
        """The same key and body return the same edits, which are queued once."""
        first, again = (services.edits.submit([edit_request()] * 2, "a", ("key", "body")) for _ in range(2))
        assert first == again
        assert broker.queue_depth("edit") == 2

    def test_again_when_full(self, services: Services) -> None:
        """A repeated request returns its edits although the queue is full."""
        first = services.edits.submit([edit_request()] * 5, "a", ("key", "body"))
        assert services.edits.submit([edit_request()] * 5, "a", ("key", "body")) == first

    def test_other_body(self, services: Services) -> None:
        """A key that is reused with another body is rejected."""
        services.traces.submit(trace_request(), "a", ("key", "body"))
        with pytest.raises(InvalidInput, match="another request body"):
            services.edits.submit([edit_request()], "a", ("key", "other"))

    def test_other_actor(self, services: Services) -> None:
        """One key of two actors creates two jobs."""
        first, second = (services.traces.submit(trace_request(), who, ("key", "body")) for who in "ab")
        assert first["id"] != second["id"]

    def test_at_once(self, services: Services) -> None:
        """Concurrent requests with one key create one edit, and all return it."""
        barrier = threading.Barrier(5)

        def submit(_: Any) -> Any:
            barrier.wait()
            return services.edits.submit([edit_request()], "a", ("key", "body"))[0]["id"]

        with ThreadPoolExecutor(5) as pool:
            assert len(set(pool.map(submit, range(5)))) == 1
        assert len(services.edits.page()["items"]) == 1

    def test_refused_request_keeps_no_key(self, services: Services) -> None:
        """A key of a rejected request can be used for another body."""
        with pytest.raises(QueueFull):
            services.edits.submit([edit_request()] * 6, "a", ("key", "body"))
        assert services.edits.submit([edit_request()], "a", ("key", "other"))

    @pytest.mark.parametrize("key", ["", "x" * 256])
    def test_key(self, services: Services, key: Any) -> None:
        """An empty key, or one of 256 characters, is rejected."""
        with pytest.raises(InvalidInput):
            services.edits.submit([edit_request()], "a", (key, "body"))


class TestCancelOrRevert:
    def test_queued(self, services: Services, submit_edit: Callable[..., Any], worker: WorkerParts) -> None:
        """A queued edit is cancelled at once, its listeners receive the end, and it cannot be claimed."""
        edit = submit_edit()
        cancelled = services.edits.revert(edit, "another")
        assert (cancelled["status"], cancelled["version"]) == ("cancelled", None)
        assert cancelled["ended"] is not None
        assert collect_job_events(services, edit)[-1].data == cancelled
        assert worker.jobs.claim(edit) is None

    def test_running(self, services: Services, submit_edit: Callable[..., Any], worker: WorkerParts) -> None:
        """For a running edit a cancellation is requested; it stays running until the worker ends it."""
        edit = submit_edit()
        job = claim_job(worker, edit)
        assert services.edits.revert(edit, "another")["status"] == "running"
        assert worker.jobs.cancel_requested(job)

    def test_who_cancelled(self, services: Services, worker: WorkerParts) -> None:
        """A cancelled job of each kind names the actor that cancelled it first, while it is queued or running, and in
        the list of all jobs. A job that ended otherwise names none."""
        requests = {"trace": trace_request(), "evaluation": evaluation_request()}
        edits = [services.edits.submit([edit_request(str(n))], "somebody")[0] for n in range(3)]
        others = [services.by_kind[kind].submit(request, "somebody") for kind, request in requests.items()]
        queued, running, finished = (edit["id"] for edit in edits)
        assert services.edits.get(queued)["cancelled_by"] is None
        claimed = [claim_job(worker, job_id) for job_id in (running, finished)]
        for service, job_id in [
            *((services.edits, edit["id"]) for edit in edits),
            (services.traces, others[0]["id"]),
            (services.evaluations, others[1]["id"]),
        ]:
            assert service.cancel(job_id, "another")["cancelled_by"] == "another"
            assert service.cancel(job_id, "a third")["cancelled_by"] == "another"
        worker.jobs.finish(claimed[0], "cancelled")
        worker.jobs.fail(claimed[1], InvalidInput("it failed before it was cancelled."))
        named = {job["id"]: job["cancelled_by"] for job in services.jobs.page()["items"]}
        assert named == {queued: "another", running: "another", finished: None} | {
            job["id"]: "another" for job in others
        }
        services.jobs.retry(finished, "somebody")
        claim_job(worker, finished)
        assert services.edits.get(finished)["cancelled_by"] is None

    def test_applied(self, services: Services, applied_edit: Callable[..., Any]) -> None:
        """An applied edit is reverted by a ledger entry with the actor of the revert."""
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
        """A repeated revert or cancellation returns the same resource and adds no ledger entry."""
        applied, waiting, running = applied_edit(), submit_edit("a"), submit_edit("b")
        worker.jobs.claim(running)
        for edit in (applied, waiting, running):
            assert services.edits.revert(edit, "x") == services.edits.revert(edit, "y")
        assert services.ledger.head() == 2

    def test_at_once(self, services: Services, applied_edit: Callable[..., Any]) -> None:
        """Concurrent reverts of one edit add one ledger entry."""
        edit = applied_edit()
        barrier = threading.Barrier(5)

        def revert(_: Any) -> Any:
            barrier.wait()
            return services.edits.revert(edit, "somebody")["status"]

        with ThreadPoolExecutor(5) as pool:
            assert set(pool.map(revert, range(5))) == {"reverted"}
        assert services.ledger.head() == 2

    def test_supersede(self, services: Services, applied_edit: Callable[..., Any]) -> None:
        """A newer edit of a fact supersedes the older one; reverting it makes the older one active again."""
        a, b = applied_edit(), applied_edit(prompt="The  {} is located\nin", target_new="Oslo")
        old = services.edits.get(a)
        assert (old["status"], old["superseded_by"], old["related"]) == ("superseded", b, [b])
        services.edits.revert(b, "somebody")
        old = services.edits.get(a)
        assert (old["status"], old["superseded_by"]) == ("applied", None)

    def test_superseded(self, services: Services, applied_edit: Callable[..., Any]) -> None:
        """A superseded edit can be reverted; after the newer one is reverted too, no edit is active."""
        a, b = applied_edit(), applied_edit(target_new="Oslo")
        assert services.edits.revert(a, "somebody")["status"] == "reverted"
        services.edits.revert(b, "somebody")
        assert services.models.describe()["active_edits"] == 0
        assert services.ledger.verify()["ok"]

    def test_dry_run(self, services: Services, submit_edit: Callable[..., Any], worker: WorkerParts) -> None:
        """Reverting a dry run that has ended changes neither its status nor the ledger."""
        edit = submit_edit(dry_run=True)
        worker.jobs.finish(claim_job(worker, edit), "applied", {})
        assert services.edits.revert(edit, "somebody")["status"] == "applied"
        assert services.ledger.head() == 0
        assert services.models.describe()["active_edits"] == 0

    @pytest.mark.parametrize("name", ["edit_gone", "", "é", "\x00", "trace"])
    def test_unknown(self, services: Services, name: str) -> None:
        """An id that is not that of an edit is not found, such as the id of a trace."""
        if name == "trace":
            name = services.traces.submit(trace_request(), "a")["id"]
        for verb in (services.edits.get, services.edits.delta, lambda x: services.edits.revert(x, "a")):
            with pytest.raises(NotFound):
                verb(name)


class TestPages:
    @pytest.mark.parametrize("cursor", ["nonsense!", "é", "", "bnVsbA", "MQ", "W10", "x" * 999])
    def test_invalid_cursor(self, services: Services, cursor: Any) -> None:
        """An invalid cursor is rejected."""
        with pytest.raises(InvalidInput, match="cursor"):
            services.edits.page(cursor=cursor)

    @pytest.mark.parametrize("limit", [0, -1, 201])
    def test_limit(self, services: Services, limit: int) -> None:
        """A page limit outside of 1 to 200 is rejected."""
        for page in (services.edits.page, services.traces.page, services.ledger.page):
            with pytest.raises(InvalidInput, match="limit"):
                page(limit=limit)
