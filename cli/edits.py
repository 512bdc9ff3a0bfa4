"""`edit`, `edits`, `edits show`, `revert`, `ledger`: facts changed, looked at and restored through a running service."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any
from urllib.parse import quote

from rich.cells import cell_len
from rich.text import Text

from cli.client import Client
from cli.terminal import (
    err,
    format_cell,
    format_list,
    format_pairs,
    out,
    print_json,
    probability_bar,
    progress_bar,
    strip_control_chars,
    table,
    truncate,
)
from service.errors import InvalidInput

Resource = Mapping[str, Any]
UNFINISHED_STATUSES = ("queued", "running")
PAGE_SIZE = 200  # the most that the service gives at once


def parse_hparam(text: str) -> tuple[str, Any]:
    """`layers=[1,2]` -> ("layers", [1, 2]); what is no JSON is a word."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InvalidInput(f"--hparam {text!r} is not of the form name=value, for example --hparam steps=20.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def wait_for_job(client: Client, resource: Resource) -> Resource:
    """Wait for the end of a job with a bar, and return it as it is then."""
    with progress_bar() as display:
        display.update(str(resource["status"]), 0, 0)
        for event in client.follow_events(resource["links"]["events"]):
            if event.name == "progress":
                display.update(event.data["phase"], event.data["done"], event.data["total"])
    return client.get(resource["links"]["self"])  # type: ignore[no-any-return]


def report_job_failure(noun: str, job: Resource) -> int:
    """Say why a job has no result; the exit code."""
    reason = (job.get("error") or {}).get("detail") or "no result."
    err.print(strip_control_chars(f"The {noun} {job['id']} is {job['status']}: {reason}"))
    return 1


def edit_request_body(args: argparse.Namespace) -> dict[str, Any]:
    """The body of POST /edits."""
    body: dict[str, Any] = {
        "subject": args.subject,
        "prompt": args.prompt,
        "dry_run": args.dry_run,
    }
    if args.target is not None:
        body["target_new"] = args.target
    if args.objective:
        body["objective"] = args.objective
    if args.true:
        body["target_true"] = args.true
    if args.on_conflict:
        body["on_conflict"] = args.on_conflict
    if args.hparam:
        body["hparams"] = dict(parse_hparam(text) for text in args.hparam)
    if args.paraphrase:
        body["probes"] = {"paraphrase": args.paraphrase}
    return body


def submit_edit(args: argparse.Namespace, client: Client) -> int:
    """Submit one edit, follow it, and show what it did."""
    resource = wait_for_job(client, client.post("/edits", edit_request_body(args)))
    if args.json:
        print_json(resource)
    else:
        print_edit_result(resource)
        out.print(strip_control_chars(outcome_message(resource)), end="")
    return exit_code(resource)


def print_edit_result(resource: Resource) -> None:
    """What an edit did to every prompt, and what it says now."""
    result = resource.get("result") or {}
    if result:
        out.print(measurement_table(result))
    if rewrite := result.get("rewrite"):
        out.print(format_pairs({"before": rewrite.get("text_before"), "after": rewrite.get("text_after")}))
    superseded_ids = result.get("supersedes") or []
    for other in result.get("conflicts") or []:
        relation = "superseded" if other["edit"] in superseded_ids else "in conflict"
        out.print(
            strip_control_chars(f"{relation}: {other['edit']}, {other['prompt']!r}: {other['target_new']}")
        )


def outcome_message(resource: Resource) -> str:
    """Where an edit that did what was asked stands now; nothing for one that did not."""
    result, status = resource.get("result") or {}, resource["status"]
    if resource.get("dry_run") and result:
        outcome = (
            "it would land" if status == "dry_run_passed" else f"it would be rejected: {result.get('reason')}"
        )
        return f"Measured and thrown away, as asked; {outcome}.\n"
    if status == "applied":
        return f"Applied as version {resource['version']}. Take it back with: palimpsest revert {resource['id']}\n"
    return ""


