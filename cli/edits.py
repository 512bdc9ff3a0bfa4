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
from cli.terminal import bar, cell, cut, err, gauge, lines, listing, out, plain, print_json, table
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
    if args.json:
        print_json(ended)
    else:
        report(ended)
        out.print(plain(became(ended)), end="")
    return verdict(ended)


def report(ended: Resource) -> None:
    """What an edit did to every prompt, and what it says now."""
    result = ended.get("result") or {}
    if result:
        out.print(measured(result))
    if rewrite := result.get("rewrite"):
        out.print(lines({"said": rewrite.get("said"), "says": rewrite.get("says")}))
    superseded = result.get("supersedes") or []
    for other in result.get("conflicts") or []:
        what = "superseded" if other["edit"] in superseded else "in conflict"
        out.print(plain(f"{what}: {other['edit']}, {other['prompt']!r}: {other['target_new']}"))


def became(ended: Resource) -> str:
    """Where an edit that did what was asked stands now; nothing for one that did not."""
    result, status = ended.get("result") or {}, ended["status"]
    if ended.get("dry_run") and result:
        said = "it would land" if status == "evaluated" else f"it would be rejected: {result.get('reason')}"
        return f"Measured and thrown away, as asked; {said}.\n"
    if status == "applied":
        return f"Applied as version {ended['version']}. Take it back with: palimpsest revert {ended['id']}\n"
    return ""


def verdict(ended: Resource) -> int:
    """0 when an edit did what was asked; 1, and why not on stderr."""
    result, status = ended.get("result") or {}, ended["status"]
    if status == "applied" or (ended.get("dry_run") and result):
        return 0
    why = (ended.get("error") or {}).get("detail") or result.get("reason") or "see palimpsest edits"
    err.print(plain(f"The edit {ended['id']} is {status}: {why}"))
    return 1


BAR = 14  # columns of a probability
OBJECT = 24  # and of an object, at most


def measured(result: Resource) -> Text:
    """Each prompt, and below it the probability of its objects before and after, as bars."""
    rows = [(what, cell(prompt), cell(name), *p) for what, prompt, name, *p in measurements(result)]
    wide = max((min(OBJECT, cell_len(name)) for _, _, name, *_ in rows), default=0)
    text, last = Text().append(f"{'':{wide}}  {'p before':<{BAR + 9}}p after", "bold"), ("", "")
    for what, prompt, name, before, after in rows:
        if (what, prompt) != last:
            text.append("\n").append(what, "bold").append(f": {prompt}")
        name, last = cut(name, wide), (what, prompt)
        text.append(f"\n{name}{' ' * (wide - cell_len(name))}  {_gauged(before)}  {_gauged(after).rstrip()}")
    return text


def _gauged(p: float | None) -> str:
    return f"{cell(p):<5}  {gauge(p, BAR) if p is not None else '':{BAR}}"


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
    asked = {"status": args.status, "subject": args.subject}
    found = newest(client, "/edits", args.limit, **asked)
    if args.json:
        print_json(found)
        return 0
    rows = [(e["id"], state(e), e.get("version"), minute(e.get("created")), fact(e)) for e in found]
    if not rows:
        out.print("There are no such edits." if any(asked.values()) else "There are no edits.")
        return 0
    out.print(listing(("id", "status", "version", "when (UTC)", "fact"), rows, ("fact",)))
    return 0


