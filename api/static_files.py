"""The static files of a folder of this package. They contain no data and need no API key."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from fastapi import Response

#: the browser revalidates each time, so that an upgrade is effective at once
CACHE_CONTROL = "no-cache"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True)
class StaticFile:
    """A file with its media type and entity tag."""

    content: bytes
    media_type: str
    etag: str


@lru_cache
def files_of(folder: Path) -> dict[str, StaticFile]:
    """Return the files of a folder that are served, by name. They are read once."""
    return {path.name: _load_file(path) for path in sorted(folder.iterdir()) if path.suffix in MEDIA_TYPES}


def _load_file(path: Path) -> StaticFile:
    content = path.read_bytes()
    return StaticFile(content, MEDIA_TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')


def file_response(file: StaticFile, if_none_match: str | None, headers: dict[str, str]) -> Response:
    """Return the file, or 304 if the entity tag matches."""
    headers = {"Cache-Control": CACHE_CONTROL, "ETag": file.etag, **headers}
    if if_none_match is not None and _matches_etag(if_none_match, file.etag):
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.media_type)


def _matches_etag(if_none_match: str, etag: str) -> bool:
    """Return whether a list of tags contains this one, compared weakly (RFC 9110, 13.1.2)."""
    etags = {candidate.strip().removeprefix("W/") for candidate in if_none_match.split(",")}
    return etag in etags or "*" in etags
