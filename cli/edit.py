"""`palimpsest edit`: submit one edit, or those of a file, wait and print the measurements."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, get_args

from cli.client import add_client_command
from cli.edit_file import edit_from_file
from cli.edit_output import parse_hparam, print_edit_result
from cli.flags import (
    add_chat_flags,
    add_column_flag,
    add_hparam_flag,
    add_separator_flag,
    prompt_or_messages,
    separator_of,
)
from cli.job_output import JobJson, failure_reason, wait_for_job
from cli.terminal import err, out, print_json, strip_control_chars
from palimpsest import Client
from service.errors import InvalidInput
from service.methods.parameters import EditForm


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add_client_command(
        commands,
        "edit",
        submit_edit,
        description="Change a fact: edit the model so that PROMPT with SUBJECT continues with TARGET. Or change the facts of a "
        "CSV file as one batch.",
    )
    parser.add_argument(
        "subject", metavar="SUBJECT", nargs="?", help="subject of the fact, such as 'Eiffel Tower'"
    )
    parser.add_argument(
        "prompt",
        metavar="PROMPT",
        nargs="?",
        help="prompt with {} for the subject: 'The {} is located in'; with --chat it may spell the subject",
    )
    parser.add_argument("target", metavar="TARGET", nargs="?", help="new object, such as 'Rome'")
    objective = parser.add_mutually_exclusive_group()
    objective.add_argument(
        "--erase", dest="objective", action="store_const", const="erase", help="lower the probability of the true object; takes no TARGET"
    )  # fmt: skip
    objective.add_argument(
        "--amplify", dest="objective", action="store_const", const="amplify", help="raise the probability of the true object; takes no TARGET"
    )  # fmt: skip
    parser.add_argument("--true", metavar="OBJECT", help="true object, which is measured too")
    parser.add_argument(
        "--on-conflict",
        choices=["report", "supersede", "reject"],
        help="what to do with an active edit of the same fact (default: report)",
    )
    parser.add_argument("--dry-run", action="store_true", help="measure the edit without applying it")
    parser.add_argument(
        "--try-layers",
        action="store_true",
        help="measure the edit at about six layers without applying it, and then in full at the best one",
    )
    parser.add_argument(
        "--paraphrase",
        metavar="PROMPT",
        action="append",
        help="another prompt to measure, in place of those that the service finds; repeatable",
    )
    parser.add_argument(
        "--no-probes",
        action="store_true",
        help="do not look for paraphrases and side effects: faster, and damage to other subjects is not seen",
    )
    add_chat_flags(parser)
    add_separator_flag(parser)
    parser.add_argument(
        "--form",
        choices=get_args(EditForm),
        help="weights: solve the edit into the weight of its layer; gated: look its change up where the subject stands "
        "(default: that of the service or the recipe)",
    )
    add_hparam_flag(parser)
    parser.add_argument(
        "--batch", metavar="NAME", help="name that several edits share, to list and to revert them together"
    )
    file = parser.add_argument_group("many facts")
    file.add_argument(
        "--file",
        metavar="FILE",
        help="CSV file with the columns subject, prompt and target_new, and if wanted target_true, paraphrases and neighbors; "
        "all of it becomes one batch, with the name of the file unless --batch gives another",
    )
    file.add_argument(
        "--check",
        action="store_true",
        help="with --file: show each line with what the model says now, and edit nothing",
    )
    add_column_flag(parser)


def submit_edit(args: argparse.Namespace, client: Client) -> int:
    """Submit an edit, or those of a file, wait and print the measurements."""
    if args.file is not None:
        return edit_from_file(args, client, fields_of_every_edit(args))
    if args.subject is None or args.prompt is None:
        raise InvalidInput("give SUBJECT, PROMPT and TARGET, or a CSV file with --file.")
    if args.check or args.column:
        raise InvalidInput("--check and --column belong to --file: leave them out.")
    edit = wait_for_job(client, client.edit(**edit_fields(args), wait=False)).raw
    if args.json:
        print_json(edit)
    else:
        print_edit_result(edit)
        out.print(strip_control_chars(outcome_message(edit)), end="")
    return exit_code(edit)


def edit_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of the request that the flags set."""
    fields = {
        "subject": args.subject,
        **prompt_or_messages(args),
        "target_new": args.target,
        "target_true": args.true,
        "objective": args.objective,
        "batch": args.batch,
        "dry_run": args.dry_run or args.try_layers,
        "try_layers": args.try_layers or None,
        "probes": probe_choice(args.paraphrase, args.no_probes),
        **_shared_fields(args),
    }
    return {name: value for name, value in fields.items() if value is not None}


def _shared_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields that one edit and every edit of a file may have."""
    return {
        "separator": separator_of(args),
        "on_conflict": args.on_conflict,
        "form": args.form,
        "hparams": dict(parse_hparam(text) for text in args.hparam or ()) or None,
    }


def fields_of_every_edit(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields that the flags set for every edit of a file. Raises InvalidInput for flags of one edit."""
    names = ("subject", "objective", "true", "paraphrase", "try_layers", "chat", "answer")
    given = [name for name in names if getattr(args, name)]
    if given:
        raise InvalidInput(f"{given[0]} belongs to one edit: leave it out, or leave out --file.")
    fields = {
        **_shared_fields(args),
        "dry_run": args.dry_run or None,
        "probes": probe_choice(None, args.no_probes),
    }
    return {name: value for name, value in fields.items() if value is not None}


def probe_choice(paraphrases: Sequence[str] | None, none_found: bool) -> dict[str, Any] | None:
    """Return the `probes` of the request; None for the default of the service, which finds all of them."""
    if not paraphrases and not none_found:
        return None
    return {"paraphrase": list(paraphrases or ()), "neighborhood": [] if none_found else "auto"}


def outcome_message(edit: JobJson) -> str:
    """Return the outcome of an edit that was applied or measured as a dry run; empty otherwise."""
    result, status = edit.get("result") or {}, edit["status"]
    if edit.get("dry_run") and result:
        if status == "dry_run_passed":
            return "Dry run: the edit would be applied.\n"
        return f"Dry run: the edit would be rejected: {result.get('reason')}\n"
    if status == "applied":
        return f"Applied as version {edit['version']}. Revert it with: palimpsest revert {edit['id']}\n"
    return ""


def exit_code(edit: JobJson) -> int:
    """Return 0 for an edit that was applied or measured as a dry run; otherwise print the reason and return 1."""
    if edit["status"] == "applied" or (edit.get("dry_run") and edit.get("result")):
        return 0
    reason = failure_reason(edit) or f"see palimpsest edits show {edit['id']}"
    err.print(strip_control_chars(f"edit {edit['id']} is {edit['status']}: {reason}"))
    return 1
