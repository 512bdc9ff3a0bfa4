"""Trainings as jobs: service.application.trainings, workers.job_handlers.run_training, and the edits that use them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, select

from service.db.models import JobArtifact, Worker
from service.errors import InvalidInput
from service.jobs.job_store import ClaimedJob
from service.kit.steps import Phase, Progress, advance, run_steps, run_to_completion
from service.schemas import TrainingRequest
from tests.support.scopes import TRAINING_RECORDS
from tests.support.stepped_service import Resource, SteppedService
from tests.support.tiny_models import tiny
from tests.support.workers import WorkerParts
from workers.job_handlers import run_training

PLAN: Resource = {"layer": 1, "steps": 20, "batch_size": 8, "dimensions": 4}


@pytest.fixture
def place(wiring: dict[str, Any], tmp_path: Path) -> Iterator[SteppedService]:
    """A service on each wiring, whose edits find the classifiers of its trainings."""
    service = SteppedService(tmp_path, tiny(), **wiring)
    service.context.classifiers.sources.append(service.worker_parts.jobs.newest_classifier)
    yield service
    service.container.close()


def submit(place: SteppedService, **changes: Any) -> Resource:
    request = TrainingRequest.model_validate({"records": TRAINING_RECORDS} | PLAN | changes)
    return place.services.trainings.submit(request, "key:alice")


def claim(parts: WorkerParts, training: Resource) -> ClaimedJob:
    job = parts.jobs.claim(training["id"])
    assert job is not None
    return job


def train(place: SteppedService, **changes: Any) -> Resource:
    training = submit(place, **changes)
    parts = place.worker_parts
    run_to_completion(run_training(parts.jobs, place.context, claim(parts, training)))
    return place.services.trainings.get(training["id"])


def artifact_names(place: SteppedService, training: Resource) -> list[str]:
    with place.container.database.read_session() as session:
        names = select(JobArtifact.name).where(JobArtifact.job_id == training["id"])
        return sorted(session.scalars(names))


def test_edits_use_the_newest_training(place: SteppedService) -> None:
    """A training ends with its figures and the classifier alone. Edits use it, later ones the next one, and the ledger
    has no entry of either."""
    first = train(place)
    assert first["status"] == "done" and first["request"]["records"] == len(TRAINING_RECORDS)
    assert first["result"]["facts"] == {"training": 10, "threshold": 6, "measured": 4}
    assert set(first["result"]["figures"]) == {"any_prompt", "with_subject"}
    assert artifact_names(place, first) == ["classifier"]
    assert place.services.ledger.head() == 0
    old = place.edit("Eiffel Tower", "is", method="serac", hparams={"layers": [1]})
    second = train(place, seed=1)
    new = place.edit("Louvre", "is", method="serac", hparams={"layers": [1]})
    used = [place.services.edits.get(e)["result"]["scope"]["classifier"] for e in (old, new)]
    assert used == [first["result"]["digest"], second["result"]["digest"]] and used[0] != used[1]
    assert len(place.replica.digest(2)) == 64
    with pytest.raises(InvalidInput, match="trained for layer 0"):
        place.edit("Big Ben", "is", method="serac", hparams={"layers": [0]})


def test_another_worker_resumes_a_training(place: SteppedService, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a worker died another one goes on from the last state, and trains the same classifier."""
    monkeypatch.setattr("service.training.scope_training.STEPS_PER_STATE", 5)
    expected = train(place)
    interrupted, parts = submit(place), place.worker_parts
    steps = run_training(parts.jobs, place.context, claim(parts, interrupted))
    while isinstance(outcome := advance(steps), Progress):
        if (outcome.phase, outcome.done) == (Phase.TRAIN, 12):
            break
    steps.close()
    with place.container.database.write_session() as session:
        session.execute(delete(Worker).where(Worker.id == parts.id))
    second = WorkerParts(
        place.container.database, place.container.broker, place.replica.base.fingerprint, "worker-2"
    )
    second.session.register({"name": "tiny", "layers": 3, "positions": 64}, "{}")
    trained: list[int] = []

    def note(progress: Progress) -> None:
        if progress.phase == Phase.TRAIN:
            trained.append(progress.done)

    run_steps(run_training(second.jobs, place.context, claim(second, interrupted)), note)
    result = place.services.trainings.get(interrupted["id"])["result"]
    assert result["digest"] == expected["result"]["digest"] and trained[0] == 11


def test_cancelled_training_leaves_nothing(place: SteppedService) -> None:
    """A queued training is cancelled without artifacts, and no edit finds a classifier."""
    training = submit(place)
    assert place.services.trainings.cancel(training["id"])["status"] == "cancelled"
    assert artifact_names(place, training) == []
    assert place.worker_parts.jobs.newest_classifier(place.replica.base.fingerprint, 1) is None
