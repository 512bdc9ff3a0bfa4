"""The `facts.jsonl` file in a model's folder: the facts that the model was trained on, one a line."""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from service.datasets.parsing import ParsedRecords, SkipReason, validate_record
from service.datasets.record import NeighborProbe, Record
from service.errors import InvalidInput
from service.kit.text import PLACEHOLDER

FACTS_FILE = "facts.jsonl"
FACT_FIELDS = ("subject", "object", "relation", "prompts", "held_out_prompts")
MAX_NEIGHBOURS = 10


def find_facts_file(folder: Path | None) -> Path | None:
    """Return the path of the fact table in a model's folder, or None if there is none."""
    path = folder / FACTS_FILE if folder else None
    return path if path is not None and path.is_file() else None


def read_fact_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a fact table."""
    return [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines() if x.strip()]


def build_fact_records(rows: Sequence[Any], seed: int) -> ParsedRecords:
    """Return one record for each fact, in an order drawn from `seed`. The new object is drawn from the same relation.

    Paraphrases are the fact's wordings that were held out of training. Neighbours are other subjects of the relation
    with the same object, each in one of its training wordings.
    """
    for place, row in enumerate(rows, 1):
        if missing := [name for name in FACT_FIELDS if not isinstance(row, dict) or name not in row]:
            raise InvalidInput(f"fact {place} of {FACTS_FILE} lacks the field {missing[0]!r}.", "records")
    rng = random.Random(seed)
    objects: dict[str, set[str]] = defaultdict(set)
    rows_by_object: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        objects[row["relation"]].add(row["object"])
        rows_by_object[row["relation"], row["object"]].append(row)
    records, skipped = [], Counter[SkipReason]()
    for place, row in rng.sample(list(enumerate(rows, 1)), len(rows)):
        others = sorted(objects[row["relation"]] - {row["object"]})
        if not others:
            skipped[SkipReason.NO_ALTERNATIVE_OBJECT] += 1
            continue
        same_object_rows = [
            r for r in rows_by_object[row["relation"], row["object"]] if r["subject"] != row["subject"]
        ]
        chosen = rng.sample(same_object_rows, min(MAX_NEIGHBOURS, len(same_object_rows)))
        record = Record(
            f"fact {place}",
            row["subject"],
            rng.choice(row["prompts"]),
            rng.choice(others),
            row["object"],
            tuple(p.replace(PLACEHOLDER, row["subject"]) for p in row["held_out_prompts"]),
            tuple(
                NeighborProbe(rng.choice(r["prompts"]).replace(PLACEHOLDER, r["subject"]), row["object"])
                for r in chosen
            ),
            relation=row["relation"],
        )
        records.append(validate_record(record))
    return records, skipped
