"""KnowEdit (Zhang et al. 2024): an edit with questions by kind, as in its WikiData sets."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from service.datasets.parsing import (
    MAX_TEXTS,
    OptionalText,
    PublishedRow,
    optional_tuple,
    record_label,
    validate_record,
    validate_row,
    with_placeholder,
)
from service.datasets.record import NeighborProbe, PortabilityKind, PortabilityProbe, Record
from service.schemas import Name, Text

#: name in `portability` -> the kind of its probes; another name is "logical"
PORTABILITY: dict[str, PortabilityKind] = {
    "Reasoning": "hop",
    "Subject_Aliasing": "alias",
    "Logical_Generalization": "logical",
    "Reverse": "reverse",
}
FORGETFULNESS = "Forgetfulness"  # other objects of the edited relation, which stay


def _flatten(value: Any) -> Any:
    """Return the names of an answer, which is a name, a list of names, or a list of lists of aliases."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [name for item in value for name in (_flatten(item) if isinstance(item, list) else [item])]
    return value


Names = Annotated[list[Name], Field(max_length=MAX_TEXTS), BeforeValidator(_flatten)]


class _Question(PublishedRow):
    prompt: Text
    ground_truth: Names


Questions = Annotated[list[_Question], Field(max_length=MAX_TEXTS)]


class KnowEditRow(PublishedRow):
    """A record; the prompt spells the subject out."""

    subject: Name
    prompt: Text
    target_new: Name
    ground_truth: Names = Field(default_factory=list)
    rephrase: OptionalText = None
    portability: dict[str, Questions] = Field(default_factory=dict)
    locality: dict[str, Questions] = Field(default_factory=dict)


def parse_know_edit(row: Any, place: int) -> Record:
    """Parse a record. What must stay about other facts is a neighbor; about the edited relation it is a probe."""
    label = record_label(row, place)
    fields = validate_row(KnowEditRow, row, label, "KnowEdit")
    neighbors = tuple(
        NeighborProbe(q.prompt, q.ground_truth[0])
        for name, questions in fields.locality.items()
        for q in questions
        if name != FORGETFULNESS and q.ground_truth
    )
    probes = [
        PortabilityProbe(PORTABILITY.get(name, "logical"), (q.prompt,), tuple(q.ground_truth))
        for name, questions in fields.portability.items()
        for q in questions
        if q.ground_truth
    ]
    probes += [
        PortabilityProbe("kept", (q.prompt,), tuple(q.ground_truth), tuple(q.ground_truth))
        for q in fields.locality.get(FORGETFULNESS, [])
        if q.ground_truth
    ]
    return validate_record(
        Record(
            label,
            fields.subject,
            with_placeholder(fields.prompt, fields.subject),
            fields.target_new,
            fields.ground_truth[0] if fields.ground_truth else None,
            optional_tuple(fields.rephrase),
            neighbors,
            portability=tuple(probes),
        )
    )
