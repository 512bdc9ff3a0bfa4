"""Evaluations: what is written, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import event

from service.application import Operations
from service.db.database import Database
from service.errors import InvalidInput
from service.jobs.broker import Broker
from service.jobs.job_store import Desk
from service.schemas import EvaluationRequest
from tests.support.served_model import INFO, tokenizer_json
from tests.support.service_requests import evaluation_request, record


class TestEvaluation:
    def test_evaluation(self, operations: Operations, broker: Broker) -> None:
        """An evaluation is queued and announced, listed, and cancelled, twice without harm."""
        asked = evaluation_request(record(), record(target_true="Paris"), method="memit")
        evaluation = operations.evaluations.submit(asked, "somebody")
        assert evaluation["status"] == "queued"
        assert (evaluation["request"]["method"], evaluation["request"]["records"]) == ("memit", 2)
        assert evaluation["links"]["self"] == f"/evaluations/{evaluation['id']}"
        assert [d.job_id for d in broker.take(["evaluation"], 1, 0)] == [evaluation["id"]]
        (job,) = operations.jobs.page()["items"]
        assert (job["subject"], job["links"]["self"]) == ("memit on 2 records", evaluation["links"]["self"])
        for _ in range(2):
            assert operations.evaluations.cancel(evaluation["id"])["status"] == "cancelled"

    def test_lists_are_light(self, operations: Operations, desk: Desk, database: Database) -> None:
        """What was found is read where one evaluation is asked for, and by no list."""
        evaluation = operations.evaluations.submit(evaluation_request(), "somebody")["id"]
        desk.finish(desk.start(evaluation), "done", {"found": [1.0, None]})
        statements = []
        event.listen(database.engine, "before_cursor_execute", lambda *a: statements.append(a[2]))
        for found in (operations.evaluations.page(), operations.jobs.page()):
            (shown,) = found["items"]
            assert (shown["id"], shown["status"]) == (evaluation, "done")
            assert "result" not in shown
        assert not any("jobs.result" in statement for statement in statements)
        assert operations.evaluations.get(evaluation)["result"] == {"found": [1.0, None]}

    def test_facts(self, operations: Operations, desk: Desk) -> None:
        """The table beside the model is evaluated where there is one."""
        asked = EvaluationRequest(dataset="facts", limit=3)
        with pytest.raises(InvalidInput, match="no table of facts") as error:
            operations.evaluations.submit(asked, "a")
        assert error.value.field == "dataset"
        desk.register(INFO | {"facts": True}, tokenizer_json())
        evaluation = operations.evaluations.submit(asked, "a")
        assert (evaluation["request"]["records"], evaluation["request"]["limit"]) == (None, 3)

    @pytest.mark.parametrize(
        ("field", "changes"),
        [
            ("hparams", {"hparams": {"layers": [9]}}),
            ("hparams", {"hparams": {"soul": 1}}),
            ("strengths", {"mode": "sequence", "found_on": "edited", "strengths": [1.0, 2.0]}),
            ("records", {"records": None}),
            ("records", {"dataset": "facts"}),
            ("records", {"records": [{}]}),
            ("records", {"records": [record(), record(subject="")]}),
            ("records", {"records": [record(prompt="{} and {}")]}),
            ("records", {"records": [record(prompt="{} is" + " far" * 80)]}),
            ("records", {"records": [record(paraphrases=["far " * 80])]}),
            ("records", {"records": [record()], "objective": "erase"}),
        ],
    )
    def test_refused(self, operations: Operations, field: str, changes: Any) -> None:
        """An evaluation that cannot be run is refused, with the field."""
        with pytest.raises(InvalidInput) as error:
            operations.evaluations.submit(EvaluationRequest(**{"records": [record()], **changes}), "a")
        assert error.value.field == field
        assert operations.evaluations.page()["items"] == []

    def test_which_record(self, operations: Operations) -> None:
        """The refusal names the record."""
        with pytest.raises(InvalidInput, match="record 2: the prompt has"):
            operations.evaluations.submit(
                evaluation_request(record(), record(prompt="{} is" + " far" * 80)), "a"
            )
