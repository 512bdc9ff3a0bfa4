"""`palimpsest edit`: submit one edit, wait for it and print its measurements."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, get_args

from cli.client import add_client_command
from cli.edit_output import parse_hparam, print_edit_result
from cli.flags import (
    add_chat_flags,
    add_hparam_flag,
    add_separator_flag,
    prompt_or_messages,
    separator_of,
)
from cli.job_output import JobJson, failure_reason, wait_for_job
from cli.terminal import err, out, print_json, strip_control_chars
from palimpsest import Client
from service.methods.parameters import EditForm


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add_client_command(
        commands,
        "edit",
        submit_edit,
        description="Change a fact: edit the model so that PROMPT with SUBJECT continues with TARGET.",
    )
    parser.add_argument("subject", metavar="SUBJECT", help="subject of the fact, such as 'Eiffel Tower'")
    parser.add_argument(
        "prompt",
        metavar="PROMPT",
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


def submit_edit(args: argparse.Namespace, client: Client) -> int:
    """Submit an edit, wait for it and print its measurements."""
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
        "separator": separator_of(args),
        "objective": args.objective,
        "on_conflict": args.on_conflict,
        "form": args.form,
        "dry_run": args.dry_run or args.try_layers,
        "try_layers": args.try_layers or None,
        "hparams": dict(parse_hparam(text) for text in args.hparam or ()) or None,
        "probes": probe_choice(args.paraphrase, args.no_probes),
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
