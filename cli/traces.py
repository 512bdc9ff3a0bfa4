"""`palimpsest traces` and `palimpsest traces show`: list traces, and draw one again."""

from __future__ import annotations

import argparse

from cli.client import add_client_command, add_show_command
from cli.edit_output import stated_text
from cli.flags import add_limit_flag
from cli.job_output import format_minute
from cli.terminal import format_list, out, print_json
from cli.trace_output import add_save_flag, image_path, print_trace
from palimpsest import Client


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands."""
    parser = add_client_command(commands, "traces", list_traces, description="List traces, newest first.")
    add_limit_flag(parser)
    add_save_flag(add_show_command(parser, show_trace, "draw a trace again", "traces"))


def list_traces(args: argparse.Namespace, client: Client) -> int:
    """Print the newest traces."""
    items = [trace.raw for trace in client.traces(limit=args.limit)]
    if args.json:
        print_json(items)
        return 0
    if not items:
        out.print("There are no traces.")
        return 0
    rows = [
        (t["id"], t["status"], t.get("version"), format_minute(t["created"]), stated_text(t["request"]))
        for t in items
    ]  # fmt: skip
    out.print(format_list(("id", "status", "version", "created (UTC)", "prompt"), rows, ("prompt",)))
    return 0


def show_trace(args: argparse.Namespace, client: Client) -> int:
    """Draw a trace again."""
    save = image_path(args)
    return print_trace(args, client, client.get_trace(args.id), save)
