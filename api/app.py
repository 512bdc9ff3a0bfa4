"""The FastAPI application. It validates and forwards requests, and never imports torch."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from api import errors
from api.authentication import is_loopback
from api.job_resource import job_router
from api.large_requests import LargeRequests
from api.quotas import ConcurrencyLimiter
from api.rate_limits import RateLimiter
from api.request_log import RequestLogMiddleware
from api.routes import (
    compare,
    completions,
    console,
    documentation,
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
    trainings,
    versions,
)
from api.security_headers import SecurityHeadersMiddleware
from service.application import Services
from service.application.api_keys import ApiKeys, is_token
from service.application.development import Development, KeylessAccess, KeyMarker
from service.errors import Misconfigured
from service.jobs.broker import Broker
from service.jobs.job_kinds import JOB_KINDS
from service.settings import Settings

MIN_ROOT_KEY_LENGTH = 16  # characters
DESCRIPTION = """\
Locate, edit and roll back facts inside a GPT model that serves requests.

* `POST /edits` changes a fact. It creates a job: the response is `202` with a `Location`; `Prefer: wait=30` waits for the result.
* The ledger records every edit. A **version** is a position in the ledger; version 0 is the base model.
* `DELETE /edits/{id}` reverts an edit, in any order, and leaves no trace in the weights.
* `POST /generate` and `POST /compare` generate text from any version. `POST /trace` locates a fact in the hidden states.
* `POST /v1/completions`, `POST /v1/chat/completions` and `GET /v1/models` are compatible with OpenAI's API; version 42 is
  the model `NAME@42`.
* `POST /evaluations` measures the quality of edits over many records, without changing the ledger.
* `POST /trainings` trains the classifier of the method serac.
* `POST /exports` makes a LoRA adapter, the edited weights or an edit set of a version; `POST /import` applies an edit set.

Errors are `application/problem+json` (RFC 9457) with a stable `code` and a `detail` that says what to change. Below `/v1` they have
the form of OpenAI's API.
"""

#: routers of the kinds of jobs that have routes of their own; the others use `job_router`
JOB_ROUTERS = {
    "edit": edits.router,
    "trace": traces.router,
    "evaluation": evaluations.router,
    "export": exports.router,
    "training": trainings.router,
}
OTHER_ROUTERS = (
    jobs.router,
    generate.router,
    compare.router,
    completions.router,
    ledger.router,
    versions.router,
    models.router,
    metrics.router,
    health.router,
    console.router,
    documentation.router,
)


class PalimpsestApp(FastAPI):
    """The application with its outer middleware, and an OpenAPI document that has the schema of all errors."""

    def build_middleware_stack(self) -> ASGIApp:
        """Wrap the stack of the framework, so that responses to unexpected errors are logged and have all headers,
        too."""
        stack = super().build_middleware_stack()
        return RequestLogMiddleware(SecurityHeadersMiddleware(stack))

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document with the schema of problem documents."""
        if self.openapi_schema is None:
            document = super().openapi()
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            problem = errors.Problem.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(problem.pop("$defs"))
            schemas["Problem"] = problem
        return super().openapi()


def create_app(
    services: Services, broker: Broker, settings: Settings, development: Development = Development.OFF
) -> FastAPI:
    """Return the application. The caller closes the services and the broker."""
    check_exposure(settings)
    keys = ApiKeys(services.database)
    _require_key_unless_loopback(settings, keys)
    rate_limiter = RateLimiter(settings.redis_url, settings.redis_prefix)
    large_requests = LargeRequests()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        rate_limiter.close()
        large_requests.close()

    app = PalimpsestApp(
        title="Palimpsest",
        version=_version(),
        summary="Edit facts in a language model, and revert the edits",
        description=DESCRIPTION,
        redirect_slashes=False,
        docs_url=None,  # those of FastAPI load their scripts from other hosts
        redoc_url=None,
        lifespan=lifespan,
        routes=_routes(),
    )
    app.state.services = services
    app.state.broker = broker
    app.state.settings = settings
    app.state.keys = keys
    app.state.keyless_access = KeylessAccess(development, KeyMarker(settings.data_dir))
    app.state.rate_limiter = rate_limiter
    app.state.concurrency_limiter = ConcurrencyLimiter()
    app.state.large_requests = large_requests
    errors.install_error_handlers(app)
    return app


@cache
def _routes() -> list[BaseRoute]:
    """Return the routes, which all applications of a process share: FastAPI analyzes them at the first request."""
    router = APIRouter(generate_unique_id_function=operation_id)
    for kind in JOB_KINDS.values():
        router.include_router(JOB_ROUTERS.get(kind.name) or job_router(kind))
    for other_router in OTHER_ROUTERS:
        router.include_router(other_router)
    return router.routes


def operation_id(route: APIRoute) -> str:
    """Return the operation id of a route: its name, which is that of its function unless it is set."""
    return route.name


def check_exposure(settings: Settings) -> None:
    """Raise Misconfigured if the settings alone expose the service without authentication.

    `create_app` checks again with the API keys of the database.
    """
    if settings.api_key and is_token(settings.api_key):
        raise Misconfigured(
            "PALIMPSEST_API_KEY holds a key of `palimpsest keys create`, which would get every scope. Use another root key, or "
            "none."
        )
    if settings.api_key and len(settings.api_key) < MIN_ROOT_KEY_LENGTH:
        raise Misconfigured(
            f"PALIMPSEST_API_KEY has {len(settings.api_key)} characters, and a root key needs at least {MIN_ROOT_KEY_LENGTH}: "
            "use a random one, for example the output of `openssl rand -hex 32`."
        )
    if settings.development and settings.api_key:
        raise Misconfigured(
            "--development accepts requests without a key, and PALIMPSEST_API_KEY requires one: remove one of the two."
        )
    if settings.development and not is_loopback(settings.host):
        raise Misconfigured(
            f"--development is for this machine only, and the service would listen on {settings.host}: listen on 127.0.0.1, or "
            "remove --development and create a key with `palimpsest keys create`."
        )
    if settings.database_url is None and not settings.sqlite_path().exists():
        _require_key_unless_loopback(settings, None)  # a database that does not exist has no keys


def _require_key_unless_loopback(settings: Settings, keys: ApiKeys | None) -> None:
    if settings.api_key or is_loopback(settings.host) or (keys is not None and keys.any_exist()):
        return
    raise Misconfigured(
        f"The service would listen on {settings.host} without an API key, and everyone there could edit the model. Create a "
        "key with `palimpsest keys create`, or set PALIMPSEST_API_KEY, or listen on 127.0.0.1."
    )


@cache
def _version() -> str:
    try:
        return version("palimpsest")
    except PackageNotFoundError:  # a checkout that is not installed
        return "0"
