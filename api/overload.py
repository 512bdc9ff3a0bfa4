"""Requests on a connection above the limit of connections: probes are served, everything else gets 503."""

from __future__ import annotations

from fastapi import Request
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import error_response
from api.request_log import HEALTH_PATHS
from service.errors import Unavailable
from service.kit import metrics

RETRY_AFTER = 1  #: seconds


class OverloadResponder:
    """The application while it has too many connections. Each response ends its connection."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        if scope["path"] in HEALTH_PATHS:
            await self._app(scope, receive, send_and_close)
            return
        metrics.HTTP_REJECTED.labels("connections").inc()
        error = Unavailable("The service has as many open connections as it can serve: try again later.")
        response = error_response(Request(scope), error, headers={"Retry-After": str(RETRY_AFTER)})
        await response(scope, receive, send_and_close)
