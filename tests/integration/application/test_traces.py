"""Submission, validation, listing and cancellation of traces."""

from __future__ import annotations

from typing import Any

import pytest

from service.application import Services
from service.errors import InvalidInput
from service.jobs.broker import Broker
from tests.support.service_requests import trace_request


class TestTrace:
    def test_trace(self, services: Services, broker: Broker) -> None:
        """A trace is queued, announced, listed and cancelled; a second cancellation has no effect."""
        trace = services.traces.submit(trace_request(), "somebody")
        assert (trace["status"], trace["version"]) == ("queued", None)
        assert trace["request"]["subject"] == "Eiffel Tower"
        assert trace["links"]["self"] == f"/trace/{trace['id']}"
        assert [d.job_id for d in broker.receive(["trace"], 1, 0)] == [trace["id"]]
        assert services.traces.page()["items"] == [trace]
        assert services.traces.cancel(trace["id"])["status"] == "cancelled"
        assert services.traces.cancel(trace["id"])["status"] == "cancelled"

    @pytest.mark.parametrize(
        ("field", "changes"),
        [
            ("subject", {"subject": "Colosseum"}),
            ("version", {"version": 1}),
            ("version", {"version": -1}),
            ("prompt", {"prompt": "Eiffel Tower " * 50}),
            ("noise", {"noise": "loud"}),
            ("noise", {"noise": -1.0}),
            ("noise", {"noise": float("inf")}),
        ],
    )
    def test_refused(self, services: Services, field: str, changes: Any) -> None:
        """An invalid trace is rejected with the name of the field, and nothing is queued."""
        with pytest.raises(InvalidInput) as error:
            services.traces.submit(trace_request(**changes), "a")
        assert error.value.field == field
        assert services.traces.page()["items"] == []
