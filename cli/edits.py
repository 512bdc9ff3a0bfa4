"""`edit`, `edits`, `revert`, `ledger`: facts changed, listed and restored through a running service."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any
from urllib.parse import quote

from cli.client import Client
from cli.screen import bar, err, lines, out, plain, table
from service.errors import InvalidInput

Resource = Mapping[str, Any]
LIVE = ("queued", "running")
PAGE = 200  # the most that the service gives at once


def hparam(text: str) -> tuple[str, Any]:
    """`layers=[1,2]` -> ("layers", [1, 2]); what is no JSON is a word."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InvalidInput(f"--hparam {text!r} is not of the form name=value, for example --hparam steps=20.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def follow(client: Client, resource: Resource) -> Resource:
    """Wait for the end of a job with a bar, and return it as it is then."""
    with bar() as shown:
        shown.show(str(resource["status"]), 0, 0)
        for event in client.follow(resource["links"]["events"]):
            if event.name == "progress":
                shown.show(event.data["phase"], event.data["done"], event.data["total"])
    return client.get(resource["links"]["self"])  # type: ignore[no-any-return]


def unfinished(what: str, ended: Resource) -> int:
    """Say why a job has no result; the exit code."""
    why = (ended.get("error") or {}).get("detail") or "no result."
    err.print(plain(f"The {what} {ended['id']} is {ended['status']}: {why}"))
    return 1


def request_of(args: argparse.Namespace) -> dict[str, Any]:
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
        body["hparams"] = dict(hparam(text) for text in args.hparam)
    if args.paraphrase:
        body["probes"] = {"paraphrase": args.paraphrase}
    return body


def edit(args: argparse.Namespace, client: Client) -> int:
    """Submit one edit, follow it, and show what it did."""
    ended = follow(client, client.post("/edits", request_of(args)))
    return report(ended)


def report(ended: Resource) -> int:
    """An ended edit in words: 0 when it did what was asked."""
    result = ended.get("result") or {}
    rows = list(measurements(result))
    if rows:
        out.print(table("", ("", "prompt", "object", "p before", "p after"), rows))
    if rewrite := result.get("rewrite"):
        out.print(lines({"said": rewrite.get("said"), "says": rewrite.get("says")}))
    superseded = result.get("supersedes") or []
    for other in result.get("conflicts") or []:
        what = "superseded" if other["edit"] in superseded else "in conflict"
        out.print(plain(f"{what}: {other['edit']}, {other['prompt']!r}: {other['target_new']}"))
    name, status = ended["id"], ended["status"]
    if ended.get("dry_run") and result:
        said = "it would land" if status == "evaluated" else f"it would be rejected: {result.get('reason')}"
        out.print(plain(f"Measured and thrown away, as asked; {said}."))
        return 0
    if status == "applied":
        out.print(f"Applied as version {ended['version']}. Take it back with: palimpsest revert {name}")
        return 0
    why = (ended.get("error") or {}).get("detail") or result.get("reason") or "see palimpsest edits"
    err.print(plain(f"The edit {name} is {status}: {why}"))
    return 1


def measurements(result: Resource) -> Iterator[tuple[Any, ...]]:
    """(what, prompt, object, before, after): both objects on the prompt, and on each probe the one that should win."""
    for what, objects in (
        ("rewrite", ("new", "true")),
        ("paraphrase", ("new",)),
        ("neighborhood", ("true",)),
    ):
        found = result.get(what) or []
        for one in [found] if isinstance(found, Mapping) else found:
            for kind in objects if one["new"] != one["true"] else objects[:1]:
                yield what, one["prompt"], one[kind], one["before"][kind], one["after"][kind]


def edits(args: argparse.Namespace, client: Client) -> int:
    """The newest edits."""
    found = client.items("/edits", status=args.status, subject=args.subject, limit=min(args.limit, PAGE))
    rows = [
        (e["id"], state(e), e.get("version"), e["subject"], e["prompt"], object_of(e))
        for e in islice(found, args.limit)
    ]
    if not rows:
        out.print("There are no edits.")
        return 0
    out.print(table("", ("id", "status", "version", "subject", "prompt", "new object"), rows))
    return 0


def state(edit: Resource) -> str:
    """What became of an edit, or would have."""
    return f"{edit['status']} (dry run)" if edit.get("dry_run") else str(edit["status"])


def object_of(told: Resource) -> str | None:
    """The new object of an edit or of a ledger's entry, or what is done to the true one."""
    objective = told.get("objective") or "write"
    if objective == "write":
        return told.get("target_new")
    true = told.get("resolved_true") or told.get("target_true") or "what it says"
    return f"{objective} {true}"


def revert(args: argparse.Namespace, client: Client) -> int:
    """Take an edit back, or cancel one that has not landed."""
    ended = client.delete(f"/edits/{quote(args.id, safe='')}")
    status = ended["status"]
    if status == "reverted":
        out.print(f"Reverted: version {ended['reverted_version']} is without {ended['id']}.")
    elif status in LIVE:
        out.print(f"{ended['id']} is being cancelled.")
    else:
        out.print(f"{ended['id']} is {status}; there is nothing to revert.")
    return 0


def ledger(args: argparse.Namespace, client: Client) -> int:
    """The ledger, oldest first; or whether it is whole."""
    if args.verify:
        return verify(client)
    rows = [
        (e["version"], e["kind"], e["edit_id"], *told(e), e["actor"], minute(e["at"]))
        for e in client.items("/ledger", limit=PAGE)
    ]
    if not rows:
        out.print("The ledger is empty: the model stands at version 0, the base.")
        return 0
    out.print(table("", ("version", "what", "edit", "subject", "new object", "who", "when (UTC)"), rows))
    return 0


def minute(at: str) -> str:
    """A time as a person reads it, in UTC."""
    return at[:16].replace("T", " ")


def told(entry: Resource) -> tuple[Any, Any]:
    """Subject and object of a ledger entry."""
    whole = {**(entry.get("body") or {}), **entry}
    return whole.get("subject"), object_of(whole)


def verify(client: Client) -> int:
    """0 when chain, factors and replicas agree."""
    found = client.get("/ledger/verify")
    out.print(lines({"entries": found.get("entries"), "head": found.get("head")}))
    if found["ok"]:
        out.print("The ledger is whole: every hash, every factor and every replica agrees.")
        return 0
    for finding in found["findings"]:
        err.print(plain(finding if isinstance(finding, str) else json.dumps(finding, ensure_ascii=False)))
    return 1
