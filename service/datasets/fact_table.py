"""The `facts.jsonl` file in a model's folder: the facts that the model was trained on, one a line."""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from service.datasets.parsing import (
    MAX_TEXTS,
    ParsedRecords,
    PublishedRow,
    SkipReason,
    Texts,
    fill_if_placeholder,
    validate_record,
    validate_row,
)
from service.datasets.record import NeighborProbe, Record
from service.kit.model_files import companion_file
from service.schemas import Name, Text

FACTS_FILE = "facts.jsonl"
MAX_NEIGHBOURS = 10


class FactRow(PublishedRow):
    """A fact with the wordings that the model was trained on, and those that were held out."""

    subject: Name
    object: Name
    relation: Name
    prompts: Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS)]
    held_out_prompts: Texts


def find_facts_file(model: Path | None) -> Path | None:
    """Return the path of the fact table of a model's folder or GGUF file, or None if there is none."""
    path = companion_file(model, FACTS_FILE) if model else None
    return path if path is not None and path.is_file() else None


def read_fact_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a fact table."""
    return [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines() if x.strip()]


def build_fact_records(rows: Sequence[Any], seed: int) -> ParsedRecords:
    """Return one record for each fact, in an order drawn from `seed`. The new object is drawn from the same relation.

    Paraphrases are the fact's wordings that were held out of training. Neighbours are other subjects of the relation
    with the same object, each in one of its training wordings.
    """
    facts = [
        validate_row(FactRow, row, f"fact {place} of {FACTS_FILE}", "fact")
        for place, row in enumerate(rows, 1)
    ]
    rng = random.Random(seed)
    objects: dict[str, set[str]] = defaultdict(set)
    facts_by_object: dict[tuple[str, str], list[FactRow]] = defaultdict(list)
    for fact in facts:
        objects[fact.relation].add(fact.object)
        facts_by_object[fact.relation, fact.object].append(fact)
    records, skipped = [], Counter[SkipReason]()
    for place, fact in rng.sample(list(enumerate(facts, 1)), len(facts)):
        others = sorted(objects[fact.relation] - {fact.object})
        if not others:
            skipped[SkipReason.NO_ALTERNATIVE_OBJECT] += 1
            continue
        same_object = [f for f in facts_by_object[fact.relation, fact.object] if f.subject != fact.subject]
        chosen = rng.sample(same_object, min(MAX_NEIGHBOURS, len(same_object)))
        label = f"fact {place}"
        record = Record(
            label,
            fact.subject,
            rng.choice(fact.prompts),
            rng.choice(others),
            fact.object,
            tuple(fill_if_placeholder(p, fact.subject, label) for p in fact.held_out_prompts),
            tuple(
                NeighborProbe(fill_if_placeholder(rng.choice(f.prompts), f.subject, label), fact.object)
                for f in chosen
            ),
            relation=fact.relation,
        )
        records.append(validate_record(record))
    return records, skipped