def show(args: argparse.Namespace, client: Client) -> int:
    """One edit: what it is, what it did, what the guard held it to."""
    edit = client.get(f"/edits/{quote(args.id, safe='')}")
    if args.json:
        print_json(edit)
        return 0
    result = edit.get("result") or {}
    known = {
        "edit": edit["id"],
        "status": state(edit),
        "fact": fact(edit),
        "method": edit.get("method"),
        "layers": ", ".join(map(str, result.get("layers") or ())) or None,
        "applied": edit.get("version") and f"as version {edit['version']}",
        "reverted": edit.get("reverted_version") and f"version {edit['reverted_version']} is without it",
        "superseded by": edit.get("superseded_by"),
        "by": edit.get("actor"),
        "when (UTC)": minute(edit.get("created")),
        "seconds": result.get("seconds"),
        "why": (edit.get("error") or {}).get("detail") or result.get("reason"),
    }
    out.print(lines(known))
    if result:
        out.print()
        report(edit)
        if checks := (result.get("guard") or {}).get("checks"):
            rows = [
                (c["name"], c["figure"], c["limit"], "passed" if c["passed"] else "failed") for c in checks
            ]
            out.print()
            out.print(table("", ("guard", "figure", "limit", ""), rows))
    return 0


def newest(client: Client, path: str, limit: int, **asked: Any) -> list[Any]:
    """So many items of a list, from its beginning."""
    return list(islice(client.items(path, **asked, limit=min(limit, PAGE)), limit))


def state(edit: Resource) -> str:
    """What became of an edit, or would have."""
    return f"{edit['status']} (dry run)" if edit.get("dry_run") else str(edit["status"])


def fact(told: Resource) -> str:
    """A fact in one line: the prompt with its subject, and the new object or what is done to the true one; a revert has neither."""
    sentence, made = filled(str(told.get("prompt") or "{}"), str(told.get("subject"))), object_of(told)
    return f"{sentence} → {made}" if made else sentence


def filled(prompt: str, subject: str) -> str:
    """A prompt with its subject in place."""
    return prompt.replace("{}", subject, 1)


def object_of(told: Resource) -> str | None:
    """The new object of an edit or of a ledger's entry, or what is done to the true one."""
    objective = told.get("objective") or "write"
    if objective == "write":
        return told.get("target_new")
    found = ((told.get("result") or {}).get("rewrite") or {}).get("true")
    return f"{objective} {told.get('resolved_true') or told.get('target_true') or found or 'what it says'}"


def revert(args: argparse.Namespace, client: Client) -> int:
    """Take an edit back, or cancel one that has not landed."""
    ended = client.delete(f"/edits/{quote(args.id, safe='')}")
    status = ended["status"]
    if args.json:
        print_json(ended)
    elif status == "reverted":
        out.print(f"Reverted: version {ended['reverted_version']} is without {ended['id']}.")
    elif status in LIVE:
        out.print(f"{ended['id']} is being cancelled.")
    else:
        out.print(f"{ended['id']} is {status}; there is nothing to revert.")
    return 0


def ledger(args: argparse.Namespace, client: Client) -> int:
    """The ledger, oldest first; or whether it is whole."""
    if args.verify:
        return verify(args, client)
    found = list(client.items("/ledger", limit=PAGE))
    if args.json:
        print_json(found)
        return 0
    rows = [
        (e["version"], e["kind"], e["edit_id"], minute(e["at"]), fact({**(e.get("body") or {}), **e}), e["actor"])
        for e in found
    ]  # fmt: skip
    if not rows:
        out.print("The ledger is empty: the model stands at version 0, the base.")
        return 0
    columns = ("version", "what", "edit", "when (UTC)", "fact", "who")
    out.print(listing(columns, rows, ("fact", "who")))
    return 0


def minute(at: str | None) -> str | None:
    """A time as a person reads it, in UTC."""
    return at and at[:16].replace("T", " ")


def verify(args: argparse.Namespace, client: Client) -> int:
    """0 when chain, factors and replicas agree."""
    found = client.get("/ledger/verify")
    if args.json:
        print_json(found)
        return 0 if found["ok"] else 1
    out.print(lines({"entries": found.get("entries"), "head": found.get("head")}))
    if found["ok"]:
        out.print("The ledger is whole: every hash, every factor and every replica agrees.")
        return 0
    for finding in found["findings"]:
        err.print(plain(finding if isinstance(finding, str) else json.dumps(finding, ensure_ascii=False)))
    return 1
