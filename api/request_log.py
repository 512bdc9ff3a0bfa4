"""Request log: an id, a log line and metrics for every request. Bodies, prompts and keys are never logged."""

from __future__ import annotations

import logging
import re
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.kit import metrics
from service.kit.ids import new_id, request_id

log = logging.getLogger(__name__)

REQUEST_ID_HEADER = "X-Request-Id"
KNOWN_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
HEALTH_PATHS = (
    "/healthz",
    "/readyz",
    "/metrics",
)  #: polled by probes; successful requests are logged at level debug
CLIENT_CLOSED_REQUEST = 499  #: logged if the client disconnected before the response started
_REQUEST_ID_PATTERN = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestLogMiddleware:
    """The outermost middleware, so that unexpected errors are logged, too.

    A valid `X-Request-Id` of the client is used as the id. The context variable is not reset at the end: every request
    has a task of its own, and later log lines about a failed request need the id.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name, started_at, status = _request_id_of(scope), time.monotonic(), CLIENT_CLOSED_REQUEST
        request_id.set(name)

        async def send_with_request_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = name
            await send(message)

        with metrics.HTTP_REQUESTS_IN_PROGRESS.track_inprogress():
            try:
                await self._app(scope, receive, send_with_request_id)
            finally:
                _log_request(scope, status, time.monotonic() - started_at)


def _request_id_of(scope: Scope) -> str:
    sent_id = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
    return sent_id if _REQUEST_ID_PATTERN.fullmatch(sent_id) else new_id("req")


def _log_request(scope: Scope, status: int, seconds: float) -> None:
    """Write a log line and two metrics. The route is the path template, so that clients cannot create metric labels."""
    route = getattr(scope.get("route"), "path", "none")
    method = scope["method"] if scope["method"] in KNOWN_METHODS else "other"
    metrics.HTTP_REQUESTS.labels(route, method, str(status)).inc()
    metrics.HTTP_REQUEST_SECONDS.labels(route, method).observe(seconds)
    actor = scope.get("state", {}).get("actor", "")
    fields = {
        "method": method,
        "route": route,
        "status": status,
        "seconds": round(seconds, 4),
        "actor": actor,
    }
    log.log(
        logging.DEBUG if route in HEALTH_PATHS and status < 400 else logging.INFO, "request", extra=fields
    )
