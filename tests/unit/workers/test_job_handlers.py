"""The steps of an evaluation that is a job: gone on with by whoever takes it over."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete

from service.bootstrap import Wired
from service.covariance.corpus import Corpus
from service.db.models import Worker
from service.editing.context import Toolkit
from service.engine.versioned_model import Replica
from service.jobs.job_store import Desk, RunningJob
from service.kit.steps import Steps, finish
from service.models.loading import LoadedModel
from service.recipes.recipe import Recipe, RomeParameters
from service.schemas import EvaluationRequest
from tests.support.tiny_models import TEXTS, tiny
from workers.job_handlers import evaluated
from workers.model_info import card, tokenizer_json

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
PLAN: dict[str, Any] = {"together": 1, "plain": 4}

Hire = Callable[..., "Clerk"]


class Clerk:
    """A worker as far as an evaluation needs one, stepped by hand."""

    def __init__(self, wired: Wired, model: LoadedModel, name: str) -> None:
        self.toolkit = Toolkit(model, RECIPE, Corpus("test", tuple(TEXTS)), None)
        self.desk = Desk(wired.database, wired.broker, model.fingerprint, name)
        self.desk.register(card(model, self.toolkit), tokenizer_json(model))
        self.replica = Replica(model, self.desk)
        self.found: list[str] = []
        find = self.toolkit.find_together_steps

        def finding(wishes: Any) -> Steps[Any]:
            self.found += [ask.edit for ask in wishes]
            return find(wishes)

        self.toolkit.find_together_steps = finding  # type: ignore[method-assign]

    def begin(self, evaluation: dict[str, Any]) -> tuple[RunningJob, Steps[None]]:
        job = self.desk.start(evaluation["id"])
        assert job is not None
        return job, evaluated(self.replica, self.desk, self.toolkit, job)

    def die(self) -> None:
        """Nobody hears of it any more."""
        with self.desk.database.session() as session:
            session.execute(delete(Worker).where(Worker.id == self.desk.worker))


@pytest.fixture
def hire(wired: Wired) -> Hire:
    return lambda name="worker-1", model=None: Clerk(wired, model or tiny(), name)


def timeless(result: dict[str, Any]) -> dict[str, Any]:
    """All of a result but how long it took."""
    return {k: v for k, v in result.items() if k not in ("seconds", "edits_per_minute")}


@pytest.mark.parametrize("mode", ["single", "sequence"])
def test_another_worker_goes_on(wired: Wired, hire: Hire, mode: str) -> None:
    """A worker dies in the middle: another one finds only what was not found yet, and the result is that of one alone."""
    asked = EvaluationRequest(records=RECORDS, **PLAN, mode=mode)  # type: ignore[arg-type]
    first, heir = hire(), hire("worker-2")
    whole, broken = (wired.operations.evaluations.submit(asked, "somebody") for _ in range(2))
    finish(first.begin(whole)[1])
    first.found.clear()
    _, steps = first.begin(broken)
    while "000001" not in first.found:
        next(steps)
    first.die()
    steps.close()

    finish(heir.begin(broken)[1])
    one, other = (wired.operations.evaluations.get(e["id"]) for e in (whole, broken))
    assert (other["status"], other["attempts"]) == ("done", 2)
    assert timeless(other["result"]) == timeless(one["result"])
    assert (first.found, heir.found) == (["000000", "000001"], ["000001", "000002"])
    assert wired.operations.ledger.head() == 0


def test_the_table_beside_the_model(wired: Wired, hire: Hire, tmp_path: Path) -> None:
    """The facts of the model's own table are evaluated, as many as were asked for."""
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
    clerk = hire(model=replace(tiny(), folder=tmp_path))
    asked = EvaluationRequest(dataset="facts", limit=2, damage=False)
    evaluation = wired.operations.evaluations.submit(asked, "somebody")
    finish(clerk.begin(evaluation)[1])
    found = wired.operations.evaluations.get(evaluation["id"])["result"]
    assert (found["records"]["form"], found["records"]["measured"]) == ("facts", 2)
    assert all(row["record"].startswith("fact ") for row in found["rows"])
