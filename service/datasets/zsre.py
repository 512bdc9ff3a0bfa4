"""zsRE (Levy et al. 2017) in the form of MEND (Mitchell et al. 2022)."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from service.datasets.parsing import (
    MAX_TEXTS,
    OptionalName,
    OptionalText,
    PublishedRow,
    optional_tuple,
    record_label,
    validate_record,
    validate_row,
    with_placeholder,
)
from service.datasets.record import NeighborProbe, Record
from service.errors import InvalidInput
from service.schemas import Name, Text


class ZsreRow(PublishedRow):
    """A row: a question about a subject with its answers, a paraphrase, and an unrelated question."""

    subject: Name
    src: Text
    answers: Annotated[list[Name], Field(min_length=1, max_length=MAX_TEXTS)]
    rephrase: OptionalText = None
    loc: OptionalText = None
    loc_ans: OptionalName = None


def parse_zsre(row: Any, place: int) -> Record:
    """Parse a record: the first answer is the new object, and the unrelated question must keep its own answer."""
    label = record_label(row, place)
    fields = validate_row(ZsreRow, row, label, "zsRE")
    if bool(fields.loc) != bool(fields.loc_ans):
        raise InvalidInput(
            f"{label} is not a zsRE record: give both `loc` and `loc_ans`, or neither.", "records"
        )
    return validate_record(
        Record(
            label,
            fields.subject,
            with_placeholder(fields.src, fields.subject),
            fields.answers[0],
            None,
            optional_tuple(fields.rephrase),
            (NeighborProbe(fields.loc + "?", fields.loc_ans),) if fields.loc and fields.loc_ans else (),
        )
    )
