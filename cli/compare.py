"""`palimpsest compare`: continue a prompt with two versions, side by side."""

from __future__ import annotations

import argparse

from cli.client import add_client_command
from cli.flags import parse_version
from cli.sampling_flags import add_prompt, add_sampling_flags, sampling_options
from cli.terminal import out, print_json, strip_control_chars, table
from palimpsest import Client


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add_client_command(
        commands,
        "compare",
        compare,
        description="Continue a prompt with two versions, and list the next tokens whose probabilities differ most.",
    )
    add_prompt(parser)
    add_sampling_flags(parser)
    parser.add_argument(
        "--versions",
        type=parse_version,
        nargs=2,
        default=["base", "head"],
        metavar=("A", "B"),
        help="the two versions: head, base, a number or a name (default: base head)",
    )


def compare(args: argparse.Namespace, client: Client) -> int:
    """Print both continuations and the next tokens whose probabilities differ most."""
    comparison = client.compare(args.prompt, args.versions, **sampling_options(args))
    if args.json:
        print_json(comparison.raw)
        return 0
    names = [f"version {side.version}" for side in comparison.sides]
    for name, side in zip(names, comparison.sides, strict=True):
        out.print(f"{name}: {strip_control_chars(args.prompt)}{strip_control_chars(side.text)}")
    rows = [(token.token, *token.p, token.p[1] - token.p[0]) for token in comparison.next_tokens]
    out.print()
    out.print(table("", ("next token", *names, "change"), rows))
    out.print()
    out.print(f"total variation distance {comparison.total_variation:.3f}")
    return 0
