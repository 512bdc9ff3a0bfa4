"""The documentation of the HTTP interface: Swagger UI at `/docs` and ReDoc at `/redoc`, both served from here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Header, Response

from api.security_headers import DOCS_CSP
from api.static_files import file_response, files_of
from service.errors import NotFound

router = APIRouter(include_in_schema=False)

DOCUMENTATION_DIR = Path(__file__).resolve().parent.parent / "documentation"
PAGES = ("swagger.html", "redoc.html")

IfNoneMatchHeader = Annotated[str | None, Header()]


@router.get("/docs")
async def get_swagger_page(if_none_match: IfNoneMatchHeader = None) -> Response:
    """Return the page of Swagger UI."""
    return _page_response("swagger.html", if_none_match)


@router.get("/redoc")
async def get_redoc_page(if_none_match: IfNoneMatchHeader = None) -> Response:
    """Return the page of ReDoc."""
    return _page_response("redoc.html", if_none_match)


@router.get("/docs/{name}")
async def get_documentation_file(name: str, if_none_match: IfNoneMatchHeader = None) -> Response:
    """Return a script or a stylesheet of either page."""
    file = None if name in PAGES else files_of(DOCUMENTATION_DIR).get(name)
    if file is None:
        raise NotFound(
            f"the documentation has no file {name!r}: reload the page, it may be of an older version."
        )
    return file_response(file, if_none_match, {})


def _page_response(name: str, if_none_match: str | None) -> Response:
    return file_response(
        files_of(DOCUMENTATION_DIR)[name], if_none_match, {"Content-Security-Policy": DOCS_CSP}
    )
