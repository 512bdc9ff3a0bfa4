"""Edit the facts of a CSV file, with a progress bar and a report of applied and rejected edits.

    python examples/bulk_edit.py examples/landmarks.csv --report report.csv

The columns are subject, prompt, target_new and, if known, target_true. Every row has an idempotency key made of its
content and the name of the run: run again after an interruption, the script continues, and no edit is made twice.
Rejected rows stay rejected; to retry them, or to make reverted edits again, give the run another name (--run).
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from palimpsest import Client, Edit, InvalidRequest

MAX_PENDING = 32  # edits that wait at once: enough for a batch, and a small part of the queue

Row = dict[str, str]


@dataclass(frozen=True)
class Outcome:
    """The result of a row: an edit that has ended, or the reason why there is none."""

    row: Row
    edit: Edit | None
    reason: str = ""

    @property
    def status(self) -> str:
        return self.edit.status if self.edit else "invalid"

    @property
    def ok(self) -> bool:
        return self.status in ("applied", "superseded")

    def csv_row(self) -> list[object]:
        edit = self.edit
        figures = [edit.version, edit.before, edit.after, edit.id] if edit else [None] * 4
        return [self.row.get("subject"), self.row.get("target_new"), self.status, *figures, self.reason]


def read_rows(path: Path) -> list[Row]:
    """Return the rows without empty cells."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        return [{name: text for name, text in row.items() if text} for row in csv.DictReader(file)]


def idempotency_key(run: str, row: Row, guard: dict[str, float]) -> str:
    """Return a key that is equal for equal requests of one run, and different otherwise."""
    return hashlib.sha256(json.dumps([run, row, guard], sort_keys=True).encode()).hexdigest()


def submit(client: Client, row: Row, run: str, guard: dict[str, float]) -> Outcome:
    """Submit the edit of a row; return the queued edit, or the reason why the row is invalid."""
    try:
        edit = client.edit(
            row.get("subject", ""),
            row.get("prompt", ""),
            row.get("target_new", ""),
            row.get("target_true"),
            guard=guard,
            key=idempotency_key(run, row, guard),
            wait=False,
        )
    except InvalidRequest as error:
        return Outcome(row, None, error.detail)
    return Outcome(row, edit)


def wait_for_outcome(client: Client, outcome: Outcome) -> Outcome:
    if outcome.edit is None:
        return outcome
    edit = client.wait_for(outcome.edit)
    return Outcome(outcome.row, edit, edit.reason)


def apply_rows(client: Client, rows: Iterable[Row], run: str, guard: dict[str, float]) -> Iterator[Outcome]:
    """Yield the outcome of every row, in order. Up to `MAX_PENDING` rows are submitted ahead."""
    pending: deque[Outcome] = deque()
    for row in rows:
        if len(pending) == MAX_PENDING:
            yield wait_for_outcome(client, pending.popleft())
        pending.append(submit(client, row, run, guard))
    for outcome in pending:
        yield wait_for_outcome(client, outcome)


def progress_bar(done: int, total: int, width: int = 30) -> str:
    full = width * done // max(total, 1)
    return f"\r[{'#' * full}{'.' * (width - full)}] {done}/{total}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path, help="a CSV file: subject, prompt, target_new, target_true")
    parser.add_argument("--report", type=Path, help="write the outcome of each row to this CSV file")
    parser.add_argument(
        "--run", help="name of this run: the same name never edits a row twice (default: the file's)"
    )
    parser.add_argument("--min-probability", type=float, help="minimum probability of the new object")
    args = parser.parse_args()

    guard = {} if args.min_probability is None else {"min_probability": args.min_probability}
    rows, outcomes = read_rows(args.file), list[Outcome]()
    with Client() as client:
        for outcome in apply_rows(client, rows, args.run or args.file.name, guard):
            outcomes.append(outcome)
            print(progress_bar(len(outcomes), len(rows)), end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)

    print(", ".join(f"{count} {status}" for status, count in Counter(o.status for o in outcomes).items()))
    for outcome in outcomes:
        if not outcome.ok:
            print(f"  {outcome.row.get('subject')}: {outcome.status}: {outcome.reason}")
    if args.report:
        with args.report.open("w", newline="", encoding="utf-8") as file:
            names = ["subject", "target_new", "status", "version", "before", "after", "edit", "reason"]
            csv.writer(file).writerows([names, *(outcome.csv_row() for outcome in outcomes)])
    return 0 if all(outcome.ok for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
