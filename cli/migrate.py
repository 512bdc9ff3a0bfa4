"""`palimpsest migrate`: bring the database to what this release needs. Every process does so as it starts; one that does
it alone shows what it did, before the others are started."""

from __future__ import annotations

import argparse
from contextlib import closing

from cli.flags import read_settings
from cli.logs import log_to_stderr
from cli.signals import stopped_by
from cli.terminal import out, print_json
from cli.wait_for_dependencies import wait_for
from service.bootstrap import wire
from service.settings import Settings


def run(args: argparse.Namespace) -> int:
    """From the revision that is there to the newest, or to the one that was asked for."""
    settings = read_settings(args, Settings)
    log_to_stderr(settings.log_format, settings.log_level)
    with stopped_by() as stop, closing(wire(settings)) as wired:
        found: list[str | None] = []
        if not wait_for(lambda: found.append(wired.database.revision()), stop):
            return 0
        wired.database.migrate(args.to)
        before, now = found[0], wired.database.revision()
    if args.json:
        print_json({"before": before, "now": now})
    elif before == now:
        out.print(f"The database is at {now} already.")
    else:
        was, is_ = (f"at {revision}" if revision else "empty" for revision in (before, now))
        out.print(f"The database was {was} and is {is_} now.")
    return 0
