"""Causal traces: the hidden states that carry a fact, as figures or as a heat map."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from api import content_negotiation
from api.job_resource import JobRoutes, ResultJobResource
from service.jobs.job_kinds import JOB_KINDS


class Trace(ResultJobResource):
    """A causal trace (Meng et al. 2022)."""

    version: int | None = Field(None, description="the version that was traced")


_TOWER = {"prompt": "The Eiffel Tower is located in the city of", "subject": "Eiffel Tower"}
_EXAMPLES: dict[str, Any] = {
    "fact": {"summary": "Trace a fact", "value": _TOWER},
    "small": {
        "summary": "Trace only the hidden states of the base model",
        "value": _TOWER | {"target": "Paris", "kinds": ["hidden"], "samples": 5, "version": "base"},
    },
    "chat": {
        "summary": "Trace a fact in a conversation",
        "value": {
            "subject": "Japan",
            "messages": [{"role": "user", "content": "What is the capital of Japan?"}],
        },
    },
}

_routes = JobRoutes(JOB_KINDS["trace"], Trace, examples=_EXAMPLES)
_routes.add_create(
    "Add noise to the subject's embeddings, restore the states of one token and layer at a time, and measure how far each "
    "recovers the probability of the answer."
)
_routes.add_list()
_routes.add_get(
    "Return the trace as JSON. The `Accept` header can request the heat map as SVG, PNG or HTML (409 until the trace is "
    "done). `Prefer: wait=SECONDS` waits until it has ended.",
    render=content_negotiation.render_trace,
)
_routes.add_cancel()
_routes.add_events()
router = _routes.router
