"""Submission, validation, listing and cancellation of evaluations."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import event

from service.application import Services
from service.db.database import Database
from service.errors import InvalidInput
from service.jobs.broker import Broker
from service.schemas import EvaluationRequest
from tests.support.job_rows import claim_job
from tests.support.served_model import INFO, tokenizer_json
from tests.support.service_requests import evaluation_record, evaluation_request
from tests.support.workers import WorkerParts


class TestEvaluation:
    def test_evaluation(self, services: Services, broker: Broker) -> None:
        """An evaluation is queued, announced, listed and cancelled; a second cancellation has no effect."""
        request = evaluation_request(
            evaluation_record(), evaluation_record(target_true="Paris"), method="memit"
        )
        evaluation = services.evaluations.submit(request, "somebody")
        assert evaluation["status"] == "queued"
        assert (evaluation["request"]["method"], evaluation["request"]["records"]) == ("memit", 2)
        assert evaluation["links"]["self"] == f"/evaluations/{evaluation['id']}"
        assert [d.job_id for d in broker.receive(["evaluation"], 1, 0)] == [evaluation["id"]]
        (job,) = services.jobs.page()["items"]
        assert (job["subject"], job["links"]["self"]) == ("memit on 2 records", evaluation["links"]["self"])
        for _ in range(2):
            assert services.evaluations.cancel(evaluation["id"])["status"] == "cancelled"

    def test_lists_are_light(self, services: Services, worker: WorkerParts, database: Database) -> None:
        """Lists of evaluations and jobs do not read results; a single evaluation has its result."""
        evaluation = services.evaluations.submit(evaluation_request(), "somebody")["id"]
        worker.jobs.finish(claim_job(worker, evaluation), "done", {"found": [1.0, None]})
        statements = []
        event.listen(database.engine, "before_cursor_execute", lambda *a: statements.append(a[2]))
        for page in (services.evaluations.page(), services.jobs.page()):
            (summary,) = page["items"]
            assert (summary["id"], summary["status"]) == (evaluation, "done")
            assert "result" not in summary
        assert not any("jobs.result" in statement for statement in statements)
        assert services.evaluations.get(evaluation)["result"] == {"found": [1.0, None]}

    def test_facts(self, services: Services, worker: WorkerParts) -> None:
        """`dataset: facts` is accepted only when the model has a table of facts."""
        request = EvaluationRequest(dataset="facts", limit=3)
        with pytest.raises(InvalidInput, match="no table of facts") as error:
            services.evaluations.submit(request, "a")
        assert error.value.field == "dataset"
        worker.session.register(INFO | {"facts": True}, tokenizer_json())
        evaluation = services.evaluations.submit(request, "a")
        assert (evaluation["request"]["records"], evaluation["request"]["limit"]) == (None, 3)

    @pytest.mark.parametrize(
        ("field", "changes"),
        [
            ("hparams", {"hparams": {"layers": [9]}}),
            ("hparams", {"hparams": {"soul": 1}}),
            ("strengths", {"mode": "sequence", "search_model": "edited", "strengths": [1.0, 2.0]}),
            ("records", {"records": None}),
            ("records", {"dataset": "facts"}),
            ("records", {"records": [{}]}),
            ("records", {"records": [evaluation_record(), evaluation_record(subject="")]}),
            ("records", {"records": [evaluation_record(prompt="{} and {}")]}),
            ("records", {"records": [evaluation_record(prompt="{} is" + " far" * 80)]}),
            ("records", {"records": [evaluation_record(paraphrases=["far " * 80])]}),
            ("records", {"records": [evaluation_record()], "objective": "erase"}),
        ],
    )
    def test_refused(self, services: Services, field: str, changes: Any) -> None:
        """An invalid evaluation is rejected with the name of the field, and nothing is queued."""
        with pytest.raises(InvalidInput) as error:
            services.evaluations.submit(
                EvaluationRequest(**{"records": [evaluation_record()], **changes}), "a"
            )
        assert error.value.field == field
        assert services.evaluations.page()["items"] == []

    def test_which_record(self, services: Services) -> None:
        """The error message has the number of the invalid record."""
        with pytest.raises(InvalidInput, match="record 2: the prompt has"):
            services.evaluations.submit(
                evaluation_request(evaluation_record(), evaluation_record(prompt="{} is" + " far" * 80)), "a"
            )
