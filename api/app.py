"""The HTTP door: assembles the application. It knows how to ask and never how to compute, so it needs no torch."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.types import ASGIApp

from api import errors
from api.authentication import is_loopback
from api.rate_limits import RateLimiter
from api.request_log import RequestLogMiddleware
from api.routes import (
    compare,
    completions,
    console,
    edits,
    evaluations,
    exports,
    generate,
    health,
    jobs,
    ledger,
    metrics,
    models,
    traces,
)
from api.security_headers import SecurityHeadersMiddleware
from service.application import Services
from service.application.api_keys import ApiKeys, is_token
from service.errors import Misconfigured
from service.jobs.broker import Broker
from service.settings import Settings

DESCRIPTION = """\
Locates, edits and rolls back facts inside a resident GPT model.

* `POST /edits` corrects a fact. It is a job: `202` with a `Location`, or `Prefer: wait=30` to hold the answer.
* Every edit is in the ledger; a **version** is a position in it, and 0 is the untouched model.
* `DELETE /edits/{id}` takes an edit back, in any order and without a trace in the weights.
* `POST /generate` and `POST /compare` speak from any version. `POST /trace` shows where a fact is kept.
* `POST /v1/completions` and `GET /v1/models` are OpenAI's: a version is the model `NAME@42`.
* `POST /evaluations` says how good edits are on many records, without touching the ledger.
* `GET /export` gives a version as a LoRA adapter, as edited weights, or as edits that `POST /import` lands elsewhere.

Errors are `application/problem+json` (RFC 9457) whose `detail` says what to change; below `/v1` they have OpenAI's form.
"""


def create_app(services: Services, broker: Broker, settings: Settings) -> FastAPI:
    """The application on top of what is already wired; whoever wired it closes it."""
    check_exposure(settings)
    keys = ApiKeys(services.database)
    _require_key_unless_loopback(settings, keys)
    rate_limiter = RateLimiter(settings.redis_url, settings.redis_prefix)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        rate_limiter.close()

    app = FastAPI(
        title="Palimpsest",
        version=_version(),
        summary="Edit what a language model knows, and take it back",
        description=DESCRIPTION,
        redirect_slashes=False,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        lifespan=lifespan,
    )
    app.state.services = services
    app.state.broker = broker
    app.state.settings = settings
    app.state.keys = keys
    app.state.rate_limiter = rate_limiter
    errors.install_error_handlers(app)
    for route_module in (
        edits,
        traces,
        evaluations,
        exports,
        jobs,
        generate,
        compare,
        completions,
        ledger,
        models,
        metrics,
        health,
        console,
    ):
        app.include_router(route_module.router)
    app.openapi = lambda: _openapi_document(app)  # type: ignore[method-assign]
    _add_outer_middleware(app)
    return app


def _add_outer_middleware(app: FastAPI) -> None:
    """Note and guard every request, also one that ends in a fault: a middleware of the framework's would stand inside of that."""
    stack = app.build_middleware_stack

    def wrapped() -> ASGIApp:
        return RequestLogMiddleware(SecurityHeadersMiddleware(stack(), app.docs_url))

    app.build_middleware_stack = wrapped  # type: ignore[method-assign]


def check_exposure(settings: Settings) -> None:
    """Refuse what the settings alone show to be open to strangers. The rest is seen once the database is there."""
    if settings.api_key and is_token(settings.api_key):
        raise Misconfigured(
            "PALIMPSEST_API_KEY holds a key made by `palimpsest keys create`, and would give it every scope: the root "
            "key of the service must be another, or none."
        )
    if settings.database_url is None and not settings.sqlite_path().exists():
        _require_key_unless_loopback(settings, None)  # there can be no key yet


def _require_key_unless_loopback(settings: Settings, keys: ApiKeys | None) -> None:
    """Without any key the service listens on loopback only."""
    if settings.api_key or is_loopback(settings.host) or (keys is not None and keys.any_exist()):
        return
    raise Misconfigured(
        f"The service would listen on {settings.host} without a key: anyone there could edit the model. Make a key with "
        "`palimpsest keys create`, or set PALIMPSEST_API_KEY, or listen on 127.0.0.1."
    )


def _version() -> str:
    try:
        return version("palimpsest")
    except PackageNotFoundError:  # run from a checkout
        return "0"


def _openapi_document(app: FastAPI) -> dict[str, Any]:
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
