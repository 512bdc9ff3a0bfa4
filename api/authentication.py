"""Authentication: the root key, API keys of the database, or local access without a key on loopback."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from dataclasses import dataclass

from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from api.errors import Forbidden, Unauthorized
from service.application.api_keys import ALL_SCOPES, ROOT_NAME, ApiKeys, Scope, is_token
from service.application.caller import DEFAULT_LIMITS, CallerLimits
from service.settings import Settings

LOCAL_ACTOR = "local"
ROOT_ACTOR = f"key:{ROOT_NAME}"  # nothing derived from the key: readers of the ledger could guess it offline
#: host names of loopback that DNS rebinding cannot use
LOOPBACK_NAMES = {"localhost"}
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
    token = _bearer_token(request)
    if settings.api_key and _matches_root_key(token, settings.api_key):
        return Principal(ROOT_ACTOR, ALL_SCOPES, settings_limits(settings))
    if is_token(token) and (key := keys.cached(token) or await run_in_threadpool(keys.verify, token)):
        return Principal(f"key:{key.name}", key.scopes, key.limits.with_defaults(settings_limits(settings)))
    if settings.api_key or not is_loopback(settings.host) or await run_in_threadpool(keys.any_exist):
        raise Unauthorized("Send an API key of this service in the header `Authorization: Bearer KEY`.")
    _reject_dns_rebinding(request)
    return Principal(LOCAL_ACTOR, ALL_SCOPES, DEFAULT_LIMITS)


def settings_limits(settings: Settings) -> CallerLimits:
    """Return the limits of a key without limits of its own."""
    return CallerLimits(
        settings.requests_per_minute,
        settings.tokens_per_minute,
        settings.max_queued_per_key,
        settings.max_concurrent_per_key,
    )


def is_loopback(host: str) -> bool:
    """Return whether an address is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() in LOOPBACK_NAMES


def _bearer_token(request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip(" ") if scheme.lower() == "bearer" else ""


def _matches_root_key(token: str, api_key: str) -> bool:
    """Compare digests in constant time, independent of the length of the token."""
    token_digest = hashlib.sha256(token.encode("latin-1")).digest()
    return hmac.compare_digest(token_digest, hashlib.sha256(api_key.encode()).digest())


def _reject_dns_rebinding(request: Request) -> None:
    """Reject requests whose `Host` is not loopback: a web page could resolve its own name to this machine (DNS
    rebinding)."""
    match = _HOST_PATTERN.fullmatch(request.headers.get("host", ""))
    if match is None or not is_loopback(match["six"] or match["name"]):
        raise Forbidden(
            "Without API keys the service accepts only loopback host names: use 127.0.0.1 or localhost, or create a key with "
            "`palimpsest keys create`."
        )
