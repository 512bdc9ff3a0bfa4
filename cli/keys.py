"""`palimpsest keys`: make, list and revoke the keys of a service, straight in its database."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import datetime
from typing import Any

from cli.flags import read_settings
from cli.terminal import err, listing, out, print_json
from service.application.api_keys import REMEMBERED, Key, Keys, Scope
from service.bootstrap import open_database
from service.settings import Settings

Verb = Callable[[argparse.Namespace, Keys], int]


def run(args: argparse.Namespace) -> int:
    """One of the verbs."""
    database = open_database(read_settings(args, Settings))
    try:
        database.migrate()
        verb: Verb = {"create": create, "list": listed, "revoke": revoke}[args.verb]
        return verb(args, Keys(database))
    finally:
        database.close()


def create(args: argparse.Namespace, keys: Keys) -> int:
    """The token goes to stdout, alone or as a field of the key, and all that is said about it to stderr."""
    first = not keys.exist()
    key, token = keys.create(args.name, map(str.strip, args.scopes.split(",")), args.per_minute, args.queued)
    if args.json:
        print_json({**_resource(key), "token": token})
    else:
        out.print(token)
    err.print(
        f"The key {key.name!r} is good for {_joined(key.scopes)}. It is shown this once and kept nowhere: store it now. "
        "Send it as the header\n"
        "  Authorization: Bearer KEY\n"
        "or give it to the commands here as PALIMPSEST_API_KEY (never to the service: there that is the root key)."
    )
    if first:
        err.print("It is the first one: from now on every request needs a key.")
    return 0


def listed(args: argparse.Namespace, keys: Keys) -> int:
    """Every key, oldest first."""
    found = keys.all()
    if args.json:
        print_json([_resource(key) for key in found])
        return 0
    rows = [
        (k.name, _joined(k.scopes), k.requests_per_minute, k.max_queued, _minute(k.created), _use(k)) for k in found
    ]  # fmt: skip
    if not rows:
        out.print("There are no keys.")
        return 0
    out.print(listing(("name", "scopes", "per minute", "queued", "created (UTC)", "use"), rows, ("use",)))
    return 0


def revoke(args: argparse.Namespace, keys: Keys) -> int:
    """The key is refused from now on."""
    key = keys.revoke(args.name)
    if args.json:
        print_json(_resource(key))
    else:
        out.print(f"{key.name} opens nothing any more, in every process within {REMEMBERED:.0f} seconds.")
    return 0


def _joined(scopes: frozenset[Scope]) -> str:
    return ",".join(scope for scope in Scope if scope in scopes)


def _minute(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M}"


def _use(key: Key) -> str:
    """Whether a key still opens, and when it last did."""
    if key.revoked:
        return f"revoked {_minute(key.revoked)}"
    return f"last used {_minute(key.last_used)}" if key.last_used else "not used yet"


def _resource(key: Key) -> dict[str, Any]:
    """A key as JSON, times in UTC."""
    limits = {"requests_per_minute": key.requests_per_minute, "max_queued": key.max_queued}
    times = {name: getattr(key, name) for name in ("created", "last_used", "revoked")}
    return {
        "name": key.name,
        "scopes": [scope for scope in Scope if scope in key.scopes],
        **limits,
        **{name: at and at.isoformat() for name, at in times.items()},
    }
