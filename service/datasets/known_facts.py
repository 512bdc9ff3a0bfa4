"""The known facts that the ROME paper traces (Meng et al. 2022).

A row has a subject, its true object and one prompt. As a record it also needs a new object, paraphrases and neighbors,
which the other rows of its relation give, as in CounterFact: the new object is another one of the relation, paraphrases
are its other templates with the subject, and neighbors are other subjects with the same object.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from service.datasets.parsing import (
    ParsedRecords,
    PublishedRow,
    SkipReason,
    errors_name_record,
    replace_subject,
    validate_record,
    validate_row,
)
from service.datasets.record import NeighborProbe, Record
from service.kit.text import PLACEHOLDER, fill_prompt
from service.schemas import Name, Text

MAX_NEIGHBORS = 10
MAX_PARAPHRASES = 2  # as in CounterFact


class KnownFactRow(PublishedRow):
    """A row of the published file."""

    subject: Name
    attribute: Name
    template: Text
    prompt: str = ""
    relation_id: str = Field("", max_length=100)


@dataclass(frozen=True)
class KnownFact:
    """A statement and its true object."""

    name: str  #: identifies the fact in errors and reports
    subject: str
    prompt: str  #: with one {}
    object: str
    relation: str = ""

    @property
    def text(self) -> str:
        return fill_prompt(self.prompt, self.subject).text


def parse_known_fact(row: Any, place: int) -> KnownFact:
    """Return the fact of a row, which is at `place` (from 1) of its file.

    The paper traces `prompt`, which may extend the template by a word: "is located in the continent of".
    """
    name = f"known fact {place}"
    fact = validate_row(KnownFactRow, row, name, "known-facts")
    prompt = fact.prompt or fact.template
    with errors_name_record(name):
        if PLACEHOLDER not in prompt:
            prompt = replace_subject(prompt, fact.subject)
        fill_prompt(prompt, fact.subject)
    return KnownFact(name, fact.subject, prompt, fact.attribute, fact.relation_id)


def parse_known_facts(rows: Sequence[Any], seed: int) -> ParsedRecords:
    """Return one record for each fact whose relation has another object, in an order drawn from `seed`."""
    facts = [parse_known_fact(row, place) for place, row in enumerate(rows, 1)]
    by_relation: dict[str, list[KnownFact]] = defaultdict(list)
    for fact in facts:
        by_relation[fact.relation].append(fact)
    rng = random.Random(seed)
    records = []
    for fact in rng.sample(facts, len(facts)):
        relation = by_relation[fact.relation]
        own_objects = {f.object for f in relation if f.subject == fact.subject}
        if others := sorted({f.object for f in relation} - own_objects):
            records.append(_build_record(fact, relation, rng.choice(others), rng))
    skipped = Counter({SkipReason.NO_ALTERNATIVE_OBJECT: len(facts) - len(records)})
    return records, +skipped


def _build_record(fact: KnownFact, relation: Sequence[KnownFact], new: str, rng: random.Random) -> Record:
    """Return the record of a fact with a new object, given all facts of its relation."""
    templates = sorted({f.prompt for f in relation} - {fact.prompt})
    neighbors = [f for f in relation if f.object == fact.object and f.subject != fact.subject]
    paraphrases = rng.sample(templates, min(MAX_PARAPHRASES, len(templates)))
    chosen = rng.sample(neighbors, min(MAX_NEIGHBORS, len(neighbors)))
    record = Record(
        fact.name,
        fact.subject,
        fact.prompt,
        new,
        fact.object,
        tuple(fill_prompt(p, fact.subject).text for p in paraphrases),
        tuple(NeighborProbe(f.text, f.object) for f in chosen),
        relation=fact.relation,
    )
    return validate_record(record)
