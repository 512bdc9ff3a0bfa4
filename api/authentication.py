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
from api.rate_limits import Limits
from service.application.api_keys import EVERYTHING, Keys, Scope, is_token
from service.settings import Settings

LOCAL = "local"
#: names of this machine that no stranger's name server can give away
LOOPBACK = {"localhost"}
_HOST = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<name>[^:\[\]]+))(?::\d*)?")


@dataclass(frozen=True)
class Caller:
    """`actor` is how the ledger will name them; it never holds a secret."""

    actor: str
    scopes: frozenset[Scope]
    limits: Limits


async def identify(request: Request) -> Caller:
    """The caller; Unauthorized when a key is needed and none that is good was sent."""
    settings: Settings = request.app.state.settings
    keys: Keys = request.app.state.keys
    token = _token(request)
    if settings.api_key and _same(token, settings.api_key):
        return Caller(root(settings.api_key), EVERYTHING, Limits(settings.requests_per_minute))
    if is_token(token) and (key := keys.remembered(token) or await run_in_threadpool(keys.verify, token)):
        per_minute = key.requests_per_minute or settings.requests_per_minute
        return Caller(f"key:{key.name}", key.scopes, Limits(per_minute, key.max_queued))
    if settings.api_key or not is_loopback(settings.host) or await run_in_threadpool(keys.exist):
        raise Unauthorized("Send a key of this service in the header `Authorization: Bearer KEY`.")
    _refuse_rebinding(request)
    return Caller(LOCAL, EVERYTHING, Limits())


def root(api_key: str) -> str:
    """The actor behind the root key: its digest, so that the ledger tells one root key from the next."""
    return f"key:{hashlib.sha256(api_key.encode()).hexdigest()[:12]}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() in LOOPBACK


def _token(request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip(" ") if scheme.lower() == "bearer" else ""


def _same(token: str, api_key: str) -> bool:
    """Digests have one length, so the comparison takes the same time whatever was sent."""
    sent = hashlib.sha256(token.encode("latin-1")).digest()
    return hmac.compare_digest(sent, hashlib.sha256(api_key.encode()).digest())


def _refuse_rebinding(request: Request) -> None:
    """A page in a browser here can give its own name this machine's address, and would then speak to us as itself."""
    found = _HOST.fullmatch(request.headers.get("host", ""))
    if found is None or not is_loopback(found["six"] or found["name"]):
        raise Forbidden(
            "Without a key the service answers only to the names of this machine: ask for it as 127.0.0.1 or "
            "localhost, or make a key with `palimpsest keys create`."
        )
