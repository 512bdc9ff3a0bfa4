"""Metrics, for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from api.dependencies import Work, bearer
from api.errors import problems
from api.protected_route import Door
from service.application.store_collector import Monitor
from service.kit import metrics

router = APIRouter(tags=["health"], route_class=Door, dependencies=[bearer])

_TEXT = {"text/plain": {"schema": {"type": "string"}, "example": "palimpsest_head_version 42.0\n"}}


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": _TEXT}, **problems(422, 500, 503)},
)
def exposed(request: Request, work: Work) -> Response:
    """Counters and timings of this process and gauges of the whole service, in the text format of Prometheus."""
    monitor = Monitor(work.database, work.broker, request.app.state.settings.lease)
    return Response(metrics.exposition(monitor), media_type=metrics.CONTENT_TYPE)
