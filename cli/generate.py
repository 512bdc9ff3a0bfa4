"""`palimpsest generate`: continue a prompt with any version of the model."""

from __future__ import annotations

import argparse
import sys

from cli.client import add_client_command
from cli.flags import add_version_flag
from cli.sampling_flags import add_prompt, add_sampling_flags, sampling_options
from cli.terminal import err, print_json, strip_control_chars
from palimpsest import Client


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add_client_command(
        commands, "generate", generate, description="Continue a prompt with any version of the model."
    )
    add_prompt(parser)
    add_sampling_flags(parser)
    add_version_flag(parser)


def generate(args: argparse.Namespace, client: Client) -> int:
    """Print the prompt and its continuation token by token; with --json the complete response."""
    options = {"version": args.version, **sampling_options(args)}
    if args.json:
        print_json(client.generate(args.prompt, **options).raw)
        return 0
    started = False
    for token in client.stream(args.prompt, **options):
        if not started:  # only after the service has accepted the request
            _write(args.prompt)
            started = True
        elif token.reset:  # another worker took over and generates again from the prompt
            _write("\n" + args.prompt)
        _write(token.text)
        if token.finish_reason is not None:
            _write("\n")
            count = len(token.raw["choices"][0]["tokens"])
            err.print(f"version {token.version}, {count} tokens, {token.finish_reason}", style="dim")
    return 0


def _write(text: str) -> None:
    sys.stdout.write(strip_control_chars(text))
    sys.stdout.flush()
