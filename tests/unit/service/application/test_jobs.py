"""Jobs whatever their kind: listed, tried again, followed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from service.application import Operations
from service.application import jobs as following
from service.db.database import Database
from service.errors import Conflict, InvalidInput, NotFound, Unavailable
from service.jobs.broker import Broker
from service.jobs.job_store import Desk
from service.jobs.memory_broker import MemoryBroker
from service.kit.steps import Progress
from service.settings import Settings
from tests.support.service_requests import down, heard, listened, trace_request


class TestJobs:
    @pytest.fixture
    def every(self, operations: Operations, ask: Callable[..., Any]) -> Any:
        """A job of each kind, oldest first."""
        return [ask("a"), operations.traces.submit(trace_request(), "somebody")["id"], ask("b")]

    @pytest.fixture
    def failed(self, ask: Callable[..., Any], desk: Desk, broker: Broker) -> Any:
        edit = ask()
        broker.take(["edit"], 1, 0)
        desk.fail(desk.start(edit), "out of memory")
        return edit

    def test_all_kinds(self, operations: Operations, every: Any) -> None:
        """Jobs of all kinds are in one list, newest first, page by page."""
        assert [job["id"] for job in operations.jobs.page()["items"]] == every[::-1]
        assert [job["kind"] for job in operations.jobs.page()["items"]] == ["edit", "trace", "edit"]
        paged, cursor = [], None
        while True:
            page = operations.jobs.page(cursor=cursor, limit=1)
            paged += [job["id"] for job in page["items"]]
            if not (cursor := page["next"]):
                break
        assert paged == every[::-1]

    def test_narrowed(self, operations: Operations, every: Any, failed: Any) -> None:
        """The list can be narrowed by kind, by status and to the dead."""
        assert [job["id"] for job in operations.jobs.page(kind="trace")["items"]] == [every[1]]
        assert [job["id"] for job in operations.jobs.page(status="failed")["items"]] == [failed]
        assert operations.jobs.page(dead=True)["items"] == []
        assert len(operations.jobs.page(dead=False)["items"]) == 4

    @pytest.mark.parametrize(
        "bad", [{"status": "x"}, {"kind": "generate"}, {"limit": 0}, {"cursor": "x"}, {"cursor": "ImdvbmUi"}]
    )
    def test_refused(self, operations: Operations, bad: Any) -> None:
        """What cannot be listed is refused."""
        with pytest.raises(InvalidInput):
            operations.jobs.page(**bad)

    def test_retry(self, operations: Operations, failed: Any, broker: Broker, desk: Desk) -> None:
        """A failed job waits again as if it had never been tried, and its listeners hear the new end."""
        job = operations.jobs.retry(failed, "admin")
        assert (job["status"], job["attempts"], job["error"], job["dead"]) == ("queued", 0, None, False)
        assert operations.edits.get(failed)["ended"] is None
        assert [d.job_id for d in broker.take(["edit"], 1, 0)] == [failed]
        again = desk.start(failed)
        assert again.attempt == 1
        desk.finish(again, "rejected")
        assert [(e.name, e.data["status"]) for e in heard(operations, failed)] == [("end", "rejected")]
        assert [event.data["status"] for event in listened(broker, failed)] == ["rejected"]

    def test_retry_what_did_not_fail(
        self, operations: Operations, ask: Callable[..., Any], landed: Callable[..., Any]
    ) -> None:
        """Nothing but a failed job is tried again."""
        for job in (ask("a"), landed("b")):
            with pytest.raises(Conflict, match="only a job that failed"):
                operations.jobs.retry(job, "admin")
        with pytest.raises(NotFound):
            operations.jobs.retry("edit_gone", "admin")

    def test_retry_twice(self, operations: Operations, failed: Any, broker: Broker) -> None:
        """Of retries that come at once one is carried out."""
        barrier = threading.Barrier(4)

        def retry(_: Any) -> Any:
            barrier.wait()
            try:
                return operations.jobs.retry(failed, "admin")["status"]
            except Conflict:
                return None

        with ThreadPoolExecutor(4) as pool:
            assert sorted(pool.map(retry, range(4)), key=str) == [None] * 3 + ["queued"]
        assert broker.waiting("edit") == 1

    def test_retry_while_the_queue_is_down(
        self, operations: Operations, failed: Any, broker: Broker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A job whose old end cannot be unsaid is not tried again: nothing has happened then."""
        monkeypatch.setattr(broker, "forget", down)
        with pytest.raises(Unavailable):
            operations.jobs.retry(failed, "admin")
        assert operations.edits.get(failed)["status"] == "failed"


class TestEvents:
    def test_end_that_nobody_told(
        self, operations: Operations, ask: Callable[..., Any], desk: Desk, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An end that was committed and never told, because the worker died, is found in the row."""
        monkeypatch.setattr(following, "LOOK", 0.05)
        edit = ask()
        job = desk.start(edit)

        async def listen() -> Any:
            async with asyncio.timeout(20):
                events = operations.jobs.events(edit)
                listener = asyncio.ensure_future(anext(events))
                await asyncio.sleep(0.2)
                monkeypatch.setattr(operations.broker, "publish", lambda *_, **__: None)
                await asyncio.to_thread(desk.finish, job, "rejected")
                return [await listener] + [event async for event in events]

        assert [(e.name, e.data["status"]) for e in asyncio.run(listen())] == [("end", "rejected")]

    def test_from_first_to_last(self, operations: Operations, ask: Callable[..., Any], desk: Desk) -> None:
        """A listener hears the progress and then the end, with the resource."""
        edit = ask()

        async def listen() -> Any:
            async with asyncio.timeout(20):
                events = operations.jobs.events(edit)
                job = await asyncio.to_thread(desk.start, edit)
                listener = asyncio.ensure_future(anext(events))
                await asyncio.to_thread(desk.progress, job, Progress("value", 1, 2))
                first = await listener
                await asyncio.to_thread(desk.finish, job, "rejected", {})
                return [first] + [event async for event in events]

        events = asyncio.run(listen())
        assert [event.name for event in events] == ["progress", "end"]
        assert events[-1].data == operations.edits.get(edit)

    def test_long_ended(
        self, operations: Operations, ask: Callable[..., Any], database: Database, tmp_path: Path
    ) -> None:
        """A job whose news nobody remembers gives its end from its row."""
        edit = ask()
        operations.edits.revert(edit, "somebody")
        restarted = Operations(database, MemoryBroker(), Settings(data=tmp_path))
        (event,) = heard(restarted, edit, "1")
        assert (event.name, event.data) == ("end", operations.edits.get(edit))
        assert event.id.isdecimal()

    def test_unknown(self, operations: Operations) -> None:
        """There is no news of what is not there."""
        with pytest.raises(NotFound):
            heard(operations, "edit_gone")
