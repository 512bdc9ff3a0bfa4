"""Jobs of all kinds: lists, retries and event streams."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from service.application import Services
from service.application import jobs as job_service_module
from service.db.database import Database
from service.errors import Conflict, InvalidInput, NotFound, Unavailable
from service.jobs.broker import Broker
from service.jobs.memory_broker import MemoryBroker
from service.kit.steps import Phase, Progress
from service.settings import Settings
from tests.support.job_rows import claim_job
from tests.support.service_requests import (
    collect_channel_events,
    collect_job_events,
    raise_unavailable,
    trace_request,
)
from tests.support.workers import WorkerParts


class TestJobs:
    @pytest.fixture
    def one_of_each_kind(self, services: Services, submit_edit: Callable[..., Any]) -> Any:
        """Return the ids of two edits and a trace, oldest first."""
        return [submit_edit("a"), services.traces.submit(trace_request(), "somebody")["id"], submit_edit("b")]

    @pytest.fixture
    def failed(self, submit_edit: Callable[..., Any], worker: WorkerParts, broker: Broker) -> Any:
        edit = submit_edit()
        broker.receive(["edit"], 1, 0)
        worker.jobs.fail(claim_job(worker, edit), RuntimeError("out of memory"))
        return edit

    def test_all_kinds(self, services: Services, one_of_each_kind: Any) -> None:
        """Jobs of all kinds are in one list, newest first, also when it is read in pages."""
        assert [job["id"] for job in services.jobs.page()["items"]] == one_of_each_kind[::-1]
        assert [job["kind"] for job in services.jobs.page()["items"]] == ["edit", "trace", "edit"]
        paged, cursor = [], None
        while True:
            page = services.jobs.page(cursor=cursor, limit=1)
            paged += [job["id"] for job in page["items"]]
            if not (cursor := page["next"]):
                break
        assert paged == one_of_each_kind[::-1]

    def test_filters(self, services: Services, one_of_each_kind: Any, failed: Any) -> None:
        """Jobs can be filtered by kind, by status and by exhausted attempts."""
        assert [job["id"] for job in services.jobs.page(kind="trace")["items"]] == [one_of_each_kind[1]]
        assert [job["id"] for job in services.jobs.page(status="failed")["items"]] == [failed]
        assert services.jobs.page(exhausted=True)["items"] == []
        assert len(services.jobs.page(exhausted=False)["items"]) == 4

    @pytest.mark.parametrize(
        "bad", [{"status": "x"}, {"kind": "generate"}, {"limit": 0}, {"cursor": "x"}, {"cursor": "ImdvbmUi"}]
    )
    def test_refused(self, services: Services, bad: Any) -> None:
        """An unknown filter value, an invalid limit or an invalid cursor is rejected."""
        with pytest.raises(InvalidInput):
            services.jobs.page(**bad)

    def test_retry(self, services: Services, failed: Any, broker: Broker, worker: WorkerParts) -> None:
        """A retried job is queued without attempts or error; its listeners receive only the new end event."""
        job = services.jobs.retry(failed, "admin")
        assert (job["status"], job["attempts"], job["error"], job["exhausted"]) == ("queued", 0, None, False)
        assert services.edits.get(failed)["ended"] is None
        assert [d.job_id for d in broker.receive(["edit"], 1, 0)] == [failed]
        again = claim_job(worker, failed)
        assert again.attempt == 1
        worker.jobs.finish(again, "rejected")
        assert [(e.name, e.data["status"]) for e in collect_job_events(services, failed)] == [
            ("end", "rejected")
        ]
        assert [event.data["status"] for event in collect_channel_events(broker, failed)] == ["rejected"]

    def test_retry_what_did_not_fail(
        self, services: Services, submit_edit: Callable[..., Any], applied_edit: Callable[..., Any]
    ) -> None:
        """Only a failed job can be retried, and an unknown id is not found."""
        for job in (submit_edit("a"), applied_edit("b")):
            with pytest.raises(Conflict, match="only a failed job"):
                services.jobs.retry(job, "admin")
        with pytest.raises(NotFound):
            services.jobs.retry("edit_gone", "admin")

    def test_retry_twice(self, services: Services, failed: Any, broker: Broker) -> None:
        """Of concurrent retries of a job one succeeds, and the job is queued once."""
        barrier = threading.Barrier(4)

        def retry(_: Any) -> Any:
            barrier.wait()
            try:
                return services.jobs.retry(failed, "admin")["status"]
            except Conflict:
                return None

        with ThreadPoolExecutor(4) as pool:
            assert sorted(pool.map(retry, range(4)), key=str) == [None] * 3 + ["queued"]
        assert broker.queue_depth("edit") == 1

    def test_retry_while_the_queue_is_down(
        self, services: Services, failed: Any, broker: Broker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """When the broker cannot delete the channel of the job, the retry fails and the job stays failed."""
        monkeypatch.setattr(broker, "delete_channel", raise_unavailable)
        with pytest.raises(Unavailable):
            services.jobs.retry(failed, "admin")
        assert services.edits.get(failed)["status"] == "failed"


class TestEvents:
    def test_end_that_was_never_published(
        self,
        services: Services,
        submit_edit: Callable[..., Any],
        worker: WorkerParts,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A listener receives an end that was committed but never published, from the row of the job."""
        monkeypatch.setattr(job_service_module, "END_CHECK_INTERVAL", 0.05)
        edit = submit_edit()
        job = claim_job(worker, edit)

        async def listen() -> Any:
            async with asyncio.timeout(20):
                events = services.jobs.events(edit)
                listener = asyncio.ensure_future(anext(events))
                await asyncio.sleep(0.2)
                monkeypatch.setattr(services.broker, "publish", lambda *_, **__: None)
                await asyncio.to_thread(worker.jobs.finish, job, "rejected")
                return [await listener] + [event async for event in events]

        assert [(e.name, e.data["status"]) for e in asyncio.run(listen())] == [("end", "rejected")]

    def test_from_first_to_last(
        self, services: Services, submit_edit: Callable[..., Any], worker: WorkerParts
    ) -> None:
        """A listener receives the progress and then the end event with the resource."""
        edit = submit_edit()

        async def listen() -> Any:
            async with asyncio.timeout(20):
                events = services.jobs.events(edit)
                job = await asyncio.to_thread(claim_job, worker, edit)
                listener = asyncio.ensure_future(anext(events))
                await asyncio.to_thread(worker.jobs.report_progress, job, Progress(Phase.OPTIMIZE, 1, 2))
                first = await listener
                await asyncio.to_thread(worker.jobs.finish, job, "rejected", {})
                return [first] + [event async for event in events]

        events = asyncio.run(listen())
        assert [event.name for event in events] == ["progress", "end"]
        assert events[-1].data == services.edits.get(edit)

    def test_long_ended(
        self, services: Services, submit_edit: Callable[..., Any], database: Database, tmp_path: Path
    ) -> None:
        """A job that has ended and has no channel in the broker gives its end event from its row."""
        edit = submit_edit()
        services.edits.revert(edit, "somebody")
        restarted = Services(database, MemoryBroker(), Settings(data_dir=tmp_path))
        (event,) = collect_job_events(restarted, edit, "1")
        assert (event.name, event.data) == ("end", services.edits.get(edit))
        assert event.id.isdecimal()

    def test_unknown(self, services: Services) -> None:
        """The event stream of an unknown id is not found."""
        with pytest.raises(NotFound):
            collect_job_events(services, "edit_gone")
