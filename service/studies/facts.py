"""The facts of a study, from a file of records in any format or from the paper's list of known facts."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from pathlib import Path

from service.datasets.known_facts import parse_known_fact
from service.datasets.loading import RecordFormat, detect_format, read_records, read_rows
from service.datasets.record import Record
from service.errors import InvalidInput
from service.kit.text import Statement, fill_prompt


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
    known_facts = _read_known_facts(path)
    if known_facts:
        return random.Random(seed).sample(known_facts, len(known_facts))
    facts = [fact_from_record(r) for r in read_records(path, seed) if r.target_true]
    if not facts:
        raise InvalidInput(f"no record of {path.name} has a true object, which a study needs.", "facts")
    return facts


def _read_known_facts(path: Path) -> list[Fact]:
    """Return the facts of a known_facts.json, also those that are no records, or nothing if it has another format."""
    try:
        rows = read_rows(path)
        is_known_facts = detect_format(rows[0]) is RecordFormat.KNOWN_FACTS
    except (InvalidInput, IndexError):
        return []  # `read_records` reports the error
    if not is_known_facts:
        return []
    facts = [parse_known_fact(row, place) for place, row in enumerate(rows, 1)]
    return [Fact(f.subject, f.prompt, f.object) for f in facts]
