"""The resident model as it is described, and whether the house is ready."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from service.application import Operations
from service.db.database import Database
from service.db.models import LedgerEntry, Worker, now
from service.errors import Unavailable
from service.jobs.broker import Broker
from service.jobs.job_store import Desk
from service.schemas import GenerateRequest
from service.settings import Settings
from tests.support.ledger_tampering import unguard
from tests.support.served_model import INFO, tokenizer_json
from tests.support.service_requests import down, edit_request, trace_request


class TestModel:
    def test_none_yet(self, bare: Operations) -> None:
        """Before a worker has come up every verb says so."""
        for verb in (
            bare.models.resident,
            bare.models.ready,
            bare.ledger.head,
            bare.ledger.verify,
            bare.edits.page,
            lambda: bare.edits.submit([edit_request()], "a"),
            lambda: bare.calls.generate(GenerateRequest(prompt="x")),
        ):
            with pytest.raises(Unavailable, match="no worker has loaded a model"):
                verb()

    def test_model(self, operations: Operations, landed: Callable[..., Any]) -> None:
        """The resident model is described with its head, its active edits and its workers."""
        landed()
        model = operations.models.resident()
        assert model.items() >= INFO.items()
        assert (model["fingerprint"], model["head"], model["active_edits"]) == ("fingerprint", 1, 1)
        assert model["jobs"] == {"queued": 0, "running": 0, "dead": 0}
        (worker,) = model["workers"]
        assert (worker["id"], worker["state"], worker["reason"]) == ("worker-1", "serving", None)
        assert (worker["roles"], worker["version"], worker["lag"]) == (["generate", "edit"], 0, 1)
        assert 0 <= worker["age"] < 60
        assert operations.models.resident()["fingerprint"] == "fingerprint"

    def test_the_newest(self, operations: Operations, database: Database, broker: Broker) -> None:
        """The resident model is the one that came up last; jobs of the one before are not listed with it."""
        operations.edits.submit([edit_request()], "a")
        Desk(database, broker, "other", "worker-2").register({**INFO, "name": "other"}, tokenizer_json())
        assert operations.models.resident()["name"] == "other"
        assert operations.edits.page()["items"] == []

    def test_ready(self, operations: Operations) -> None:
        """Ready is a database and a queue that answer and a worker that lives."""
        assert operations.models.ready()["ready"]

    def test_no_worker(self, operations: Operations, desk: Desk) -> None:
        """Without a living worker the service is not ready, and says why."""
        desk.leave()
        with pytest.raises(Unavailable) as error:
            operations.models.ready()
        assert error.value.extra["reasons"] == ["no worker is alive"]
        assert operations.models.resident()["workers"] == []

    def test_worker_behind(
        self, operations: Operations, landed: Callable[..., Any], desk: Desk, database: Database
    ) -> None:
        """A worker has some time to reach the head; then the service is no longer ready."""
        landed()
        assert operations.models.ready()["head"] == 1
        with database.session() as session:
            unguard(session)
            session.execute(update(LedgerEntry).values(at=now() - timedelta(minutes=5)))
        with pytest.raises(Unavailable, match="no worker has reached version 1"):
            operations.models.ready()
        desk.heartbeat(1, "digest")
        assert operations.models.ready()["workers"][0]["version"] == 1

    def test_role_missing(self, operations: Operations, ask: Callable[..., Any]) -> None:
        """Work that waits and that no living worker does is named; a role that nobody asks for is not missed."""
        ask()
        assert operations.models.ready()["waiting"]["edit"] == 1
        operations.traces.submit(trace_request(), "somebody")
        with pytest.raises(Unavailable) as error:
            operations.models.ready()
        assert error.value.extra["reasons"] == ["1 jobs wait and no living worker does trace"]

    def test_nobody_speaks(self, operations: Operations, desk: Desk, database: Database) -> None:
        """Readiness is to be able to speak: a worker that only edits is not enough."""
        desk.leave()
        Desk(database, operations.broker, "fingerprint", "w").register(INFO, tokenizer_json(), ["edit"])
        with pytest.raises(Unavailable, match="no living worker does generate"):
            operations.models.ready()
        operations.models.check_attended("edit")
        with pytest.raises(Unavailable, match="no worker is alive that does generate"):
            operations.models.check_attended("compare")

    def test_no_roles(self, operations: Operations, desk: Desk, database: Database) -> None:
        """A worker without roles does everything."""
        desk.leave()
        Desk(database, operations.broker, "fingerprint", "w").register(INFO, tokenizer_json())
        operations.traces.submit(trace_request(), "somebody")
        assert operations.models.ready()["ready"]

    def test_withdrawn_worker(self, operations: Operations, desk: Desk) -> None:
        """A worker that took itself out is listed with its reason and counts for nothing."""
        desk.withdraw("its weights differ.")
        with pytest.raises(Unavailable, match="no worker is alive"):
            operations.models.ready()
        (worker,) = operations.models.resident()["workers"]
        assert (worker["state"], worker["reason"]) == ("withdrawn", "its weights differ.")

    def test_every_reason(self, operations: Operations, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
        """All that is down is named at once."""
        desk.leave()
        monkeypatch.setattr(operations.broker, "waiting", down)
        with pytest.raises(Unavailable) as error:
            operations.models.ready()
        assert error.value.extra["reasons"] == ["the queue is down", "no worker is alive"]
        monkeypatch.setattr(operations.database, "read", down)
        with pytest.raises(Unavailable) as error:
            operations.models.ready()
        assert error.value.extra["reasons"] == ["the queue is down"] * 2

    def test_lease(
        self, database: Database, broker: Broker, operations: Operations, desk: Desk, tmp_path: Path
    ) -> None:
        """How long a silent worker counts as living is a setting."""
        with database.session() as session:
            session.execute(update(Worker).values(heartbeat=now() - timedelta(seconds=5)))
        assert operations.models.ready()["ready"]
        hasty = Operations(database, broker, Settings(data=tmp_path, lease=2))
        with pytest.raises(Unavailable, match="no worker is alive"):
            hasty.models.ready()

    def test_silent_worker(self, operations: Operations, database: Database) -> None:
        """A worker without a heartbeat is dead."""
        with database.session() as session:
            session.execute(update(Worker).values(heartbeat=now() - timedelta(minutes=5)))
        with pytest.raises(Unavailable, match="no worker is alive"):
            operations.models.ready()
