"""Who asks: the holder of the root key, of a key from the table, or, where no key is needed, whoever is on this machine."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from dataclasses import dataclass

from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from api.errors import Forbidden, Unauthorized
from api.rate_limits import PrincipalLimits
from service.application.api_keys import ALL_SCOPES, ApiKeys, Scope, is_token
from service.settings import Settings

LOCAL_ACTOR = "local"
#: names of this machine that no stranger's name server can give away
LOOPBACK_NAMES = {"localhost"}
_HOST_PATTERN = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<name>[^:\[\]]+))(?::\d*)?")


@dataclass(frozen=True)
class Principal:
    """`actor` is how the ledger will name them; it never holds a secret."""

    actor: str
    scopes: frozenset[Scope]
    limits: PrincipalLimits


async def authenticate(request: Request) -> Principal:
    """The caller; Unauthorized when a key is needed and none that is good was sent."""
    settings: Settings = request.app.state.settings
    keys: ApiKeys = request.app.state.keys
    token = _bearer_token(request)
    if settings.api_key and _matches_root_key(token, settings.api_key):
        return Principal(
            root_actor(settings.api_key), ALL_SCOPES, PrincipalLimits(settings.requests_per_minute)
        )
    if is_token(token) and (key := keys.cached(token) or await run_in_threadpool(keys.verify, token)):
        per_minute = key.requests_per_minute or settings.requests_per_minute
        return Principal(f"key:{key.name}", key.scopes, PrincipalLimits(per_minute, key.max_queued))
    if settings.api_key or not is_loopback(settings.host) or await run_in_threadpool(keys.any_exist):
        raise Unauthorized("Send a key of this service in the header `Authorization: Bearer KEY`.")
    _reject_dns_rebinding(request)
    return Principal(LOCAL_ACTOR, ALL_SCOPES, PrincipalLimits())


def root_actor(api_key: str) -> str:
    """The actor behind the root key: its digest, so that the ledger tells one root key from the next."""
    return f"key:{hashlib.sha256(api_key.encode()).hexdigest()[:12]}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() in LOOPBACK_NAMES


def _bearer_token(request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip(" ") if scheme.lower() == "bearer" else ""


def _matches_root_key(token: str, api_key: str) -> bool:
    """Digests have one length, so the comparison takes the same time whatever was sent."""
    token_digest = hashlib.sha256(token.encode("latin-1")).digest()
    return hmac.compare_digest(token_digest, hashlib.sha256(api_key.encode()).digest())


def _reject_dns_rebinding(request: Request) -> None:
    """A page in a browser here can give its own name this machine's address, and would then speak to us as itself."""
    match = _HOST_PATTERN.fullmatch(request.headers.get("host", ""))
    if match is None or not is_loopback(match["six"] or match["name"]):
        raise Forbidden(
            "Without a key the service answers only to the names of this machine: ask for it as 127.0.0.1 or "
            "localhost, or make a key with `palimpsest keys create`."
        )
