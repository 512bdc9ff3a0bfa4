"""The description of the resident model, and the readiness of the service."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from service.application import Services
from service.db.database import Database
from service.db.models import LedgerEntry, Worker, now
from service.errors import Unavailable
from service.jobs.broker import Broker
from service.schemas import GenerateRequest
from service.settings import Settings
from tests.support.ledger_tampering import drop_append_only_guards
from tests.support.served_model import INFO, tokenizer_json
from tests.support.service_requests import edit_request, raise_unavailable, trace_request
from tests.support.workers import WorkerParts


class TestModel:
    def test_no_model_loaded(self, services_without_model: Services) -> None:
        """Before a worker has registered a model every operation raises Unavailable."""
        for verb in (
            services_without_model.models.describe,
            services_without_model.models.check_ready,
            services_without_model.ledger.head,
            services_without_model.ledger.verify,
            services_without_model.edits.page,
            lambda: services_without_model.edits.submit([edit_request()], "a"),
            lambda: services_without_model.generation.generate(GenerateRequest(prompt="x")),
        ):
            with pytest.raises(Unavailable, match="no worker has loaded a model"):
                verb()

    def test_model(self, services: Services, applied_edit: Callable[..., Any]) -> None:
        """The description has the model info, head, number of active edits, jobs and workers."""
        applied_edit()
        model = services.models.describe()
        assert model.items() >= INFO.items()
        assert (model["fingerprint"], model["head"], model["active_edits"]) == ("fingerprint", 1, 1)
        assert model["jobs"] == {"queued": 0, "running": 0, "exhausted": 0}
        (worker,) = model["workers"]
        assert (worker["id"], worker["state"], worker["reason"]) == ("worker-1", "serving", None)
        assert (worker["roles"], worker["version"], worker["lag"]) == (["generate", "edit"], 0, 1)
        assert 0 <= worker["age"] < 60
        assert services.models.describe()["fingerprint"] == "fingerprint"

    def test_the_newest(self, services: Services, database: Database, broker: Broker) -> None:
        """The resident model is the last one registered; edits of an earlier model are not listed."""
        services.edits.submit([edit_request()], "a")
        WorkerParts(database, broker, "other", "worker-2").session.register(
            {**INFO, "name": "other"}, tokenizer_json()
        )
        assert services.models.describe()["name"] == "other"
        assert services.edits.page()["items"] == []

    def test_ready(self, services: Services) -> None:
        """The service is ready with a database, a queue and a live worker."""
        assert services.models.check_ready()["ready"]

    def test_no_worker(self, services: Services, worker: WorkerParts) -> None:
        """Without a live worker the service is not ready, and the reason says so."""
        worker.session.deregister()
        with pytest.raises(Unavailable) as error:
            services.models.check_ready()
        assert error.value.extra["reasons"] == ["no worker is alive"]
        assert services.models.describe()["workers"] == []

    def test_worker_behind(
        self,
        services: Services,
        applied_edit: Callable[..., Any],
        worker: WorkerParts,
        database: Database,
    ) -> None:
        """If no worker has reached the head some time after its commit, the service is not ready."""
        applied_edit()
        assert services.models.check_ready()["head"] == 1
        with database.write_session() as session:
            drop_append_only_guards(session)
            session.execute(update(LedgerEntry).values(at=now() - timedelta(minutes=5)))
        with pytest.raises(Unavailable, match="no worker has reached version 1"):
            services.models.check_ready()
        worker.session.heartbeat(1, "digest")
        assert services.models.check_ready()["workers"] == 1  # a count: probes need no key

    def test_role_missing(self, services: Services, submit_edit: Callable[..., Any]) -> None:
        """The service is not ready while jobs are queued for a role that no live worker has; roles without
        queued jobs are not required."""
        submit_edit()
        assert services.models.check_ready()["waiting"]["edit"] == 1
        services.traces.submit(trace_request(), "somebody")
        with pytest.raises(Unavailable) as error:
            services.models.check_ready()
        assert error.value.extra["reasons"] == ["1 jobs are queued and no live worker has the role trace"]

    def test_no_worker_with_role_generate(
        self, services: Services, worker: WorkerParts, database: Database
    ) -> None:
        """Without a live worker for generations the service is not ready, also when a worker for edits is
        alive."""
        worker.session.deregister()
        WorkerParts(database, services.broker, "fingerprint", "w").session.register(
            INFO, tokenizer_json(), ["edit"]
        )
        with pytest.raises(Unavailable, match="no live worker has the role generate"):
            services.models.check_ready()
        services.models.require_worker_for("edit")
        with pytest.raises(Unavailable, match="no worker with the role generate is alive"):
            services.models.require_worker_for("compare")

    def test_no_roles(self, services: Services, worker: WorkerParts, database: Database) -> None:
        """A worker without roles has all roles."""
        worker.session.deregister()
        WorkerParts(database, services.broker, "fingerprint", "w").session.register(INFO, tokenizer_json())
        services.traces.submit(trace_request(), "somebody")
        assert services.models.check_ready()["ready"]

    def test_withdrawn_worker(self, services: Services, worker: WorkerParts) -> None:
        """A withdrawn worker is listed with its reason and does not count as alive."""
        worker.session.quarantine("its weights differ.")
        with pytest.raises(Unavailable, match="no worker is alive"):
            services.models.check_ready()
        (row,) = services.models.describe()["workers"]
        assert (row["state"], row["reason"]) == ("withdrawn", "its weights differ.")

    def test_every_reason(
        self, services: Services, worker: WorkerParts, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The error lists all reasons for which the service is not ready."""
        worker.session.deregister()
        monkeypatch.setattr(services.broker, "queue_depth", raise_unavailable)
        with pytest.raises(Unavailable) as error:
            services.models.check_ready()
        assert error.value.extra["reasons"] == ["the queue is down", "no worker is alive"]
        monkeypatch.setattr(services.database, "read_session", raise_unavailable)
        with pytest.raises(Unavailable) as error:
            services.models.check_ready()
        assert error.value.extra["reasons"] == ["the queue is down"] * 2

    def test_lease(
        self, database: Database, broker: Broker, services: Services, worker: WorkerParts, tmp_path: Path
    ) -> None:
        """The setting `worker_timeout` is the age of a heartbeat after which a worker is no longer alive."""
        with database.write_session() as session:
            session.execute(update(Worker).values(heartbeat=now() - timedelta(seconds=5)))
        assert services.models.check_ready()["ready"]
        services_with_short_timeout = Services(
            database, broker, Settings(data_dir=tmp_path, worker_timeout=2)
        )
        with pytest.raises(Unavailable, match="no worker is alive"):
            services_with_short_timeout.models.check_ready()

    def test_silent_worker(self, services: Services, database: Database) -> None:
        """A worker whose last heartbeat is five minutes old is not alive."""
        with database.write_session() as session:
            session.execute(update(Worker).values(heartbeat=now() - timedelta(minutes=5)))
        with pytest.raises(Unavailable, match="no worker is alive"):
            services.models.check_ready()
