"""What the parsers of all record formats share."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any

from service.datasets.record import Record
from service.errors import InvalidInput
from service.kit.text import PLACEHOLDER, fill_prompt, locate_subject


class SkipReason(StrEnum):
    """Why a well-formed row of a data set is not an editing problem."""

    SUBJECT_NOT_IN_PROMPT = "subject_not_in_prompt"
    NO_ALTERNATIVE_OBJECT = "no_alternative_object"


#: skip reason -> the same for people
SKIP_DESCRIPTIONS = {
    SkipReason.SUBJECT_NOT_IN_PROMPT: "the prompt does not mention the subject",
    SkipReason.NO_ALTERNATIVE_OBJECT: "the relation has no other object to write",
}


class SkipRecord(Exception):
    """Raised by a parser for a well-formed row that is not an editing problem."""

    def __init__(self, reason: SkipReason) -> None:
        super().__init__(SKIP_DESCRIPTIONS[reason])
        self.reason = reason


#: records in the order drawn from the seed, and the number of skipped rows by reason
ParsedRecords = tuple[list[Record], Counter[SkipReason]]
Parser = Callable[[Sequence[Any], int], ParsedRecords]


def row_parser(parse_row: Callable[[Any, int], Record]) -> Parser:
    """Return a parser for a format in which every row is one record.

    It parses all rows, so that a malformed one is reported wherever it is, and then shuffles the records.
    """

    def parse(rows: Sequence[Any], seed: int) -> ParsedRecords:
        records, skipped = [], Counter[SkipReason]()
        for place, row in enumerate(rows, 1):
            try:
                records.append(parse_row(row, place))
            except SkipRecord as skip:
                skipped[skip.reason] += 1
        return random.Random(seed).sample(records, len(records)), skipped

    return parse


def validate_record(record: Record) -> Record:
    """Return the record. Raise InvalidInput if its prompt is invalid or its new object is empty."""
    try:
        fill_prompt(record.prompt, record.subject)
        if not record.target_new.strip():
            raise InvalidInput("the new object is empty: write some text.")
    except InvalidInput as error:
        raise InvalidInput(f"{record.name}: {error.detail}", "records") from None
    return record


def record_label(row: Any, place: int) -> str:
    """Return the name of a record: its `case_id`, or its place in the file (from 1)."""
    number = row.get("case_id", place) if isinstance(row, dict) else place
    return f"record {number}"


def malformed_record(label: str, format_name: str, error: Exception) -> InvalidInput:
    """Return the error for a row that lacks a field of its format, or has one of the wrong type."""
    return InvalidInput(f"{label} is not a {format_name} record: missing or malformed: {error}.", "records")


def with_placeholder(text: str, subject: str) -> str:
    """Return a prompt that spells its subject out with {} in place of the last mention."""
    try:
        start, end = locate_subject(text, subject).span
    except InvalidInput:
        raise SkipRecord(SkipReason.SUBJECT_NOT_IN_PROMPT) from None
    return text[:start] + PLACEHOLDER + text[end:]


def optional_tuple(value: str | None) -> tuple[str, ...]:
    """Return a tuple of the value, or an empty one if it is missing or empty."""
    return (value,) if value else ()
