"""`palimpsest keys`: create, list and revoke API keys, directly in the database."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from cli.flags import add_command, add_json_flag, add_setting_flags, read_settings
from cli.overview import summary_of
from cli.terminal import err, format_list, out, print_json
from service.settings import Settings

if TYPE_CHECKING:
    from service.application.api_keys import ApiKeyInfo, ApiKeys, Scope

KeyCommand = Callable[[argparse.Namespace, "ApiKeys"], int]


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands."""
    parser = commands.add_parser(
        "keys",
        help=summary_of("keys"),
        description="Create, list and revoke API keys, directly in the database.",
    )
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    create = add_command(verbs, "create", partial(run, create_key), "create an API key and print it once")
    create.add_argument(
        "--name",
        required=True,
        metavar="NAME",
        help="actor that the ledger records for this key, such as nightly-eval",
    )
    create.add_argument("--scopes", required=True, metavar="SCOPE,...", help="some of read,edit,admin")
    create.add_argument(
        "--requests-per-minute",
        dest="key_rate",
        type=int,
        metavar="N",
        help="rate limit (default: the setting of the service)",
    )
    create.add_argument(
        "--tokens-per-minute",
        dest="key_tokens",
        type=int,
        metavar="N",
        help="tokens that its calls may need per minute (default: the setting of the service)",
    )
    create.add_argument(
        "--max-queued",
        dest="key_max_queued",
        type=int,
        metavar="N",
        help="maximum number of queued jobs, and of waiting calls (default: the setting of the service)",
    )
    create.add_argument(
        "--max-concurrent",
        dest="key_max_concurrent",
        type=int,
        metavar="N",
        help="maximum number of open calls and event streams (default: the setting of the service)",
    )
    create.add_argument(
        "--weight",
        dest="key_weight",
        type=int,
        default=1,
        metavar="N",
        help="weight of its work where several keys wait: twice the weight is twice the service (default: 1)",
    )
    list_parser = add_command(
        verbs, "list", partial(run, list_keys), "list API keys with their scopes and last use"
    )
    revoke = add_command(verbs, "revoke", partial(run, revoke_key), "revoke an API key")
    revoke.add_argument("name", metavar="NAME", help="name, as listed by `palimpsest keys list`")
    for verb in (create, list_parser, revoke):
        add_json_flag(verb)
        add_setting_flags(
            verb.add_argument_group("database"), Settings, "data_dir", "database_url", "ledger_key"
        )


def run(command: KeyCommand, args: argparse.Namespace) -> int:
    """Migrate the database and run a command on its keys. Only `create` creates a missing database."""
    from cli.existing_database import open_existing_database
    from service.application.api_keys import ApiKeys
    from service.application.development import KeyMarker
    from service.bootstrap import open_database
    from service.ledger import audit

    settings = read_settings(args, Settings)
    database = open_database(settings) if command is create_key else open_existing_database(settings)
    try:
        database.migrate()
        if command is not list_keys:  # which signs nothing and needs no ledger key
            audit.establish(database)
        keys = ApiKeys(database)
        result = command(args, keys)
        if keys.all():
            KeyMarker(settings.data_dir).set()
        return result
    finally:
        database.close()


def create_key(args: argparse.Namespace, keys: ApiKeys) -> int:
    """Create a key. Its token goes to stdout, the instructions to stderr."""
    from service.application.caller import CallerLimits

    is_first = not keys.any_exist()
    scopes = map(str.strip, args.scopes.split(","))
    limits = CallerLimits(
        args.key_rate, args.key_tokens, args.key_max_queued, args.key_max_concurrent, args.key_weight
    )
    key, token = keys.create(args.name, scopes, limits)
    if args.json:
        print_json({**_key_json(key), "token": token})
    else:
        out.print(token)
    err.print(
        f"Created the key {key.name!r} with the scopes {_format_scopes(key.scopes)}. It is not stored and not shown again: save it now.\n"
        "Send it in the header\n"
        "  Authorization: Bearer KEY\n"
        "or set PALIMPSEST_API_KEY for the client commands. (For the service this variable is the root key.)"
    )
    if is_first:
        err.print("This is the first key: from now on every request needs a key.")
    return 0


def list_keys(args: argparse.Namespace, keys: ApiKeys) -> int:
    """List all keys, oldest first."""
    items = keys.all()
    if args.json:
        print_json([_key_json(key) for key in items])
        return 0
    rows = [
        (k.name, _format_scopes(k.scopes), k.requests_per_minute, k.max_queued, k.weight, _format_minute(k.created), _usage_text(k)) for k in items
    ]  # fmt: skip
    if not rows:
        out.print("There are no keys.")
        return 0
    out.print(
        format_list(
            ("name", "scopes", "per minute", "max queued", "weight", "created (UTC)", "last use"),
            rows,
            ("last use",),
        )
    )
    return 0


def revoke_key(args: argparse.Namespace, keys: ApiKeys) -> int:
    """Revoke a key."""
    from service.application.api_keys import CACHE_SECONDS

    key = keys.revoke(args.name)
    if args.json:
        print_json(_key_json(key))
    else:
        out.print(f"Revoked {key.name}. Every process rejects it within {CACHE_SECONDS:.0f} seconds.")
    return 0


def _format_scopes(scopes: frozenset[Scope]) -> str:
    from service.application.api_keys import Scope

    return ",".join(scope for scope in Scope if scope in scopes)


def _format_minute(timestamp: datetime) -> str:
    return f"{timestamp:%Y-%m-%d %H:%M}"


def _usage_text(key: ApiKeyInfo) -> str:
    """Return when a key was last used or revoked."""
    if key.revoked:
        return f"revoked {_format_minute(key.revoked)}"
    return _format_minute(key.last_used) if key.last_used else "never"


def _key_json(key: ApiKeyInfo) -> dict[str, Any]:
    """Return a key as JSON, with times in UTC."""
    from service.application.api_keys import Scope

    times = {name: getattr(key, name) for name in ("created", "last_used", "revoked")}
    return {
        "name": key.name,
        "scopes": [scope for scope in Scope if scope in key.scopes],
        **asdict(key.limits),
        **{name: at and at.isoformat() for name, at in times.items()},
    }
