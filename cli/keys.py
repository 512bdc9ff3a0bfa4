"""`palimpsest keys`: make, list and revoke the keys of a service, straight in its database."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import datetime

from cli.flags import read_settings
from cli.screen import err, out, table
from service.bootstrap import open_database
from service.keys import REMEMBERED, Keys, Scope
from service.settings import Settings

Verb = Callable[[argparse.Namespace, Keys], int]


def run(args: argparse.Namespace) -> int:
    """One of the verbs."""
    database = open_database(read_settings(args, Settings))
    try:
        database.migrate()
        verb: Verb = {"create": create, "list": listing, "revoke": revoke}[args.verb]
        return verb(args, Keys(database))
    finally:
        database.close()


def create(args: argparse.Namespace, keys: Keys) -> int:
    """The token goes to stdout, alone, and all that is said about it to stderr."""
    first = not keys.exist()
    key, token = keys.create(args.name, map(str.strip, args.scopes.split(",")), args.per_minute, args.queued)
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


def listing(args: argparse.Namespace, keys: Keys) -> int:
    """Every key, oldest first."""
    rows = [
        (k.name, _joined(k.scopes), k.requests_per_minute, k.max_queued, *map(_day, (k.created, k.last_used, k.revoked)))
        for k in keys.all()
    ]  # fmt: skip
    if not rows:
        out.print("There are no keys.")
        return 0
    columns = ("name", "scopes", "per minute", "queued", "created (UTC)", "last used", "revoked")
    out.print(table("", columns, rows))
    return 0


def revoke(args: argparse.Namespace, keys: Keys) -> int:
    """The key is refused from now on."""
    key = keys.revoke(args.name)
    out.print(f"{key.name} opens nothing any more, in every process within {REMEMBERED:.0f} seconds.")
    return 0


def _joined(scopes: frozenset[Scope]) -> str:
    return ",".join(scope for scope in Scope if scope in scopes)


def _day(moment: datetime | None) -> str | None:
    return None if moment is None else f"{moment:%Y-%m-%d %H:%M}"
