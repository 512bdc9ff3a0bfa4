"""Security headers: responses must not be framed, sniffed or cached by a browser."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_DENY_ALL = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
#: for SVG and HTML of traces, which have inline styles
DEFAULT_CSP = f"{_DENY_ALL}; style-src 'unsafe-inline'; img-src data:"
#: for the console: scripts, styles and connections of this origin, and Trusted Types against DOM injection
CONSOLE_CSP = (
    f"{_DENY_ALL}; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
#: for /docs and /redoc, whose viewers write styles into the page; ReDoc searches in a worker
DOCS_CSP = (
    f"{_DENY_ALL}; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; "
    "worker-src blob:"
)

#: headers of every response that does not set them itself
DEFAULT_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": DEFAULT_CSP,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), display-capture=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class SecurityHeadersMiddleware:
    """Adds the headers to every response, including those to unexpected errors."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in DEFAULT_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_with_headers)
