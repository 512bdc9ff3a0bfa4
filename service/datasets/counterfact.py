"""CounterFact (Meng et al. 2022): the published form, and the flat one of EasyEdit."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from service.datasets.parsing import (
    OptionalName,
    OptionalText,
    PublishedRow,
    Texts,
    optional_tuple,
    record_label,
    validate_record,
    validate_row,
    with_placeholder,
)
from service.datasets.record import NeighborProbe, Record
from service.schemas import Label, Name, Text


class RewriteTarget(PublishedRow):
    """An object. Its other fields are ignored."""

    text: Name = Field(alias="str")


class RequestedRewrite(PublishedRow):
    """An edit, as CounterFact and MQuAKE state it."""

    subject: Name
    prompt: Text
    target_new: RewriteTarget
    target_true: RewriteTarget
    relation_id: Label = ""


class CounterFactRow(PublishedRow):
    """A row of CounterFact as published."""

    requested_rewrite: RequestedRewrite
    paraphrase_prompts: Texts
    neighborhood_prompts: Texts
    attribute_prompts: Texts = Field(default_factory=list)
    generation_prompts: Texts = Field(default_factory=list)
    reference_texts: Texts = Field(default_factory=list)


class FlatCounterFactRow(PublishedRow):
    """A row of EasyEdit's flat form, in which the prompt spells the subject out."""

    subject: Name
    prompt: Text
    target_new: Name
    ground_truth: Name
    rephrase_prompt: OptionalText = None
    locality_prompt: OptionalText = None
    locality_ground_truth: OptionalName = None


def parse_counterfact(row: Any, place: int) -> Record:
    """Parse a record of CounterFact as published."""
    label = record_label(row, place)
    fields = validate_row(CounterFactRow, row, label, "CounterFact")
    rewrite = fields.requested_rewrite
    return validate_record(
        Record(
            label,
            rewrite.subject,
            rewrite.prompt,
            rewrite.target_new.text,
            rewrite.target_true.text,
            tuple(fields.paraphrase_prompts),
            tuple(NeighborProbe(p, rewrite.target_true.text) for p in fields.neighborhood_prompts),
            tuple(fields.attribute_prompts),
            tuple(fields.generation_prompts),
            tuple(fields.reference_texts),
            rewrite.relation_id,
        )
    )


def parse_flat_counterfact(row: Any, place: int) -> Record:
    """Parse a record of EasyEdit's flat form."""
    label = record_label(row, place)
    fields = validate_row(FlatCounterFactRow, row, label, "flat CounterFact")
    neighbors = zip(
        optional_tuple(fields.locality_prompt), optional_tuple(fields.locality_ground_truth), strict=False
    )
    return validate_record(
        Record(
            label,
            fields.subject,
            with_placeholder(fields.prompt, fields.subject),
            fields.target_new,
            fields.ground_truth,
            optional_tuple(fields.rephrase_prompt),
            tuple(NeighborProbe(prompt, target) for prompt, target in neighbors),
        )
    )
