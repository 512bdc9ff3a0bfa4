"""MQuAKE (Zhong et al. 2023): an edit, and questions of several steps whose answer it changes."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from service.datasets.counterfact import RequestedRewrite
from service.datasets.parsing import (
    MAX_TEXTS,
    PublishedRow,
    SkipReason,
    SkipRecord,
    Texts,
    record_label,
    validate_record,
    validate_row,
)
from service.datasets.record import PortabilityProbe, Record
from service.schemas import Name, Text


class _Rewrite(RequestedRewrite):
    question: Text | None = None


class MquakeRow(PublishedRow):
    """A case: its edits, three wordings of one question, and the answers before and after."""

    requested_rewrite: Annotated[list[_Rewrite], Field(min_length=1, max_length=MAX_TEXTS)]
    questions: Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS)]
    answer: Name
    answer_alias: Texts = Field(default_factory=list)
    new_answer: Name
    new_answer_alias: Texts = Field(default_factory=list)


def parse_mquake(row: Any, place: int) -> Record:
    """Parse a case of one edit. A case of several is skipped: its question is about all of them together."""
    label = record_label(row, place)
    fields = validate_row(MquakeRow, row, label, "MQuAKE")
    if len(fields.requested_rewrite) > 1:
        raise SkipRecord(SkipReason.SEVERAL_EDITS)
    (rewrite,) = fields.requested_rewrite
    hop = PortabilityProbe(
        "hop",
        tuple(fields.questions),
        (fields.new_answer, *fields.new_answer_alias),
        (fields.answer, *fields.answer_alias),
    )
    return validate_record(
        Record(
            label,
            rewrite.subject,
            rewrite.prompt,
            rewrite.target_new.text,
            rewrite.target_true.text,
            (rewrite.question,) if rewrite.question else (),
            relation=rewrite.relation_id,
            portability=(hop,),
        )
    )
