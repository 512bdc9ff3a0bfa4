"""The handler of evaluations, and its resumption by another worker."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete

from service.bootstrap import Container
from service.covariance.corpus import Corpus
from service.db.models import Worker
from service.editing.context import EditInput, EditorContext
from service.editing.edit_spec import EditFactors
from service.engine.versioned_model import VersionedModel
from service.jobs.job_store import ClaimedJob
from service.kit.steps import Stepper, run_to_completion
from service.methods.parameters import RomeParameters
from service.models.loading import LoadedModel
from service.recipes.recipe import Recipe
from service.schemas import EvaluationRequest
from tests.support.tiny_models import TEXTS, tiny
from tests.support.workers import WorkerParts
from workers.job_handlers import run_evaluation
from workers.model_info import model_info, tokenizer_json

RECIPE = Recipe(source="test", rome=RomeParameters(layers=(1,), contexts=2, steps=3))
PROMPT = "The {} is located in the city of"
RECORDS: list[dict[str, Any]] = [
    {
        "subject": subject,
        "prompt": PROMPT,
        "target_new": new,
        "target_true": true,
        "neighborhood": [{"prompt": "Big Ben can be found in", "target": "London"}],
    }
    for subject, new, true in (("Eiffel Tower", "Rome", "Paris"), ("Colosseum", "London", "Rome"), ("Louvre", "Rome", "Paris"))
]  # fmt: skip
EVALUATION_FIELDS: dict[str, Any] = {"batch_size": 1, "damage_texts": 4}

StartFakeWorker = Callable[..., "FakeWorker"]


class FakeWorker:
    """The parts of a worker that an evaluation needs, without an engine loop."""

    def __init__(self, container: Container, model: LoadedModel, name: str) -> None:
        self.context = EditorContext(model, RECIPE, Corpus("test", tuple(TEXTS)), None)
        self.worker_parts = WorkerParts(container.database, container.broker, model.fingerprint, name)
        self.worker_parts.session.register(model_info(model, self.context), tokenizer_json(model))
        self.replica = VersionedModel(model, self.worker_parts.ledger, self.worker_parts.session.attest)
        self.computed_edits: list[str] = []
        find = self.context.find_all_factors

        def finding(inputs: Sequence[EditInput]) -> Stepper[list[EditFactors]]:
            self.computed_edits += [edit_input.edit for edit_input in inputs]
            return find(inputs)

        self.context.find_all_factors = finding  # type: ignore[method-assign]

    def claim(self, evaluation: dict[str, Any]) -> tuple[ClaimedJob, Stepper[None]]:
        job = self.worker_parts.jobs.claim(evaluation["id"])
        assert job is not None
        return job, run_evaluation(self.replica, self.worker_parts.jobs, self.context, job)

    def delete_worker_row(self) -> None:
        """Delete the worker's row, as after a crash."""
        with self.worker_parts.database.write_session() as session:
            session.execute(delete(Worker).where(Worker.id == self.worker_parts.id))


@pytest.fixture
def start_fake_worker(container: Container) -> StartFakeWorker:
    return lambda name="worker-1", model=None: FakeWorker(container, model or tiny(), name)


def without_timings(result: dict[str, Any]) -> dict[str, Any]:
    """Return the result without the fields that hold times."""
    return {k: v for k, v in result.items() if k not in ("seconds", "edits_per_minute")}


@pytest.mark.parametrize("mode", ["single", "sequence"])
def test_another_worker_resumes_the_evaluation(
    container: Container, start_fake_worker: StartFakeWorker, mode: str
) -> None:
    """After a worker dies during an evaluation, another one computes only the missing edits, and the result
    equals that of an uninterrupted evaluation."""
    request = EvaluationRequest(records=RECORDS, **EVALUATION_FIELDS, mode=mode)
    first, second = start_fake_worker(), start_fake_worker("worker-2")
    uninterrupted, interrupted = (
        container.services.evaluations.submit(request, "somebody") for _ in range(2)
    )
    run_to_completion(first.claim(uninterrupted)[1])
    first.computed_edits.clear()
    _, steps = first.claim(interrupted)
    while "000001" not in first.computed_edits:
        next(steps)
    first.delete_worker_row()
    steps.close()

    run_to_completion(second.claim(interrupted)[1])
    expected, resumed = (container.services.evaluations.get(e["id"]) for e in (uninterrupted, interrupted))
    assert (resumed["status"], resumed["attempts"]) == ("done", 2)
    assert without_timings(resumed["result"]) == without_timings(expected["result"])
    assert (first.computed_edits, second.computed_edits) == (["000000", "000001"], ["000001", "000002"])
    assert container.services.ledger.head() == 0


def test_evaluation_of_the_models_own_facts(
    container: Container, start_fake_worker: StartFakeWorker, tmp_path: Path
) -> None:
    """With `dataset: facts` the facts of the model's table are evaluated, up to `limit`."""
    rows = [
        {
            "subject": r["subject"],
            "object": r["target_true"],
            "relation": "city",
            "prompts": [PROMPT],
            "held_out_prompts": [],
        }
        for r in RECORDS
    ]
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    worker = start_fake_worker(model=replace(tiny(), folder=tmp_path))
    request = EvaluationRequest(dataset="facts", limit=2, damage=False)
    evaluation = container.services.evaluations.submit(request, "somebody")
    run_to_completion(worker.claim(evaluation)[1])
    result = container.services.evaluations.get(evaluation["id"])["result"]
    assert (result["records"]["format"], result["records"]["measured"]) == ("facts", 2)
    assert all(row["record"].startswith("fact ") for row in result["rows"])
