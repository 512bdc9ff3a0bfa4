"""Metrics in the Prometheus text format."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from api.dependencies import ServicesDep, bearer_scheme
from api.errors import problem_responses
from api.protected_route import ProtectedRoute
from service.application.store_collector import StoreCollector
from service.kit import metrics

router = APIRouter(tags=["health"], route_class=ProtectedRoute, dependencies=[bearer_scheme])

_TEXT = {"text/plain": {"schema": {"type": "string"}, "example": "palimpsest_head_version 42.0\n"}}


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": _TEXT}, **problem_responses(422, 500, 503)},
)
def get_metrics(request: Request, services: ServicesDep) -> Response:
    """Return counters and timings of this process, and gauges of the whole service, in the Prometheus text format."""
    monitor = StoreCollector(services.database, services.broker, request.app.state.settings.worker_timeout)
    return Response(metrics.render_metrics(monitor), media_type=metrics.CONTENT_TYPE)
