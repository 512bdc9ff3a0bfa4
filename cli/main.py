"""The parser of `palimpsest`, and the exit codes of its commands.

argparse, because the flags of `serve` are generated from the fields of the settings.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from cli.entry import installed_version
from cli.hparam_flags import in_flags
from cli.overview import overview
from cli.parser import CommandParser
from cli.terminal import err, print_json, strip_control_chars
from palimpsest import PalimpsestError as ClientError
from service.errors import Misconfigured, PalimpsestError, error_document

#: in the order of the list of commands; only the module of a given command is imported
COMMANDS = (
    "serve",
    "fetch",
    "generate",
    "compare",
    "chat",
    "edit",
    "edits",
    "revert",
    "import",
    "trace",
    "traces",
    "ledger",
    "versions",
    "models",
    "export",
    "evaluate",
    "evaluations",
    "report",
    "study",
    "tune",
    "train",
    "api",
    "worker",
    "mcp",
    "migrate",
    "keys",
    "prune",
    "audit",
    "jobs",
)
MODULES = {"import": "import_edits"}  #: of commands whose module has another name


class RootParser(CommandParser):
    """The parser of the command line. Its help is the overview of all commands."""

    def format_help(self) -> str:
        return overview()


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of a command; without one, or for another word, that of the whole command line."""
    parser = RootParser(prog="palimpsest")
    parser.add_argument("--version", action="version", version=f"palimpsest {installed_version()}")
    parser.set_defaults(json=False, resume_hint="")  # for the commands without them
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=CommandParser
    )
    for name in [command] if command in COMMANDS else COMMANDS:
        _module_of(name).add_parser(commands)
    if command not in COMMANDS:
        _module_of("completion").add_parser(commands, parser)
    return parser


def _module_of(command: str) -> Any:
    return import_module(f"cli.{MODULES.get(command, command)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: success. 1: the request or the job failed, or no service answers. 2: invalid command or configuration. 130:
    SIGINT.
    """
    words = sys.argv[1:] if argv is None else argv
    args = build_parser(words[0] if words else None).parse_args(words)
    try:
        return int(args.run(args))
    except ClientError as error:
        return report_error(args, client_error_json(error), [e.detail for e in error.errors])
    except PalimpsestError as error:
        report_error(args, error_document(error))
        return 2 if isinstance(error, Misconfigured) else 1
    except KeyboardInterrupt:
        if args.resume_hint:
            err.print(f"Stopped. {args.resume_hint}")
        return 130
    except BrokenPipeError:  # `palimpsest ledger | head`: the reader closed the pipe
        sys.stderr.close()
        return 0


def client_error_json(error: ClientError) -> dict[str, Any]:
    """Return an error of the client as `--json` prints it."""
    fields = {"code": error.code, "title": error.title, "detail": error.detail, "status": error.status}
    document: dict[str, Any] = {name: value for name, value in fields.items() if value not in (None, "")}
    if error.errors:
        document["errors"] = [{"field": e.field, "detail": e.detail} for e in error.errors]
    return document


def report_error(
    args: argparse.Namespace, error: Mapping[str, Any], field_details: Sequence[str] = ()
) -> int:
    """Print an error on stderr, and with --json also on stdout; return 1."""
    if args.json:
        print_json({"error": error})
    detail = str(error["detail"])
    lines = [detail, *(f"  {text}" for text in field_details if text and text not in detail)]
    err.print("palimpsest: " + strip_control_chars(in_flags("\n".join(lines))))
    return 1


if __name__ == "__main__":
    sys.exit(main())
