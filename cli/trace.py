"""`palimpsest trace`: trace one statement and draw its heat maps."""

from __future__ import annotations

import argparse
from typing import Any

from cli.client import add_client_command
from cli.flags import (
    add_chat_flags,
    add_separator_flag,
    add_version_flag,
    positive_int,
    prompt_or_messages,
    separator_of,
)
from cli.job_output import wait_for_job
from cli.trace_output import add_save_flag, image_path, print_trace
from palimpsest import Client


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add_client_command(
        commands,
        "trace",
        submit_trace,
        description="Show which hidden states carry a fact (causal tracing), as heat maps.",
    )
    parser.add_argument(
        "prompt", metavar="PROMPT", help="prompt that contains the subject, or {} in its place"
    )
    parser.add_argument(
        "subject", metavar="SUBJECT", help="subject of the fact; noise is added to its tokens"
    )
    parser.add_argument(
        "--target", metavar="TEXT", help="answer to trace (default: the most probable next token)"
    )
    parser.add_argument("--kinds", metavar="KIND,...", help="some of hidden,mlp,attn (default: all)")
    parser.add_argument("--samples", type=positive_int, metavar="N", help="number of noise samples")
    parser.add_argument(
        "--window", type=positive_int, metavar="N", help="number of layers restored at once for mlp and attn"
    )
    parser.add_argument(
        "--mentions",
        choices=("all", "last"),
        help="mentions of the subject to corrupt: all (default), or the last one only",
    )
    parser.add_argument(
        "--severed", action="store_true", help="also trace with the MLP and attention paths severed"
    )
    add_chat_flags(parser)
    add_separator_flag(parser)
    add_version_flag(parser)
    add_save_flag(parser)


def submit_trace(args: argparse.Namespace, client: Client) -> int:
    """Trace a statement, draw it, and save its picture."""
    save = image_path(args)
    fields: dict[str, Any] = {
        name: getattr(args, name) or None for name in ("target", "samples", "window", "severed", "mentions")
    }
    fields["separator"] = separator_of(args)
    if args.kinds:
        fields["kinds"] = args.kinds.split(",")
    fields |= prompt_or_messages(args)
    trace = client.trace(subject=args.subject, version=args.version, wait=False, **fields)
    return print_trace(args, client, wait_for_job(client, trace), save)
