"""`palimpsest edit --file`: check the edits of a CSV file line by line, and apply them as one batch."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from cli.edit_output import fact_text, stated_text
from cli.flags import parse_columns
from cli.job_output import JobJson, failure_reason
from cli.terminal import err, format_list, format_seconds, out, print_json, progress_bar, strip_control_chars
from palimpsest import Client, EditRequest, EditTable, TableLine
from service.errors import InvalidInput
from service.kit.answer import answer_object
from service.kit.time_estimate import TimeEstimate

PORTION = 250  #: edits of one request: less than may wait at once
PROMPTS_AT_ONCE = 16  #: whose present answers one request asks for
ANSWER_TOKENS = 8  #: of a present answer
APPLIED = ("applied", "superseded")


def edit_from_file(args: argparse.Namespace, client: Client, options: dict[str, Any]) -> int:
    """Check the edits of a file, and apply them unless `--check` is given. `options`: fields of every edit."""
    table = client.preview_edits(read_table(Path(args.file)), parse_columns(args) or None)
    faulty = [line for line in table.items if line.error is not None]
    if args.check:
        return _show_table(args, client, table)
    if faulty:
        for line in faulty:
            err.print(strip_control_chars(f"{args.file}: {fault_text(line)}"))
        raise InvalidInput(
            f"{len(faulty)} of {len(table.items)} lines cannot be edits: nothing was submitted. Correct them, and see the others "
            "with --check."
        )
    batch = args.batch or batch_of(Path(args.file))
    edits = [cast(EditRequest, {**(line.edit or {}), **options}) for line in table.items]
    if table.seconds_per_edit:
        expected = format_seconds(table.seconds_per_edit * len(edits))
        err.print(
            f"{len(edits)} edits as the batch {batch}: about {expected}, as long as the last ones took."
        )
    return _report(args, batch, _apply_all(client, edits, batch))


def read_table(path: Path) -> str:
    """Return the text of a file. Raises InvalidInput if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise InvalidInput(f"the file {str(path)!r} cannot be read: {error}") from None


def batch_of(path: Path) -> str:
    """Return the name of a batch made of that of a file: `my corrections.csv` -> `my-corrections`."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._")[:64]
    if not name:
        raise InvalidInput(f"the name of {path.name!r} is no name of a batch: give one with --batch.")
    return name


def fault_text(line: TableLine) -> str:
    """Return what is wrong with a line."""
    error = line.error or {}
    place = f", column {error['column']!r}" if error.get("column") else ""
    return f"line {line.line}{place}: {error.get('detail')}"


def _show_table(args: argparse.Namespace, client: Client, table: EditTable) -> int:
    """Print every line with what the model says now. Return 0 if all lines are valid."""
    valid = [line for line in table.items if line.error is None]
    answers = dict(_present_answers(client, valid))
    items = [{**line.raw, "answer": answers.get(line.line)} for line in table.items]
    if args.json:
        print_json(items)
    else:
        rows = [_row(line, answers.get(line.line)) for line in table.items]
        out.print(format_list(("line", "fact", "says now", "note"), rows, ("fact", "says now", "note")))
        err.print(f"{table.valid} of {len(table.items)} lines are valid; nothing was submitted.")
    return 0 if len(valid) == len(items) else 1


def _row(line: TableLine, answer: str | None) -> tuple[Any, ...]:
    fact = fact_text(line.edit) if line.edit else ""
    return line.line, fact, answer, f"✗ {fault_text(line).partition(': ')[2]}" if line.error else line.note


def _present_answers(client: Client, lines: Sequence[TableLine]) -> Iterator[tuple[int, str]]:
    """Yield the number of each line, and the object that the newest version gives for its prompt."""
    with progress_bar() as display:
        for start in range(0, len(lines), PROMPTS_AT_ONCE):
            display.update("ask the model", start, len(lines))
            some = lines[start : start + PROMPTS_AT_ONCE]
            prompts = [stated_text(line.edit or {}) for line in some]
            said = client.generate_many(prompts, max_new_tokens=ANSWER_TOKENS)
            yield from zip(
                (line.line for line in some), (answer_object(one.text) for one in said), strict=True
            )


def _apply_all(client: Client, edits: Sequence[EditRequest], batch: str) -> list[JobJson]:
    """Submit edits, show how many have ended until all have, and return them. They go on after Ctrl-C.

    A portion is submitted when the one before it has ended, so that the queue has room. Its key is made of its content:
    the same command continues after an interruption, and edits nothing twice.
    """
    estimate, ended = TimeEstimate(), list[JobJson]()
    try:
        with progress_bar() as display:
            for start in range(0, len(edits), PORTION):
                portion = edits[start : start + PORTION]
                content = json.dumps([batch, portion], sort_keys=True).encode()
                key = hashlib.sha256(content).hexdigest()
                for edit in client.edit_many(portion, batch=batch, key=key, wait=False):
                    share = len(ended) / len(edits)
                    display.update("edit", len(ended), len(edits), estimate.seconds_left(share))
                    ended.append(client.wait_for(edit).raw)
    except KeyboardInterrupt:
        err.print(
            f"What was submitted goes on in the service; the same command continues. See it: palimpsest edits --batch {batch}. "
            f"Revert or cancel all of it: palimpsest revert --batch {batch}"
        )
        raise
    return ended


def _report(args: argparse.Namespace, batch: str, edits: Sequence[JobJson]) -> int:
    """Print how the edits ended. Return 0 if all were applied, or measured as dry runs."""
    wanted = ("dry_run_passed",) if args.dry_run else APPLIED
    for edit in edits:
        if edit["status"] not in wanted:
            reason = failure_reason(edit) or f"see palimpsest edits show {edit['id']}"
            err.print(strip_control_chars(f"{fact_text(edit)}: {edit['status']}: {reason}"))
    counts = Counter(edit["status"] for edit in edits)
    if args.json:
        print_json(list(edits))
    else:
        out.print(", ".join(f"{count} {status}" for status, count in counts.items()) + ".")
        if any(counts[status] for status in APPLIED):
            out.print(f"Revert all of them with: palimpsest revert --batch {batch}")
    if counts["reverted"]:
        err.print("Some were made before and reverted since: to make them again, give another --batch.")
    return 0 if all(edit["status"] in wanted for edit in edits) or args.dry_run else 1
