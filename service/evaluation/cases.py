"""Editing problems: one fact with the object to write, wordings that should follow and neighbours that must not.

Reads CounterFact's original form and the `facts.jsonl` beside a model; says what a record lacks.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import InvalidInput

NEIGHBOURS = 10
FACT = ("subject", "object", "relation", "prompts", "held_out_prompts")


@dataclass(frozen=True)
class Case:
    subject: str
    prompt: str  #: with one {}
    target_true: str
    target_new: str
    paraphrases: tuple[str, ...]  #: whole prompts
    neighbours: tuple[str, ...]  #: whole prompts whose answer is target_true
    relation: str


def read_facts(path: Path) -> list[dict[str, Any]]:
    """The rows of a facts.jsonl."""
    return [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines() if x.strip()]


def cases_from_facts(rows: list[dict[str, Any]], seed: int = 0) -> list[Case]:
    """One case for each fact in an order drawn from `seed`; the new object comes from the same relation.

    Paraphrases are the wordings held out of training for this fact; neighbours are other subjects of the relation
    with the same object, each in one of its trained wordings.
    """
    for place, row in enumerate(rows, 1):
        if lost := [name for name in FACT if name not in row]:
            raise InvalidInput(
                f"fact {place} is not in the form of facts.jsonl: it lacks {lost[0]!r}.", "records"
            )
    rng = random.Random(seed)
    objects: dict[str, set[str]] = defaultdict(set)
    sharing: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        objects[row["relation"]].add(row["object"])
        sharing[row["relation"], row["object"]].append(row)
    cases = []
    for row in rng.sample(rows, len(rows)):
        others = sorted(objects[row["relation"]] - {row["object"]})
        if not others:
            continue  # no other object to write
        near = [r for r in sharing[row["relation"], row["object"]] if r["subject"] != row["subject"]]
        chosen = rng.sample(near, min(NEIGHBOURS, len(near)))
        cases.append(
            Case(
                row["subject"],
                rng.choice(row["prompts"]),
                row["object"],
                rng.choice(others),
                tuple(p.replace("{}", row["subject"]) for p in row["held_out_prompts"]),
                tuple(rng.choice(r["prompts"]).replace("{}", r["subject"]) for r in chosen),
                row["relation"],
            )
        )
    return cases


def case_from_counterfact(record: dict[str, Any]) -> Case:
    """A record in CounterFact's original form."""
    try:
        rewrite = record["requested_rewrite"]
        return Case(
            rewrite["subject"],
            rewrite["prompt"],
            rewrite["target_true"]["str"],
            rewrite["target_new"]["str"],
            tuple(record["paraphrase_prompts"]),
            tuple(record["neighborhood_prompts"]),
            rewrite.get("relation_id", ""),
        )
    except (KeyError, TypeError) as error:
        number = record.get("case_id", "?") if isinstance(record, dict) else "?"
        raise InvalidInput(
            f"record {number} is not in CounterFact's form: it lacks {error}.", "records"
        ) from None


def read_cases(path: Path, seed: int = 0) -> list[Case]:
    """Cases from a facts.jsonl or from a CounterFact JSON file, in an order drawn from `seed`."""
    if path.suffix == ".jsonl":
        return cases_from_facts(read_facts(path), seed)
    records = json.loads(path.read_text(encoding="utf-8"))
    return [case_from_counterfact(r) for r in random.Random(seed).sample(records, len(records))]
