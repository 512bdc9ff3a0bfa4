"""The HTTP door: assembles the application. It knows how to ask and never how to compute, so it needs no torch."""

from __future__ import annotations

import ipaddress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from api import errors
from api.routes import compare, edits, generate, health, ledger, models, traces
from service.errors import Misconfigured
from service.jobs.broker import Broker
from service.operations import Operations
from service.settings import Settings

DESCRIPTION = """\
Locates, edits and rolls back facts inside a resident GPT model.

* `POST /edits` corrects a fact. It is a job: `202` with a `Location`, or `Prefer: wait=30` to hold the answer.
* Every edit is in the ledger; a **version** is a position in it, and 0 is the untouched model.
* `DELETE /edits/{id}` takes an edit back, in any order and without a trace in the weights.
* `POST /generate` and `POST /compare` speak from any version. `POST /trace` shows where a fact is kept.

Errors are `application/problem+json` (RFC 9457) whose `detail` says what to change.
"""


def create_app(operations: Operations, broker: Broker, settings: Settings) -> FastAPI:
    """The application on top of what is already wired; whoever wired it closes it."""
    refuse_exposure(settings)
    app = FastAPI(
        title="Palimpsest",
        version=_version(),
        summary="Edit what a language model knows, and take it back",
        description=DESCRIPTION,
        redirect_slashes=False,
    )
    app.state.operations = operations
    app.state.broker = broker
    app.state.settings = settings
    errors.install(app)
    for part in (edits, traces, generate, compare, ledger, models, health):
        app.include_router(part.router)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


def refuse_exposure(settings: Settings) -> None:
    """Without an API key the service listens on loopback only."""
    if not settings.api_key and not _loopback(settings.host):
        raise Misconfigured(
            f"The service would listen on {settings.host} without an API key: anyone there could edit the model. "
            "Set PALIMPSEST_API_KEY, or listen on 127.0.0.1."
        )


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _version() -> str:
    try:
        return version("palimpsest")
    except PackageNotFoundError:  # run from a checkout
        return "0"


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the one form of all errors in it."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            version=app.version,
            summary=app.summary,
            description=app.description,
            routes=app.routes,
        )
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        reference = "#/components/schemas/{model}"
        problem = errors.Problem.model_json_schema(ref_template=reference)
        schemas.update(problem.pop("$defs"))
        schemas["Problem"] = problem
        app.openapi_schema = document
    return app.openapi_schema
