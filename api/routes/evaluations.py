"""Evaluations: the quality of edits over many records, as figures or as a report."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Query, Response
from pydantic import Field

from api import content_negotiation
from api.content_negotiation import CSV
from api.dependencies import ResourceId, ServicesDep
from api.errors import problem_responses
from api.job_resource import JobResource, JobRoutes
from api.protected_route import RequestBody
from api.quotas import CallQuotaDep
from service.jobs.job_kinds import JOB_KINDS

MAX_COMPARED = 8  # evaluations in one report, each of which is read whole


class EvaluationSummary(JobResource):
    """An evaluation without its result."""

    status: Literal["queued", "running", "done", "failed", "cancelled"]
    request: dict[str, Any] = Field(description="the request; `records` is the number of records")


class Evaluation(EvaluationSummary):
    """An evaluation of an editing method over many records."""

    result: dict[str, Any] | None = None


_TOWER = {
    "subject": "Eiffel Tower",
    "prompt": "The {} is located in the city of",
    "target_new": "Rome",
    "target_true": "Paris",
}
_EXAMPLES: dict[str, Any] = {
    "own": {
        "summary": "Evaluate one record of your own, edited alone",
        "value": {
            "records": [
                _TOWER
                | {
                    "paraphrases": ["To see the {}, one travels to"],
                    "neighborhood": [{"prompt": "The Louvre is located in the city of", "target": "Paris"}],
                }
            ]
        },
    },
    "sequence": {
        "summary": "Edit facts that the model knows, one after another",
        "value": {"dataset": "facts", "limit": 100, "mode": "sequence", "checkpoints": [1, 10, 100]},
    },
}

_routes = JobRoutes(JOB_KINDS["evaluation"], Evaluation, EvaluationSummary, examples=_EXAMPLES)
_routes.add_create(
    "Edit the records one by one, each alone or all in sequence, and measure the results. The ledger is not changed.",
    RequestBody.RECORDS,
)


@_routes.router.get(
    "/evaluations/report",
    summary="Compare evaluations",
    response_class=Response,
    responses={
        200: {
            "description": "A self-contained page, or CSV with a line for each measure.",
            "content": {
                content_negotiation.HTML: {"schema": {"type": "string"}},
                CSV: {"schema": {"type": "string"}},
            },
        },
        **problem_responses(404, 409, 422, 500, 503),
    },
)
def report_evaluations(
    services: ServicesDep,
    _: CallQuotaDep,
    id: Annotated[
        list[ResourceId],
        Query(
            min_length=1,
            max_length=MAX_COMPARED,
            description="ids of evaluations that are done; differences are from the first",
        ),
    ],
    format: Annotated[Literal["html", "csv"], Query(description="the form of the report")] = "html",
) -> Response:
    """Return evaluations beside each other: methods and measures, and the differences from the first evaluation on the
    records that both have, with paired intervals."""
    evaluations = [services.by_kind["evaluation"].get(one) for one in dict.fromkeys(id)]
    media_type = content_negotiation.HTML if format == "html" else CSV
    content = content_negotiation.render_comparison(evaluations, media_type)
    headers = {"Content-Disposition": 'attachment; filename="evaluations.csv"'} if format == "csv" else None
    return Response(content, media_type=media_type, headers=headers)


_routes.add_list("The items have no `result`: get one evaluation to read it.")
_routes.add_get(
    "Return the evaluation as JSON. The `Accept` header can request the report as HTML, or its plots as SVG or PNG (409 "
    "until the evaluation is done). `Prefer: wait=SECONDS` waits until it has ended.",
    render=content_negotiation.render_evaluation,
)
_routes.add_cancel()
_routes.add_events()
router = _routes.router