def exit_code(resource: Resource) -> int:
    """0 when an edit did what was asked; 1, and why not on stderr."""
    result, status = resource.get("result") or {}, resource["status"]
    if status == "applied" or (resource.get("dry_run") and result):
        return 0
    reason = (resource.get("error") or {}).get("detail") or result.get("reason") or "see palimpsest edits"
    err.print(strip_control_chars(f"The edit {resource['id']} is {status}: {reason}"))
    return 1


BAR_WIDTH = 14  # columns of a probability
MAX_OBJECT_WIDTH = 24  # and of an object, at most


def measurement_table(result: Resource) -> Text:
    """Each prompt, and below it the probability of its objects before and after, as bars."""
    rows = [
        (what, format_cell(prompt), format_cell(name), *p)
        for what, prompt, name, *p in iter_measurements(result)
    ]
    width = max((min(MAX_OBJECT_WIDTH, cell_len(name)) for _, _, name, *_ in rows), default=0)
    text, last = Text().append(f"{'':{width}}  {'p before':<{BAR_WIDTH + 9}}p after", "bold"), ("", "")
    for what, prompt, name, before, after in rows:
        if (what, prompt) != last:
            text.append("\n").append(what, "bold").append(f": {prompt}")
        name, last = truncate(name, width), (what, prompt)
        text.append(
            f"\n{name}{' ' * (width - cell_len(name))}  {_format_probability(before)}  {_format_probability(after).rstrip()}"
        )
    return text


def _format_probability(p: float | None) -> str:
    return f"{format_cell(p):<5}  {probability_bar(p, BAR_WIDTH) if p is not None else '':{BAR_WIDTH}}"


def iter_measurements(result: Resource) -> Iterator[tuple[Any, ...]]:
    """(what, prompt, object, before, after): both objects on the prompt, and on each probe the one that should win."""
    for probe_kind, objects in (
        ("rewrite", ("new", "true")),
        ("paraphrase", ("new",)),
        ("neighborhood", ("true",)),
    ):
        probes = result.get(probe_kind) or []
        for probe in [probes] if isinstance(probes, Mapping) else probes:
            for kind in objects if probe["new"] != probe["true"] else objects[:1]:
                yield probe_kind, probe["prompt"], probe[kind], probe["before"][kind], probe["after"][kind]


def list_edits(args: argparse.Namespace, client: Client) -> int:
    """The newest edits."""
    filters = {"status": args.status, "subject": args.subject}
    items = fetch_newest(client, "/edits", args.limit, **filters)
    if args.json:
        print_json(items)
        return 0
    rows = [
        (e["id"], status_text(e), e.get("version"), format_minute(e.get("created")), fact_text(e))
        for e in items
    ]
    if not rows:
        out.print("There are no such edits." if any(filters.values()) else "There are no edits.")
        return 0
    out.print(format_list(("id", "status", "version", "when (UTC)", "fact"), rows, ("fact",)))
    return 0


def show_edit(args: argparse.Namespace, client: Client) -> int:
    """One edit: what it is, what it did, what the guard held it to."""
    edit = client.get(f"/edits/{quote(args.id, safe='')}")
    if args.json:
        print_json(edit)
        return 0
    result = edit.get("result") or {}
    details = {
        "edit": edit["id"],
        "status": status_text(edit),
        "fact": fact_text(edit),
        "method": edit.get("method"),
        "layers": ", ".join(map(str, result.get("layers") or ())) or None,
        "applied": edit.get("version") and f"as version {edit['version']}",
        "reverted": edit.get("reverted_version") and f"version {edit['reverted_version']} is without it",
        "superseded by": edit.get("superseded_by"),
        "by": edit.get("actor"),
        "when (UTC)": format_minute(edit.get("created")),
        "seconds": result.get("seconds"),
        "why": (edit.get("error") or {}).get("detail") or result.get("reason"),
    }
    out.print(format_pairs(details))
    if result:
        out.print()
        print_edit_result(edit)
        if checks := (result.get("guard") or {}).get("checks"):
            rows = [
                (c["name"], c["figure"], c["limit"], "passed" if c["passed"] else "failed") for c in checks
            ]
            out.print()
            out.print(table("", ("guard", "figure", "limit", ""), rows))
    return 0


