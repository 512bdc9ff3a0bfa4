"""`palimpsest prune`: delete expired jobs and idempotency keys now, directly in the database."""

from __future__ import annotations

import argparse

from cli.flags import add_command, add_json_flag, add_setting_flags, read_settings
from cli.terminal import out, print_json
from service.settings import Settings


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "prune",
        run,
        description="Delete finished jobs that are not in the ledger, idempotency keys, and attestations of workers that are gone, "
        "after their retention, directly in the database. Workers also do this while they run. Edits in the ledger are never deleted.",
    )
    parser.add_argument("--dry-run", action="store_true", help="only count the rows that would be deleted")
    add_json_flag(parser)
    retentions = (name for name in Settings.model_fields if name.endswith("_retention_days"))
    add_setting_flags(parser, Settings, "data_dir", "database_url", *retentions)


def run(args: argparse.Namespace) -> int:
    """Delete or count the expired rows, and print their numbers."""
    from cli.existing_database import open_existing_database
    from service.bootstrap import retention
    from service.jobs.retention import Pruner

    settings = read_settings(args, Settings)
    database = open_existing_database(settings)
    try:
        database.migrate()
        pruner = Pruner(database, retention(settings))
        rows = pruner.count() if args.dry_run else pruner.prune_all()
    finally:
        database.close()
    jobs, keys, attestations = rows["jobs"], rows["idempotency"], rows["attestations"]
    if args.json:
        counts = {"jobs": jobs, "idempotency_keys": keys, "attestations": attestations}
        print_json({"dry_run": args.dry_run, **counts})
    else:
        verb = "Would delete" if args.dry_run else "Deleted"
        out.print(f"{verb} {jobs} jobs, {keys} idempotency keys and {attestations} attestations.")
    return 0
