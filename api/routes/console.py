"""The console: static files of this package. They contain no data and need no API key.

The page calls the other routes with the API key of the user.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Header, Response

from api.content_negotiation import HTML, negotiate
from api.security_headers import CONSOLE_CSP
from api.static_files import file_response, files_of
from service.errors import NotFound

router = APIRouter(include_in_schema=False)

CONSOLE_DIR = Path(__file__).resolve().parent.parent / "console"
INDEX_PAGE = "index.html"

IfNoneMatchHeader = Annotated[str | None, Header()]


@router.get("/")
async def get_console_page(
    accept: Annotated[str | None, Header()] = None, if_none_match: IfNoneMatchHeader = None
) -> Response:
    """Return the page. A request that does not accept HTML gets 406 with a pointer to the API."""
    negotiate(accept, (HTML,), "This page is HTML. The API is described in /openapi.json.")
    return file_response(
        files_of(CONSOLE_DIR)[INDEX_PAGE],
        if_none_match,
        {"Vary": "Accept", "Content-Security-Policy": CONSOLE_CSP},
    )


@router.get("/console/{name}")
async def get_console_file(name: str, if_none_match: IfNoneMatchHeader = None) -> Response:
    """Return a stylesheet, a script or the icon."""
    file = files_of(CONSOLE_DIR).get(name)
    if file is None or name == INDEX_PAGE:
        raise NotFound(f"the console has no file {name!r}: reload the page, it may be of an older version.")
    return file_response(file, if_none_match, {})
