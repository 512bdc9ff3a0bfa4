"""Records that users write themselves."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, ValidationError

from service.datasets.parsing import SkipRecord, record_label, validate_record, with_placeholder
from service.datasets.record import NeighborProbe, Record
from service.errors import InvalidInput
from service.kit.text import PLACEHOLDER
from service.schemas import Name, NeighborhoodProbe, RequestModel, Text


class UserRecord(RequestModel):
    """A user's record. `prompt` and `paraphrases` hold {} for the subject, or spell it out."""

    subject: Name
    prompt: Text
    target_new: Name
    target_true: Name | None = None
    paraphrases: list[Text] = Field(default_factory=list)
    neighborhood: list[NeighborhoodProbe] = Field(default_factory=list)
    generation_prompts: list[Text] = Field(default_factory=list)
    reference_texts: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    relation: str = ""


def parse_user_record(row: Any, place: int) -> Record:
    """Parse a user's record. Unlike a row of a published data set, it is never skipped silently."""
    name = record_label(row, place)
    try:
        user_record = UserRecord.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(x) for x in first["loc"]) or "the record"
        raise InvalidInput(f"{name}: {where}: {first['msg']}.", "records") from None
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
        tuple(p.replace(PLACEHOLDER, user_record.subject) for p in user_record.paraphrases),
        tuple(NeighborProbe(n.prompt, n.target) for n in user_record.neighborhood),
        (),
        tuple(user_record.generation_prompts),
        tuple(user_record.reference_texts),
        user_record.relation,
    )
    return validate_record(record)
