"""Records from a file or a list, in any of the supported formats.

A format is recognised by a field that only its rows have: CounterFact, CounterFact in EasyEdit's flat form, zsRE in
MEND's form, the `facts.jsonl` of a model's folder, the ROME paper's known facts, MQuAKE, RippleEdits, KnowEdit, and
records that users write themselves. An error names the record and what to change.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from service.datasets.counterfact import parse_counterfact, parse_flat_counterfact
from service.datasets.csv_records import SUFFIXES, read_csv_rows
from service.datasets.fact_table import build_fact_records
from service.datasets.know_edit import parse_know_edit
from service.datasets.known_facts import parse_known_facts
from service.datasets.mquake import parse_mquake
from service.datasets.parsing import SKIP_DESCRIPTIONS, Parser, SkipReason, row_parser
from service.datasets.record import Record
from service.datasets.ripple_edits import parse_ripple_edits
from service.datasets.user_records import parse_user_record
from service.datasets.zsre import parse_zsre
from service.errors import InvalidInput


class RecordFormat(StrEnum):
    """The supported formats."""

    MQUAKE = "mquake"
    RIPPLE_EDITS = "ripple_edits"
    KNOW_EDIT = "know_edit"
    COUNTERFACT = "counterfact"
    COUNTERFACT_FLAT = "counterfact_flat"
    ZSRE = "zsre"
    FACTS = "facts"
    KNOWN_FACTS = "known_facts"
    USER = "user"


PARSERS: dict[RecordFormat, Parser] = {
    RecordFormat.MQUAKE: row_parser(parse_mquake),
    RecordFormat.RIPPLE_EDITS: row_parser(parse_ripple_edits),
    RecordFormat.KNOW_EDIT: row_parser(parse_know_edit),
    RecordFormat.COUNTERFACT: row_parser(parse_counterfact),
    RecordFormat.COUNTERFACT_FLAT: row_parser(parse_flat_counterfact),
    RecordFormat.ZSRE: row_parser(parse_zsre),
    RecordFormat.FACTS: build_fact_records,
    RecordFormat.KNOWN_FACTS: parse_known_facts,
    RecordFormat.USER: row_parser(parse_user_record),
}
#: format -> a field that its rows have and rows of the formats below it do not have
IDENTIFYING_FIELDS = {
    RecordFormat.MQUAKE: "new_single_hops",
    RecordFormat.RIPPLE_EDITS: "edit",
    RecordFormat.KNOW_EDIT: "locality",
    RecordFormat.COUNTERFACT: "requested_rewrite",
    RecordFormat.COUNTERFACT_FLAT: "ground_truth",
    RecordFormat.ZSRE: "src",
    RecordFormat.FACTS: "held_out_prompts",
    RecordFormat.KNOWN_FACTS: "attribute",
    RecordFormat.USER: "target_new",
}


@dataclass(frozen=True)
class LoadedRecords:
    """Records in an order drawn from a seed, and the number of skipped rows by reason."""

    format: RecordFormat
    records: list[Record]
    skipped: dict[SkipReason, int]


def read_records(source: Path | Sequence[Any], seed: int = 0, limit: int | None = None) -> list[Record]:
    """Return the records of `load_records`."""
    return load_records(source, seed, limit).records


def load_records(source: Path | Sequence[Any], seed: int = 0, limit: int | None = None) -> LoadedRecords:
    """Parse a list of rows, or a file of them, and return the first `limit` records in the seed's order."""
    rows = read_rows(source) if isinstance(source, Path) else source
    if not rows:
        raise InvalidInput("there are no records: give a list of at least one.", "records")
    record_format = detect_format(rows[0])
    records, skipped = PARSERS[record_format](rows, seed)
    if not records:
        reasons = "; ".join(f"{SKIP_DESCRIPTIONS[reason]} ({number})" for reason, number in skipped.items())
        raise InvalidInput(f"none of the {len(rows)} records can be used: {reasons}.", "records")
    return LoadedRecords(record_format, records[:limit], dict(skipped))


def read_rows(path: Path, columns: Mapping[str, Sequence[str]] | None = None) -> list[Any]:
    """Return the rows of a file that holds a JSON list, JSON lines, or CSV. `columns`: those of the fields in CSV."""
    if path.suffix.lower() in SUFFIXES:
        return list(read_csv_rows(path, columns))
    if columns:
        raise InvalidInput(f"{path.name} has no columns: only a .csv or .tsv file has them.", "records")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise InvalidInput(f"the records {str(path)!r} cannot be read: {error}", "records") from None
    if text.lstrip().startswith("["):
        try:
            return list(json.loads(text))
        except ValueError as error:
            raise _json_error(path, error, getattr(error, "lineno", 1)) from None
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise _json_error(path, error, number) from None
    return rows


def _json_error(path: Path, error: ValueError, line: int) -> InvalidInput:
    """Return the error for a text that is not JSON, with its line and column."""
    column = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
    reason = error.msg if isinstance(error, json.JSONDecodeError) else error
    return InvalidInput(f"line {line}{column} of {path.name} is not valid JSON: {reason}", "records")


def detect_format(row: Any) -> RecordFormat:
    """Return the format of a row. Raise InvalidInput if no format has its fields."""
    fields = row if isinstance(row, dict) else {}
    for record_format, field in IDENTIFYING_FIELDS.items():
        if field in fields:
            return record_format
    raise InvalidInput(
        "the format of the first record is unknown: give objects with `subject`, `prompt` and `target_new`, or unchanged "
        "records of CounterFact, zsRE, MQuAKE, RippleEdits, KnowEdit, known facts or facts.jsonl.",
        "records",
    )
