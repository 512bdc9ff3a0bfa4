"""Records that users write themselves."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from service.datasets.parsing import (
    MAX_TEXTS,
    SkipRecord,
    Texts,
    errors_name_record,
    fill_if_placeholder,
    record_label,
    validate_record,
    validate_row,
    with_placeholder,
)
from service.datasets.record import NeighborProbe, PortabilityKind, PortabilityProbe, Record
from service.errors import InvalidInput
from service.kit.text import PLACEHOLDER
from service.schemas import (
    ChatProbe,
    Label,
    Name,
    NeighborhoodProbe,
    Paraphrase,
    RequestModel,
    StatedForm,
    Text,
)


class PortabilityQuestion(RequestModel):
    """A question whose answer follows from the edit, or stays true beside it."""

    kind: PortabilityKind
    prompt: Text
    target: Name
    target_before: Name | None = None  #: the answer without the edit


class UserRecord(StatedForm):
    """A user's record. `prompt` or `messages`, and `paraphrases`, hold {} for the subject, or spell it out."""

    target_new: Name
    target_true: Name | None = None
    paraphrases: list[Paraphrase] = Field(default_factory=list, max_length=MAX_TEXTS)
    neighborhood: list[NeighborhoodProbe] = Field(default_factory=list, max_length=MAX_TEXTS)
    generation_prompts: Texts = Field(default_factory=list)
    reference_texts: Texts = Field(default_factory=list)
    relation: Label = ""
    portability: list[PortabilityQuestion] = Field(default_factory=list, max_length=MAX_TEXTS)


def parse_user_record(row: Any, place: int) -> Record:
    """Parse a user's record. Unlike a row of a published data set, it is never skipped silently."""
    name, user_record = record_label(row, place), validate_user_record(row, place)
    with errors_name_record(name):
        prompt = _prompt_of(user_record)
        neighbors = tuple(_neighbor_of(probe) for probe in user_record.neighborhood)
    record = Record(
        name,
        user_record.subject,
        prompt,
        user_record.target_new,
        user_record.target_true,
        tuple(_paraphrase_of(p, user_record.subject, name) for p in user_record.paraphrases),
        neighbors,
        (),
        tuple(user_record.generation_prompts),
        tuple(user_record.reference_texts),
        user_record.relation,
        tuple(user_record.message_fields()),
        user_record.continue_final_message,
        tuple(_portability_probe(q, user_record.subject, name) for q in user_record.portability),
    )
    return validate_record(record)


def validate_user_record(row: Any, place: int) -> UserRecord:
    """Return a row as a user's record. Raise InvalidInput that names the first field that is missing or malformed."""
    return validate_row(UserRecord, row, record_label(row, place), "valid")


def _prompt_of(user_record: UserRecord) -> str:
    """Return the prompt with {} for the subject. Raise InvalidInput without one, or if it does not mention it."""
    prompt = user_record.fact.prompt
    if user_record.messages is not None or PLACEHOLDER in prompt:
        return prompt
    try:
        return with_placeholder(prompt, user_record.subject)
    except SkipRecord as skip:
        raise InvalidInput(f"{skip}: put {PLACEHOLDER} in its place.") from None


def _paraphrase_of(probe: str | ChatProbe, subject: str, name: str) -> str:
    return probe.prompt_text if isinstance(probe, ChatProbe) else fill_if_placeholder(probe, subject, name)


def _portability_probe(question: PortabilityQuestion, subject: str, name: str) -> PortabilityProbe:
    prompt = fill_if_placeholder(question.prompt, subject, name)
    before = (question.target_before,) if question.target_before else ()
    return PortabilityProbe(question.kind, (prompt,), (question.target,), before)


def _neighbor_of(probe: NeighborhoodProbe) -> NeighborProbe:
    if not probe.prompt:
        raise InvalidInput("a neighbor has no `prompt`: add it.")
    return NeighborProbe(probe.prompt_text, probe.target)


def has_conversation(row: Any) -> bool:
    """Whether a row is a user's record with messages in the place of a prompt, of its own or of a probe."""
    if not isinstance(row, dict) or "target_new" not in row:
        return False
    probes = [probe for name in ("paraphrases", "neighborhood") for probe in _list_of(row.get(name))]
    return any(isinstance(form, dict) and "messages" in form for form in (row, *probes))


def _list_of(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
