"""The embedded wiring in one process, with a stop-watch on every job: how benches meet the service as its users do.

One thread runs the engine; whoever asks does so from a thread of their own, through the same operations as the API.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from service.bootstrap import wire
from service.datasets.records import Record
from service.editing.context import prepare_steps
from service.engine.engine import Engine, Pace, Task
from service.engine.versioned_model import Replica
from service.jobs.job_store import Desk, RunningJob
from service.kit.ids import new_id
from service.kit.steps import News, Progress, Told, Working, finish
from service.models.loading import LoadedModel
from service.schemas import EditRequest
from service.settings import Settings
from workers.job_handlers import tasks
from workers.model_info import card, tokenizer_json

Durations = dict[str, list[float]]
WAITING = ("queued", "running")


class House:
    """A running service around one model. `durations` has the seconds of every step of a job, by phase."""

    def __init__(self, folder: Path, model: LoadedModel, pace: Pace | None = None) -> None:
        self.wired = wire(Settings(data=folder, redis_url=None, database_url=None))
        self.wired.database.migrate()
        toolkit = finish(prepare_steps(model, folder))
        desk = Desk(self.wired.database, self.wired.broker, model.fingerprint, new_id("worker"), sole=True)
        self.replica = Replica(model, desk)
        self.durations: Durations = defaultdict(list)
        work = {
            kind: timed(task, self.durations) for kind, task in tasks(self.replica, desk, toolkit).items()
        }
        self.engine = Engine(self.replica, desk, self.wired.broker, work, pace)
        desk.register(card(model, toolkit), tokenizer_json(model))
        desk.heartbeat(0, None)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self.engine.run, args=(self._stop,))
        self._thread.start()

    def __enter__(self) -> House:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._stop.set()
        self.wired.broker.wake()
        self._thread.join()
        self.wired.close()

    def submit(self, cases: Sequence[Record]) -> list[str]:
        """Ask for the cases as edits, with their probes; their ids."""
        requests = [edit_request(c) for c in cases]
        return [r["id"] for r in self.wired.operations.edits.submit(requests, "bench", None)]

    def edit(self, cases: Sequence[Record]) -> Mapping[str, str]:
        """The cases as edits, waited for; how each ended, by its id."""
        ids = self.submit(cases)
        while any(self.status(i) in WAITING for i in ids):
            time.sleep(0.05)
        return {i: self.status(i) for i in ids}

    def status(self, edit: str) -> str:
        return str(self.wired.operations.edits.get(edit)["status"])


def edit_request(case: Record) -> EditRequest:
    """A case as a user would ask for it: its paraphrases and neighbours as probes."""
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


def timed(task: Task, durations: Durations) -> Task:
    """The same task; how long each of its steps took is kept by phase, of several jobs together as of one."""

    def run(*jobs: RunningJob) -> Working:
        steps = task(*jobs)
        while True:
            began = time.perf_counter()
            news = next(steps, None)
            durations[_phase(news)].append(time.perf_counter() - began)
            if news is None:
                return
            yield news

    return run


def _phase(news: News | None) -> str:
    if isinstance(news, Told):
        news = news.progress
    return news.phase if isinstance(news, Progress) else "commit"
