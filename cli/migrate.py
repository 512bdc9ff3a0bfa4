"""`palimpsest migrate`: bring the database to what this release needs. Every process does so as it starts; one that does
it alone shows what it did, before the others are started."""

from __future__ import annotations

import argparse
from contextlib import closing

from cli.flags import read_settings
from cli.logs import log_to_stderr
from cli.signals import stop_on_signals
from cli.terminal import out, print_json
from cli.wait_for_dependencies import wait_for_dependency
from service.bootstrap import build_container
from service.settings import Settings


def run(args: argparse.Namespace) -> int:
    """From the revision that is there to the newest, or to the one that was asked for."""
    settings = read_settings(args, Settings)
    log_to_stderr(settings.log_format, settings.log_level)
    with stop_on_signals() as stop, closing(build_container(settings)) as container:
        revisions: list[str | None] = []
        if not wait_for_dependency(lambda: revisions.append(container.database.revision()), stop):
            return 0
        container.database.migrate(args.to)
        before, now = revisions[0], container.database.revision()
    if args.json:
        print_json({"before": before, "now": now})
    elif before == now:
        out.print(f"The database is at {now} already.")
    else:
        old_text, new_text = (f"at {revision}" if revision else "empty" for revision in (before, now))
        out.print(f"The database was {old_text} and is {new_text} now.")
    return 0
