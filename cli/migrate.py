"""`palimpsest migrate`: migrate the database, and print the revisions before and after.

Every process of the service migrates the database when it starts. This command does it as a separate step of a
deployment.
"""

from __future__ import annotations

import argparse
from contextlib import closing

from cli.flags import add_command, add_json_flag, add_setting_flags, read_settings
from cli.terminal import out, print_json
from service.settings import Settings


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "migrate",
        run,
        description="Migrate the database to the schema of this release. The processes of the service also do this when they start.",
    )
    parser.add_argument(
        "--to",
        metavar="REVISION",
        default="head",
        help="target revision, which may be an older one (default: head)",
    )
    parser.add_argument(
        "--grant-to",
        metavar="ROLE",
        help="PostgreSQL role of the service: created if it is missing, and given the rights to read and write rows only",
    )
    add_json_flag(parser)
    add_setting_flags(parser, Settings)


def run(args: argparse.Namespace) -> int:
    """Migrate the database, and print the revisions before and after."""
    from cli.logs import log_to_stderr
    from cli.signals import stop_on_signals
    from cli.wait_for_dependencies import wait_for_dependency
    from service.bootstrap import build_container
    from service.db.grants import grant_to_role

    settings = read_settings(args, Settings)
    log_to_stderr(settings.log_format, settings.log_level)
    with stop_on_signals() as stop, closing(build_container(settings)) as container:
        revisions: list[str | None] = []
        if not wait_for_dependency(lambda: revisions.append(container.database.revision()), stop):
            return 0
        container.database.migrate(args.to)
        if args.grant_to is not None:
            grant_to_role(container.database, args.grant_to, settings.role_password)
        before, now = revisions[0], container.database.revision()
    if args.json:
        print_json({"before": before, "now": now})
    elif before == now:
        out.print(f"The database is already at revision {now}.")
    else:
        out.print(f"Migrated the database from {before or 'empty'} to {now or 'empty'}.")
    return 0
