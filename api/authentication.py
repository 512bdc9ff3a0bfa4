"""Authentication: the root key, API keys of the database, or in development mode local access without a key."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from dataclasses import dataclass

from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from api.errors import Forbidden, Unauthorized
from service.application.api_keys import ALL_SCOPES, ROOT_NAME, ApiKeyInfo, ApiKeys, Scope, is_token
from service.application.caller import DEFAULT_LIMITS, CallerLimits
from service.application.development import KeylessAccess
from service.settings import Settings

LOCAL_ACTOR = "local"
ROOT_ACTOR = f"key:{ROOT_NAME}"  # nothing derived from the key: readers of the ledger could guess it offline
#: host names of loopback that DNS rebinding cannot use
LOOPBACK_NAMES = {"localhost"}
#: headers that proxies add, and beginnings of such headers
PROXY_HEADERS = {"forwarded", "via", "x-real-ip", "x-client-ip", "x-cluster-client-ip", "true-client-ip"}
PROXY_HEADER_PREFIXES = ("x-forwarded-", "x-envoy-", "x-original-", "cf-", "fly-", "fastly-")
_HOST_PATTERN = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<name>[^:\[\]]+))(?::\d*)?")


@dataclass(frozen=True)
class Principal:
    """An authenticated caller. `actor` is recorded in the ledger and contains no secret."""

    actor: str
    scopes: frozenset[Scope]
    limits: CallerLimits


async def authenticate(request: Request) -> Principal:
    """Return the caller. Raises Unauthorized if an API key is required and the request has no valid one."""
    settings: Settings = request.app.state.settings
    keys: ApiKeys = request.app.state.keys
    keyless: KeylessAccess = request.app.state.keyless_access
    token = _bearer_token(request)
    if settings.api_key and _matches_root_key(token, settings.api_key):
        return Principal(ROOT_ACTOR, ALL_SCOPES, settings_limits(settings))
    if is_token(token) and (
        key := keys.cached(token) or await run_in_threadpool(_verify, token, keys, keyless)
    ):
        return Principal(f"key:{key.name}", key.scopes, key.limits.with_defaults(settings_limits(settings)))
    if not await run_in_threadpool(keyless.is_allowed, keys):
        raise Unauthorized("Send an API key of this service in the header `Authorization: Bearer KEY`.")
    _reject_other_machines(request)
    return Principal(LOCAL_ACTOR, ALL_SCOPES, DEFAULT_LIMITS)


def settings_limits(settings: Settings) -> CallerLimits:
    """Return the limits of a key without limits of its own."""
    return CallerLimits(
        settings.requests_per_minute,
        settings.tokens_per_minute,
        settings.max_queued_per_key,
        settings.max_concurrent_per_key,
    )


def _verify(token: str, keys: ApiKeys, keyless: KeylessAccess) -> ApiKeyInfo | None:
    """Return the key of a token, and record that a key has existed."""
    key = keys.verify(token)
    if key is not None:
        keyless.marker.set()
    return key


def is_loopback(host: str) -> bool:
    """Return whether an address is reachable from this machine only."""
    try:
        address = ipaddress.ip_address(host)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback
    except ValueError:
        return host.lower() in LOOPBACK_NAMES


def _bearer_token(request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip(" ") if scheme.lower() == "bearer" else ""


def _matches_root_key(token: str, api_key: str) -> bool:
    """Compare digests in constant time, independent of the length of the token."""
    token_digest = hashlib.sha256(token.encode("latin-1")).digest()
    return hmac.compare_digest(token_digest, hashlib.sha256(api_key.encode()).digest())


def _reject_other_machines(request: Request) -> None:
    """Reject requests of development mode that do not come from a program on this machine.

    A web page could resolve its own name to this machine (DNS rebinding): `Host` must be loopback. A proxy on this
    machine forwards requests of others: it is recognized by the headers that it adds.
    """
    match = _HOST_PATTERN.fullmatch(request.headers.get("host", ""))
    if match is None or not is_loopback(match["six"] or match["name"]):
        raise Forbidden(
            "Without API keys the service accepts only loopback host names: use 127.0.0.1 or localhost, or create a key with "
            "`palimpsest keys create`."
        )
    if request.client is None or not is_loopback(request.client.host):
        raise Forbidden(
            "Without API keys the service accepts only requests from its own machine: create a key with `palimpsest keys "
            "create`."
        )
    if name := next(filter(_is_proxy_header, request.headers), None):
        raise Forbidden(
            f"Without API keys the service accepts no requests through a proxy, and this one has the header `{name}`: "
            "create a key with `palimpsest keys create`."
        )


def _is_proxy_header(name: str) -> bool:
    return name in PROXY_HEADERS or name.startswith(PROXY_HEADER_PREFIXES)
