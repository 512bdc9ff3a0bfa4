"""`palimpsest keys`: make, list and revoke the keys of a service, straight in its database."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import datetime
from typing import Any

from cli.flags import read_settings
from cli.terminal import err, format_list, out, print_json
from service.application.api_keys import CACHE_SECONDS, ApiKeyInfo, ApiKeys, Scope
from service.bootstrap import open_database
from service.settings import Settings

KeyCommand = Callable[[argparse.Namespace, ApiKeys], int]


def run(args: argparse.Namespace) -> int:
    """One of the verbs."""
    database = open_database(read_settings(args, Settings))
    try:
        database.migrate()
        verb: KeyCommand = {"create": create_key, "list": list_keys, "revoke": revoke_key}[args.verb]
        return verb(args, ApiKeys(database))
    finally:
        database.close()


def create_key(args: argparse.Namespace, keys: ApiKeys) -> int:
    """The token goes to stdout, alone or as a field of the key, and all that is said about it to stderr."""
    is_first = not keys.any_exist()
    key, token = keys.create(args.name, map(str.strip, args.scopes.split(",")), args.per_minute, args.queued)
    if args.json:
        print_json({**_key_json(key), "token": token})
    else:
        out.print(token)
    err.print(
        f"The key {key.name!r} is good for {_format_scopes(key.scopes)}. It is shown this once and kept nowhere: store it now. "
        "Send it as the header\n"
        "  Authorization: Bearer KEY\n"
        "or give it to the commands here as PALIMPSEST_API_KEY (never to the service: there that is the root key)."
    )
    if is_first:
        err.print("It is the first one: from now on every request needs a key.")
    return 0


def list_keys(args: argparse.Namespace, keys: ApiKeys) -> int:
    """Every key, oldest first."""
    items = keys.all()
    if args.json:
        print_json([_key_json(key) for key in items])
        return 0
    rows = [
        (k.name, _format_scopes(k.scopes), k.requests_per_minute, k.max_queued, _format_minute(k.created), _usage_text(k)) for k in items
    ]  # fmt: skip
    if not rows:
        out.print("There are no keys.")
        return 0
    out.print(format_list(("name", "scopes", "per minute", "queued", "created (UTC)", "use"), rows, ("use",)))
    return 0


def revoke_key(args: argparse.Namespace, keys: ApiKeys) -> int:
    """The key is refused from now on."""
    key = keys.revoke(args.name)
    if args.json:
        print_json(_key_json(key))
    else:
        out.print(f"{key.name} opens nothing any more, in every process within {CACHE_SECONDS:.0f} seconds.")
    return 0


def _format_scopes(scopes: frozenset[Scope]) -> str:
    return ",".join(scope for scope in Scope if scope in scopes)


def _format_minute(timestamp: datetime) -> str:
    return f"{timestamp:%Y-%m-%d %H:%M}"


def _usage_text(key: ApiKeyInfo) -> str:
    """Whether a key still opens, and when it last did."""
    if key.revoked:
        return f"revoked {_format_minute(key.revoked)}"
    return f"last used {_format_minute(key.last_used)}" if key.last_used else "not used yet"


def _key_json(key: ApiKeyInfo) -> dict[str, Any]:
    """A key as JSON, times in UTC."""
    limits = {"requests_per_minute": key.requests_per_minute, "max_queued": key.max_queued}
    times = {name: getattr(key, name) for name in ("created", "last_used", "revoked")}
    return {
        "name": key.name,
        "scopes": [scope for scope in Scope if scope in key.scopes],
        **limits,
        **{name: at and at.isoformat() for name, at in times.items()},
    }
