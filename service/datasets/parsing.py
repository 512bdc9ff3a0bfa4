"""What the parsers of all record formats share."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from service.datasets.record import Record
from service.errors import InvalidInput
from service.kit.text import PLACEHOLDER, fill_prompt, locate_subject
from service.kit.validation_messages import validation_messages
from service.schemas import MAX_TEXT, Text

MAX_TEXTS = 1000  #: texts of each kind in one record
MAX_LABEL = 100  #: characters of a record's `case_id`


class SkipReason(StrEnum):
    """Why a well-formed row of a data set is not an editing problem."""

    SUBJECT_NOT_IN_PROMPT = "subject_not_in_prompt"
    NO_ALTERNATIVE_OBJECT = "no_alternative_object"
    SEVERAL_EDITS = "several_edits"
    UNKNOWN_SUBJECT = "unknown_subject"


#: skip reason -> the same for people
SKIP_DESCRIPTIONS = {
    SkipReason.SUBJECT_NOT_IN_PROMPT: "the prompt does not mention the subject",
    SkipReason.NO_ALTERNATIVE_OBJECT: "the relation has no other object to write",
    SkipReason.SEVERAL_EDITS: "its questions need several edits at once",
    SkipReason.UNKNOWN_SUBJECT: "the name of the subject is not in the record and cannot be read from its prompts",
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
    with errors_name_record(record.name):
        _ = record.statement
        if not record.target_new.strip():
            raise InvalidInput("the new object is empty: write some text.")
    return record


@contextmanager
def errors_name_record(label: str) -> Iterator[None]:
    """Put the name of the record before the detail of an InvalidInput."""
    try:
        yield
    except InvalidInput as error:
        raise InvalidInput(f"{label}: {error.detail}", "records") from None


def record_label(row: Any, place: int) -> str:
    """Return the name of a record: its `case_id`, or its place in the file (from 1)."""
    number = row.get("case_id") if isinstance(row, dict) else None
    is_label = isinstance(number, int) or (isinstance(number, str) and len(number) <= MAX_LABEL)
    return f"record {number if is_label else place}"


class PublishedRow(BaseModel):
    """A row of a published data set. Fields that no measure needs are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


Row = TypeVar("Row", bound=BaseModel)
#: texts of one record; a longer list is refused before its items are read
Texts = Annotated[list[Text], Field(max_length=MAX_TEXTS)]
#: a text that may be missing or empty
OptionalText = Annotated[str, Field(max_length=MAX_TEXT)] | None
#: an object that may be missing or empty
OptionalName = Annotated[str, Field(max_length=MAX_TEXT), AfterValidator(str.strip)] | None


def validate_row(model: type[Row], row: Any, label: str, format_name: str) -> Row:
    """Return a row as its model. Raise InvalidInput that names the first field that is missing or malformed."""
    try:
        return model.model_validate(row)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        (message,) = validation_messages([{**first, "loc": ("record", *first["loc"])}])
        raise InvalidInput(
            f"{label} is not a {format_name} record: `{message['field']}` {message['detail']}", "records"
        ) from None


def with_placeholder(text: str, subject: str) -> str:
    """Return a prompt that spells its subject out with {} in place of the last mention."""
    try:
        return replace_subject(text, subject)
    except InvalidInput:
        raise SkipRecord(SkipReason.SUBJECT_NOT_IN_PROMPT) from None


def replace_subject(text: str, subject: str) -> str:
    """Return a text with {} in place of the last mention of a subject. Raise InvalidInput if it has none."""
    start, end = locate_subject(text, subject).span
    return text[:start] + PLACEHOLDER + text[end:]


def fill_if_placeholder(prompt: str, subject: str, label: str) -> str:
    """Return the prompt with the subject in place of its `{}`, if it has one. Raise InvalidInput if it has several."""
    if PLACEHOLDER not in prompt:
        return prompt
    with errors_name_record(label):
        return fill_prompt(prompt, subject).text


def optional_tuple(value: str | None) -> tuple[str, ...]:
    """Return a tuple of the value, or an empty one if it is missing or empty."""
    return (value,) if value else ()
