"""What every request passes before a route sees it: the bearer key, then the body's size, type and JSON."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from api.errors import Malformed, TooLarge, Unauthorized, WrongMediaType
from service.settings import Settings

MAX_BODY = 1_000_000  # bytes
LOCAL = "local"

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class Checked(Request):
    """A request whose body is read and known to be JSON, or empty."""

    def __init__(self, request: Request, raw: bytes, value: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._raw = raw
        self._value = value

    async def body(self) -> bytes:
        return self._raw

    async def json(self) -> Any:
        return self._value


class Door(APIRoute):
    """A route behind the door. The key comes first: a stranger's body is not even read."""

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()

        async def through_the_door(request: Request) -> Response:
            request.state.actor = identify(request, request.app.state.settings)
            if request.method in ("POST", "PUT", "PATCH"):
                raw = await read(request)
                request = Checked(request, raw, parse(request, raw) if raw else None)
            return await handle(request)

        return through_the_door


def identify(request: Request, settings: Settings) -> str:
    """Who asks, as the ledger will name them: the key by its digest, so that the ledger holds no secret."""
    if not settings.api_key:
        return LOCAL
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    expected = hashlib.sha256(settings.api_key.encode()).digest()
    # Digests have one length, so the comparison takes the same time whatever was sent.
    same = hmac.compare_digest(hashlib.sha256(key.strip(" ").encode("latin-1")).digest(), expected)
    if scheme.lower() != "bearer" or not same:
        raise Unauthorized("Send the service's key in the header `Authorization: Bearer KEY`.")
    return f"key:{expected.hex()[:12]}"


async def read(request: Request) -> bytes:
    """The body, as long as it is not too large."""
    too_large = TooLarge(f"The body is larger than {MAX_BODY} bytes: send less at once.")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 12 or int(declared) > MAX_BODY):
        raise too_large
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_BODY:
            raise too_large
        chunks.append(chunk)
    return b"".join(chunks)


def parse(request: Request, raw: bytes) -> Any:
    """The JSON of a body; stricter than Python's own parser, which takes NaN and lone surrogates.

    The declared type is insisted on because a browser asks before it sends JSON to another origin: no web page can
    speak to a service on loopback behind its user's back.
    """
    declared = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if declared != "application/json":
        raise WrongMediaType("Send JSON with the header `Content-Type: application/json`.")
    try:
        value = from_json(raw, allow_inf_nan=False)
        json.dumps(value, allow_nan=False)  # 1e999 is a number in JSON and infinite here
    except ValueError as error:
        raise Malformed(f"The body cannot be read as JSON ({error}): send valid JSON in UTF-8.") from None
    return value
