"""The console: static files of this package. They contain no data and need no API key.

The page calls the other routes with the API key of the user.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Header, Response

from api.content_negotiation import HTML, negotiate
from api.security_headers import CONSOLE_CSP
from service.errors import NotFound

router = APIRouter(include_in_schema=False)

CONSOLE_DIR = Path(__file__).resolve().parent.parent / "console"
INDEX_PAGE = "index.html"
#: the browser revalidates each time, so that an upgrade is effective at once
CACHE_CONTROL = "no-cache"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

IfNoneMatchHeader = Annotated[str | None, Header()]


@dataclass(frozen=True)
class ConsoleFile:
    """A file with its media type and entity tag."""

    content: bytes
    media_type: str
    etag: str


@lru_cache
def console_files() -> dict[str, ConsoleFile]:
    """Return all files by name. They are small and are read once."""
    return {
        path.name: _load_file(path) for path in sorted(CONSOLE_DIR.iterdir()) if path.suffix in MEDIA_TYPES
    }


def _load_file(path: Path) -> ConsoleFile:
    content = path.read_bytes()
    return ConsoleFile(content, MEDIA_TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')


@router.get("/")
async def get_console_page(
    accept: Annotated[str | None, Header()] = None, if_none_match: IfNoneMatchHeader = None
) -> Response:
    """Return the page. A request that does not accept HTML gets 406 with a pointer to the API."""
    negotiate(accept, (HTML,), "This page is HTML. The API is described in /openapi.json.")
    return _file_response(
        console_files()[INDEX_PAGE], if_none_match, {"Vary": "Accept", "Content-Security-Policy": CONSOLE_CSP}
    )


@router.get("/console/{name}")
async def get_console_file(name: str, if_none_match: IfNoneMatchHeader = None) -> Response:
    """Return a stylesheet, a script or the icon."""
    file = console_files().get(name)
    if file is None or name == INDEX_PAGE:
        raise NotFound(f"the console has no file {name!r}: reload the page, it may be of an older version.")
    return _file_response(file, if_none_match, {})


def _file_response(file: ConsoleFile, if_none_match: str | None, headers: dict[str, str]) -> Response:
    """Return the file, or 304 if the entity tag matches."""
    headers = {"Cache-Control": CACHE_CONTROL, "ETag": file.etag, **headers}
    if if_none_match is not None and _matches_etag(if_none_match, file.etag):
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.media_type)


def _matches_etag(if_none_match: str, etag: str) -> bool:
    """Return whether a list of tags contains this one, compared weakly (RFC 9110, 13.1.2)."""
    etags = {candidate.strip().removeprefix("W/") for candidate in if_none_match.split(",")}
    return etag in etags or "*" in etags
