"""The console: a page and what it is made of, from files of this package. It holds no data, so it needs no key to be read.

What it shows it asks of the other routes, with the key of whoever looks.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Header, Response

from api.content_negotiation import HTML, negotiate
from api.security_headers import CONSOLE_POLICY
from service.errors import NotFound

router = APIRouter(include_in_schema=False)

FOLDER = Path(__file__).resolve().parent.parent / "console"
PAGE = "index.html"
#: kept by the browser, and asked for again each time: an upgrade shows at once
CACHED = "no-cache"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

IfNoneMatch = Annotated[str | None, Header()]


@dataclass(frozen=True)
class Part:
    """One file, ready to be sent."""

    content: bytes
    media_type: str
    tag: str


@lru_cache
def parts() -> dict[str, Part]:
    """Every file of the console by its name. They are few and small, and are read once."""
    return {path.name: _read(path) for path in sorted(FOLDER.iterdir()) if path.suffix in MEDIA_TYPES}


def _read(path: Path) -> Part:
    content = path.read_bytes()
    return Part(content, MEDIA_TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')


@router.get("/")
async def page(accept: Annotated[str | None, Header()] = None, if_none_match: IfNoneMatch = None) -> Response:
    """The page for people; a program that wants something else is told where that is."""
    negotiate(accept, (HTML,), "This is a page for people. Programs find the interface in /openapi.json.")
    return _sent(parts()[PAGE], if_none_match, {"Vary": "Accept", "Content-Security-Policy": CONSOLE_POLICY})


@router.get("/console/{name}")
async def part(name: str, if_none_match: IfNoneMatch = None) -> Response:
    """A style, a script or the icon."""
    found = parts().get(name)
    if found is None or name == PAGE:
        raise NotFound(f"the console has no part {name!r}: reload the page, it may be an older one.")
    return _sent(found, if_none_match, {})


def _sent(part: Part, known: str | None, headers: dict[str, str]) -> Response:
    """The part, or 304 to a browser that has it."""
    headers = {"Cache-Control": CACHED, "ETag": part.tag, **headers}
    if known is not None and _names(known, part.tag):
        return Response(status_code=304, headers=headers)
    return Response(part.content, headers=headers, media_type=part.media_type)


def _names(known: str, tag: str) -> bool:
    """Whether a list of tags has this one; a proxy that compresses calls it weak (RFC 9110, 13.1.2)."""
    tags = {one.strip().removeprefix("W/") for one in known.split(",")}
    return tag in tags or "*" in tags
