"""`palimpsest audit`: verify the ledger in the database itself, and show or replace the key that signs it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cli.flags import add_command, add_json_flag, add_setting_flags, read_settings
from cli.ledger import add_anchor_flags, report_verification
from cli.overview import summary_of
from cli.terminal import err, format_pairs, out, print_json
from service.errors import Misconfigured
from service.settings import Settings

if TYPE_CHECKING:
    from service.db.database import Database

AuditCommand = Callable[[argparse.Namespace, Settings, "Database"], int]


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands."""
    parser = commands.add_parser(
        "audit",
        help=summary_of("audit"),
        description="Verify the ledger in the database itself, and show or replace the key that signs it.",
    )
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    verify = add_command(verbs, "verify", partial(run, verify_offline), "verify the ledger without a service")
    add_anchor_flags(verify)
    verify.add_argument(
        "--public-key",
        metavar="HEX",
        help="public key that the ledger must be signed with (default: that of this process's key)",
    )
    key = add_command(verbs, "key", partial(run, show_key), "show the id of the key and its public key")
    rotate = add_command(
        verbs, "rotate", partial(run, rotate_key), "replace the key; stop all processes first"
    )
    rotate.add_argument(
        "--new-key-file",
        type=Path,
        metavar="PATH",
        help="file with the new key (default: a new key, which replaces the file in the data folder)",
    )
    rotate.add_argument("--lost", action="store_true", help="replace a key that is lost")
    accept = add_command(
        verbs, "accept", partial(run, accept_ledger), "set the file of heads aside after a restore"
    )
    for verb in (verify, key, rotate, accept):
        add_json_flag(verb)
        add_setting_flags(
            verb.add_argument_group("database"), Settings, "data_dir", "database_url", "ledger_key"
        )


def run(command: AuditCommand, args: argparse.Namespace) -> int:
    """Run a command on the database."""
    from cli.existing_database import open_existing_database

    settings = read_settings(args, Settings)
    with closing(open_existing_database(settings)) as database:
        return command(args, settings, database)


def verify_offline(args: argparse.Namespace, _: Settings, database: Database) -> int:
    """Verify the ledger; return 0 when it is valid."""
    from service.application.ledger import LedgerService

    verification = LedgerService(database).verify(args.expect, args.expect_record, args.full, args.public_key)
    return report_verification(verification, args.json)


def show_key(args: argparse.Namespace, _: Settings, database: Database) -> int:
    """Print the id and the public key. The key itself is not printed."""
    key = {"id": database.signing_key.id, "public_key": database.signing_key.public_key}
    if args.json:
        print_json(key)
    else:
        out.print(format_pairs(key))
    return 0


def rotate_key(args: argparse.Namespace, settings: Settings, database: Database) -> int:
    """Replace the key. With --lost the old one is not needed."""
    from service.kit.signing import KEY_FILE, new_key_text, parse_key, write_key_file
    from service.ledger import audit

    path = settings.data_dir / KEY_FILE
    if args.new_key_file is None and settings.ledger_key is not None:
        raise Misconfigured(
            "the key is in PALIMPSEST_LEDGER_KEY: write the new one to a file, name it with --new-key-file."
        )
    text = args.new_key_file.read_text(encoding="ascii") if args.new_key_file else new_key_text()
    new_key = parse_key(text, str(args.new_key_file))
    if args.new_key_file is None:
        prepared = path.with_name(f"{KEY_FILE}.new")
        prepared.unlink(missing_ok=True)
        write_key_file(prepared, text)  # before the record, so that no crash loses the new key
    audit.rotate(database, new_key, lost=args.lost)
    if args.new_key_file is None:
        prepared.replace(path)
        err.print(f"{path} has the new key. Back it up, and start the processes again.")
    else:
        err.print("Give every process the new key as PALIMPSEST_LEDGER_KEY, and start them again.")
    if args.json:
        print_json({"id": new_key.id, "public_key": new_key.public_key})
    else:
        out.print(format_pairs({"id": new_key.id, "public_key": new_key.public_key}))
    return 0


def accept_ledger(args: argparse.Namespace, settings: Settings, database: Database) -> int:
    """Set the file of heads aside, and begin a new one with the present head."""
    from service.ledger import audit
    from service.ledger.head_file import HeadFile

    heads = HeadFile(settings.data_dir)
    heads.forget()
    with database.read_session() as session:
        newest = audit.newest_record(session)
    position = newest.position if newest else 0
    if newest is not None:
        heads.append({"at": newest.at.isoformat(), "position": newest.position, "record": newest.hash})
    if args.json:
        print_json({"position": position})
    else:
        out.print(f"Accepted the ledger up to audit record {position}.")
    return 0
