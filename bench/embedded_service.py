"""The embedded wiring in one process, with a timer on every job step.

One thread runs the engine. Callers use the application services, as the API does, from their own threads.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from service.bootstrap import build_container
from service.datasets.record import Record
from service.editing.context import build_editor_context
from service.engine.engine import Engine, EngineConfig
from service.engine.job_runner import JobHandler
from service.engine.versioned_model import VersionedModel
from service.jobs.job_store import ClaimedJob, JobStore
from service.jobs.worker_session import WorkerSession
from service.kit.ids import new_id
from service.kit.steps import JobReporter, Phase, Progress, Stepper, advance, run_to_completion
from service.ledger.cached import CachedLedger
from service.models.loading import LoadedModel
from service.schemas import EditRequest
from service.settings import Settings
from workers.job_handlers import job_handlers
from workers.model_info import model_info, tokenizer_json

Durations = dict[str, list[float]]
PENDING_STATUSES = ("queued", "running")


class BenchService:
    """A running service with one model. `durations` has the seconds of every job step by phase."""

    def __init__(self, folder: Path, model: LoadedModel, config: EngineConfig | None = None) -> None:
        self.container = build_container(Settings(data_dir=folder, redis_url=None, database_url=None))
        self.container.database.migrate()
        context = run_to_completion(build_editor_context(model, folder))
        worker_session = WorkerSession(
            self.container.database,
            self.container.broker,
            model.fingerprint,
            new_id("worker"),
            single_process=True,
        )
        job_store = JobStore(worker_session)
        ledger = CachedLedger(self.container.database, model.fingerprint)
        self.replica = VersionedModel(model, ledger, worker_session.attest)
        self.durations: Durations = defaultdict(list)
        handlers = {
            kind: record_step_durations(task, self.durations)
            for kind, task in job_handlers(self.replica, job_store, context).items()
        }
        self.engine = Engine(self.replica, worker_session, job_store, self.container.broker, handlers, config)
        worker_session.register(model_info(model, context), tokenizer_json(model))
        worker_session.heartbeat(0, None)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self.engine.run, args=(self._stop,))
        self._thread.start()

    def __enter__(self) -> BenchService:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._stop.set()
        self.container.broker.wake()
        self._thread.join()
        self.container.close()

    def submit(self, cases: Sequence[Record]) -> list[str]:
        """Submit the cases as edits with their probes. Return their ids."""
        requests = [edit_request(c) for c in cases]
        return [r["id"] for r in self.container.services.edits.submit(requests, "bench", None)]

    def edit(self, cases: Sequence[Record]) -> Mapping[str, str]:
        """Submit the cases as edits and wait for them. Return the final status by id."""
        ids = self.submit(cases)
        while any(self.status(i) in PENDING_STATUSES for i in ids):
            time.sleep(0.05)
        return {i: self.status(i) for i in ids}

    def status(self, edit: str) -> str:
        return str(self.container.services.edits.get(edit)["status"])


def edit_request(case: Record) -> EditRequest:
    """Return the request of a case, with its paraphrases and neighbours as probes."""
    neighbours = [n._asdict() for n in case.neighbours]
    return EditRequest.model_validate(
        {
            "subject": case.subject,
            "prompt": case.prompt,
            "target_new": case.target_new,
            "target_true": case.target_true,
            "probes": {"paraphrase": list(case.paraphrases), "neighborhood": neighbours},
        }
    )


def record_step_durations(handler: JobHandler, durations: Durations) -> JobHandler:
    """Return the handler with a timer: the seconds of each step are appended to `durations` by phase."""

    def run(reporter: JobReporter, *jobs: ClaimedJob) -> Stepper[None]:
        stepper = handler(reporter, *jobs)
        while True:
            began = time.perf_counter()
            outcome = advance(stepper)
            phase = outcome.phase if isinstance(outcome, Progress) else Phase.COMMIT
            durations[phase].append(time.perf_counter() - began)
            if not isinstance(outcome, Progress):
                return
            yield outcome

    return run
