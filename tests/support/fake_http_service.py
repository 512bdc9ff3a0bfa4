"""A fake service: responses by method and path, and a record of the requests."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import httpx


def sse_stream(*named_events: tuple[str, Any]) -> str:
    """Return a stream of server-sent events with ids from 1, and a ping comment."""
    frames = [
        f"id: {i}\nevent: {name}\ndata: {json.dumps(data)}\n\n"
        for i, (name, data) in enumerate(named_events, 1)
    ]
    return ": ping\n\n" + "".join(frames)


@dataclass
class FakeService:
    """`answers` maps "METHOD /path" to JSON, text (a stream), bytes (a file), a response or an exception."""

    responses: dict[str, Any] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    headers: list[httpx.Headers] = field(default_factory=list)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        name = f"{request.method} {request.url.path}"
        body = json.loads(request.content) if request.content else dict(request.url.params)
        self.requests.append((name, body))
        self.headers.append(request.headers)
        answer = self.responses.get(name)
        if isinstance(answer, list):
            answer = answer.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, httpx.Response):
            return answer
        if isinstance(answer, str):
            return httpx.Response(200, text=answer, headers={"Content-Type": "text/event-stream"})
        if isinstance(answer, bytes):
            return httpx.Response(200, content=answer)
        return (
            httpx.Response(200, json=answer)
            if answer is not None
            else self.problem(404, f"no answer to {name}")
        )

    @staticmethod
    def problem(status: int, detail: str, **more: Any) -> httpx.Response:
        """Return a problem document (RFC 9457)."""
        content = json.dumps({"title": "x", "status": status, "detail": detail, **more})
        return httpx.Response(status, text=content, headers={"Content-Type": "application/problem+json"})
