"""Records that users write themselves."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from service.datasets.parsing import (
    MAX_TEXTS,
    SkipRecord,
    Texts,
    fill_if_placeholder,
    record_label,
    validate_record,
    validate_row,
    with_placeholder,
)
from service.datasets.record import NeighborProbe, Record
from service.errors import InvalidInput
from service.kit.text import PLACEHOLDER
from service.schemas import Label, Name, NeighborhoodProbe, RequestModel, Text


class UserRecord(RequestModel):
    """A user's record. `prompt` and `paraphrases` hold {} for the subject, or spell it out."""

    subject: Name
    prompt: Text
    target_new: Name
    target_true: Name | None = None
    paraphrases: Texts = Field(default_factory=list)
    neighborhood: list[NeighborhoodProbe] = Field(default_factory=list, max_length=MAX_TEXTS)
    generation_prompts: Texts = Field(default_factory=list)
    reference_texts: Texts = Field(default_factory=list)
    relation: Label = ""


def parse_user_record(row: Any, place: int) -> Record:
    """Parse a user's record. Unlike a row of a published data set, it is never skipped silently."""
    name = record_label(row, place)
    user_record = validate_row(UserRecord, row, name, "valid")
    prompt = user_record.prompt
    if PLACEHOLDER not in prompt:
        try:
            prompt = with_placeholder(prompt, user_record.subject)
        except SkipRecord as skip:
            raise InvalidInput(f"{name}: {skip}: put {PLACEHOLDER} in its place.", "records") from None
    record = Record(
        name,
        user_record.subject,
        prompt,
        user_record.target_new,
        user_record.target_true,
        tuple(fill_if_placeholder(p, user_record.subject, name) for p in user_record.paraphrases),
        tuple(NeighborProbe(n.prompt, n.target) for n in user_record.neighborhood),
        (),
        tuple(user_record.generation_prompts),
        tuple(user_record.reference_texts),
        user_record.relation,
    )
    return validate_record(record)
