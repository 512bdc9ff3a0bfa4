"""Write the ledger as a report: what was changed, by whom and when, to what effect, and whether it verifies.

python examples/audit_report.py audit.md
python examples/audit_report.py audit.html
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from palimpsest import Client, Edit, Entry

COLUMNS = ("version", "when (UTC)", "who", "what", "subject", "prompt", "from", "to", "effect", "hash")


def ledger_rows(client: Client) -> list[tuple[str, ...]]:
    """Return a row per ledger entry, oldest first. A reverted edit has two."""
    edits: dict[str, Edit] = {}
    rows = []
    for entry in client.ledger():
        if entry.edit_id not in edits:
            edits[entry.edit_id] = client.get_edit(entry.edit_id)
        rows.append(ledger_row(entry, edits[entry.edit_id]))
    return rows


def ledger_row(entry: Entry, edit: Edit) -> tuple[str, ...]:
    when = entry.at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S") if entry.at else ""
    old = edit.target_true or (edit.result or {}).get("target_true") or ""
    new = edit.target_new or f"({edit.objective})"
    if entry.kind == "revert":
        old, new = new, "(as without it)"
    return (
        str(entry.version), when, entry.actor, entry.kind, edit.subject, edit.prompt, str(old), str(new),
        describe_effect(edit) if entry.kind == "apply" else "", entry.hash[:12],
    )  # fmt: skip


def describe_effect(edit: Edit) -> str:
    """Return the probability of the new object before and after, and the number of regressed edits."""
    if edit.before is None or edit.after is None:
        return ""
    regressed = (edit.result or {}).get("regressed_edits") or ()
    return f"{edit.before:.3f} -> {edit.after:.3f}" + (f", {len(regressed)} regressed" if regressed else "")


def build_summary(client: Client) -> list[str]:
    """Return the lines above the table."""
    [model] = client.models()
    verification = client.verify()
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
    verification_text = "every hash, every factor and every worker agrees" if verification else "NOT VERIFIED"
    return [
        f"Model {model.name}, base weights {model.fingerprint[:12]}; as of {now} UTC.",
        f"{verification.entries} entries, version {verification.head}, {model.active_edits} edits active.",
        f"Ledger: {verification_text}.",
        *(f"Finding: {finding}" for finding in verification.findings),
    ]


def markdown(summary: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |"

    head = [line(COLUMNS), line(["---"] * len(COLUMNS))]
    return "\n".join(
        ["# Audit of the ledger", "", *(f"- {one}" for one in summary), "", *head, *map(line, rows), ""]
    )


def html(summary: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    style = "body{font-family:sans-serif;margin:2em}td,th{text-align:left;padding:.3em .8em;border-bottom:1px solid #ccc}"
    paragraphs = "".join(f"<p>{escape(one)}</p>" for one in summary)
    table = line(COLUMNS, "th") + "".join(line(row, "td") for row in rows)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Audit of the ledger</title>'
        f"<style>{style}</style><h1>Audit of the ledger</h1>{paragraphs}<table>{table}</table></html>\n"
    )


def main() -> None:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "audit.md")
    with Client() as client:
        summary, rows = build_summary(client), ledger_rows(client)
    text = html(summary, rows) if path.suffix in (".html", ".htm") else markdown(summary, rows)
    path.write_text(text, encoding="utf-8")
    print(f"{path}: {summary[1]} {summary[2]}")


if __name__ == "__main__":
    main()
