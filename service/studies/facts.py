"""The facts of a study, from a file of records in any format or from the paper's list of known facts."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from service.datasets.loading import read_records
from service.datasets.record import Record
from service.errors import InvalidInput
from service.kit.text import PLACEHOLDER, Statement, fill_prompt, locate_subject

KNOWN_FACT_FIELDS = ("subject", "attribute", "template")


@dataclass(frozen=True)
class Fact:
    """A subject, a prompt, and the object with which a model that knows the fact continues the prompt."""

    subject: str
    prompt: str  #: with one {}
    object: str

    @property
    def statement(self) -> Statement:
        return fill_prompt(self.prompt, self.subject)

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def fact_from_record(record: Record) -> Fact:
    """Return the unedited fact of a record."""
    return Fact(record.subject, record.prompt, record.target_true or "")


def read_study_facts(path: Path, seed: int = 0) -> list[Fact]:
    """Return the facts of a file that have a true object, in an order drawn from `seed`."""
    rows = _read_known_facts(path)
    if rows:
        return random.Random(seed).sample([_parse_known_fact(row, place) for place, row in rows], len(rows))
    facts = [fact_from_record(r) for r in read_records(path, seed) if r.target_true]
    if not facts:
        raise InvalidInput(f"no record of {path.name} has a true object, which a study needs.", "facts")
    return facts


def _read_known_facts(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Return the numbered rows of a known_facts.json, or nothing if the file has another format."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []  # `read_records` reports the error
    is_known_facts = (
        isinstance(rows, list) and bool(rows) and isinstance(rows[0], dict) and "attribute" in rows[0]
    )
    return list(enumerate(rows, 1)) if is_known_facts else []


def _parse_known_fact(row: dict[str, Any], place: int) -> Fact:
    """Parse a known fact.

    The paper traces `prompt`, which may extend the template by a word: "is located in the continent of".
    """
    try:
        subject, attribute, template = (str(row[name]) for name in KNOWN_FACT_FIELDS)
        prompt = str(row.get("prompt") or template)
        if PLACEHOLDER not in prompt:
            start, end = locate_subject(prompt, subject).span
            prompt = prompt[:start] + PLACEHOLDER + prompt[end:]
        fill_prompt(prompt, subject)
    except (KeyError, TypeError) as error:
        raise InvalidInput(f"known fact {place} lacks {error}.", "facts") from None
    except InvalidInput as error:
        raise InvalidInput(f"known fact {place}: {error.detail}", "facts") from None
    return Fact(subject, prompt, attribute)
