"""RippleEdits (Cohen et al. 2024): an edit, and tests of what should and should not change with it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from typing import Annotated, Any

from pydantic import Field

from service.datasets.parsing import (
    MAX_TEXTS,
    PublishedRow,
    SkipReason,
    SkipRecord,
    Texts,
    record_label,
    validate_record,
    validate_row,
    with_placeholder,
)
from service.datasets.record import PortabilityKind, PortabilityProbe, Record
from service.schemas import Label, Name, Text

#: axis of the tests -> the kind of its probes
AXES: dict[str, PortabilityKind] = {
    "Logical_Generalization": "logical",
    "Compositionality_I": "hop",
    "Compositionality_II": "hop",
    "Subject_Aliasing": "alias",
    "Relation_Specificity": "kept",
    "Forgetfulness": "kept",
}

FIRST_WORDS = ("The", "A", "An", "In")  # capitals at the start of a sentence that are no names


class _Answer(PublishedRow):
    value: Name
    aliases: Texts = Field(default_factory=list)


class _Query(PublishedRow):
    prompt: Text
    answers: Annotated[list[_Answer], Field(max_length=MAX_TEXTS)] = Field(default_factory=list)
    subject_id: Label = ""


class _Test(PublishedRow):
    test_queries: Annotated[list[_Query], Field(max_length=MAX_TEXTS)]


class _Fact(PublishedRow):
    prompt: Text
    subject: Name | None = None
    subject_id: Label = ""
    relation: Label = ""


class _Edit(_Fact):
    original_fact: _Fact | None = None


Tests = Annotated[list[_Test], Field(max_length=MAX_TEXTS)]


class RippleEditsRow(PublishedRow):
    """A record: the edit as a sentence, and tests by axis."""

    edit: _Edit
    logical: Tests = Field(default_factory=list, alias="Logical_Generalization")
    composition_1: Tests = Field(default_factory=list, alias="Compositionality_I")
    composition_2: Tests = Field(default_factory=list, alias="Compositionality_II")
    aliasing: Tests = Field(default_factory=list, alias="Subject_Aliasing")
    specificity: Tests = Field(default_factory=list, alias="Relation_Specificity")
    forgetfulness: Tests = Field(default_factory=list, alias="Forgetfulness")

    def queries(self) -> Iterator[tuple[PortabilityKind, _Query]]:
        """Yield the queries of all tests with the kind of their probes."""
        names = ("logical", "composition_1", "composition_2", "aliasing", "specificity", "forgetfulness")
        for kind, name in zip(AXES.values(), names, strict=True):
            for test in getattr(self, name):
                yield from ((kind, query) for query in test.test_queries)


def parse_ripple_edits(row: Any, place: int) -> Record:
    """Parse a record. The published edit is a sentence that ends with its object, beside the sentence of the fact
    before it: what both begin with is the prompt."""
    label = record_label(row, place)
    fields = validate_row(RippleEditsRow, row, label, "RippleEdits")
    edit = fields.edit
    if edit.original_fact is None:
        raise SkipRecord(SkipReason.NO_ALTERNATIVE_OBJECT)
    prompt, new, true = split_objects(edit.prompt, edit.original_fact.prompt)
    if not (prompt and new and true):
        raise SkipRecord(SkipReason.NO_ALTERNATIVE_OBJECT)
    subject = edit.subject or find_subject(prompt, _prompts_about(fields, edit.subject_id))
    if not subject:
        raise SkipRecord(SkipReason.UNKNOWN_SUBJECT)
    probes = tuple(
        PortabilityProbe(kind, (q.prompt,), tuple(_names(q))) for kind, q in fields.queries() if q.answers
    )
    return validate_record(
        Record(
            label,
            subject,
            with_placeholder(prompt, subject),
            new,
            true,
            relation=edit.relation,
            portability=probes,
        )
    )


def split_objects(edited: str, original: str) -> tuple[str, str, str]:
    """Return the words that two sentences begin with, and the rest of each without its full stop."""
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(edited.split(), original.split(), strict=False))
    prompt = [word for word, _ in pairs]
    new, true = (" ".join(s.split()[len(prompt) :]).rstrip(".").strip() for s in (edited, original))
    return " ".join(prompt), new, true


def find_subject(prompt: str, others: list[str]) -> str | None:
    """Return the name that a prompt shares with other prompts about the same subject: the longest run of words that
    all have, without words in small letters at its ends; None if there is none."""
    words = prompt.split()
    runs = [
        words[i:j]
        for i in range(len(words))
        for j in range(len(words), i, -1)
        if words[i][0] != words[i][0].lower() or words[i][0].isdigit()
    ]
    names = [" ".join(run) for run in runs if run[-1][0] != run[-1][0].lower() or run[-1][0].isdigit()]
    shared = [
        name
        for name in names
        if name not in FIRST_WORDS and others and all(name in other for other in others)
    ]
    return max(shared, key=len, default=None)


def _prompts_about(fields: RippleEditsRow, subject_id: str) -> list[str]:
    return [q.prompt for _, q in fields.queries() if subject_id and q.subject_id == subject_id]


def _names(query: _Query) -> list[str]:
    return [name for answer in query.answers for name in (answer.value, *answer.aliases) if name.strip()]