def fetch_newest(client: Client, path: str, limit: int, **filters: Any) -> list[Any]:
    """So many items of a list, from its beginning."""
    return list(islice(client.iter_items(path, **filters, limit=min(limit, PAGE_SIZE)), limit))


def status_text(edit: Resource) -> str:
    """What became of an edit, or would have."""
    return f"{edit['status']} (dry run)" if edit.get("dry_run") else str(edit["status"])


def fact_text(item: Resource) -> str:
    """A fact in one line: the prompt with its subject, and the new object or what is done to the true one; a revert has neither."""
    sentence, new_object = (
        prompt_with_subject(str(item.get("prompt") or "{}"), str(item.get("subject"))),
        object_text(item),
    )
    return f"{sentence} → {new_object}" if new_object else sentence


def prompt_with_subject(prompt: str, subject: str) -> str:
    """A prompt with its subject in place."""
    return prompt.replace("{}", subject, 1)


def object_text(item: Resource) -> str | None:
    """The new object of an edit or of a ledger's entry, or what is done to the true one."""
    objective = item.get("objective") or "write"
    if objective == "write":
        return item.get("target_new")
    true_object = ((item.get("result") or {}).get("rewrite") or {}).get("true")
    return (
        f"{objective} {item.get('resolved_true') or item.get('target_true') or true_object or 'what it says'}"
    )


def revert_edit(args: argparse.Namespace, client: Client) -> int:
    """Take an edit back, or cancel one that has not landed."""
    resource = client.delete(f"/edits/{quote(args.id, safe='')}")
    status = resource["status"]
    if args.json:
        print_json(resource)
    elif status == "reverted":
        out.print(f"Reverted: version {resource['reverted_version']} is without {resource['id']}.")
    elif status in UNFINISHED_STATUSES:
        out.print(f"{resource['id']} is being cancelled.")
    else:
        out.print(f"{resource['id']} is {status}; there is nothing to revert.")
    return 0


def show_ledger(args: argparse.Namespace, client: Client) -> int:
    """The ledger, oldest first; or whether it is whole."""
    if args.verify:
        return verify_ledger(args, client)
    entries = list(client.iter_items("/ledger", limit=PAGE_SIZE))
    if args.json:
        print_json(entries)
        return 0
    rows = [
        (e["version"], e["kind"], e["edit_id"], format_minute(e["at"]), fact_text({**(e.get("body") or {}), **e}), e["actor"])
        for e in entries
    ]  # fmt: skip
    if not rows:
        out.print("The ledger is empty: the model stands at version 0, the base.")
        return 0
    columns = ("version", "what", "edit", "when (UTC)", "fact", "who")
    out.print(format_list(columns, rows, ("fact", "who")))
    return 0


def format_minute(timestamp: str | None) -> str | None:
    """A time as a person reads it, in UTC."""
    return timestamp and timestamp[:16].replace("T", " ")


def verify_ledger(args: argparse.Namespace, client: Client) -> int:
    """0 when chain, factors and replicas agree."""
    verification = client.get("/ledger/verify")
    if args.json:
        print_json(verification)
        return 0 if verification["ok"] else 1
    out.print(format_pairs({"entries": verification.get("entries"), "head": verification.get("head")}))
    if verification["ok"]:
        out.print("The ledger is whole: every hash, every factor and every replica agrees.")
        return 0
    for finding in verification["findings"]:
        err.print(
            strip_control_chars(
                finding if isinstance(finding, str) else json.dumps(finding, ensure_ascii=False)
            )
        )
    return 1
