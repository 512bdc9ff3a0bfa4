"""Editing problems: one fact with the object to write, wordings that should follow and neighbours that must not.

Reads CounterFact in its original form and in EasyEdit's flat one, zsRE as MEND has it, the `facts.jsonl` beside a model, and
records of the user's own. Every record says what it lacks; of one that cannot be read it is said what to change.
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, ValidationError

from service.errors import InvalidInput
from service.kit.text import PLACEHOLDER, check_tokens, fill_prompt, locate_subject, separator
from service.schemas import Name, NeighborhoodProbe, Objective, RequestModel, Text

MAX_NEIGHBOURS = 10
FACT_FIELDS = ("subject", "object", "relation", "prompts", "held_out_prompts")
NO_SUBJECT = "the prompt does not mention the subject"
NO_ALTERNATIVE_OBJECT = "its relation has no other object to write"


class NeighborProbe(NamedTuple):
    """A prompt about something else, and the answer that it must keep."""

    prompt: str
    target: str


@dataclass(frozen=True)
class Record:
    """One editing problem. Prompts other than the first are whole texts."""

    name: str  #: by which people find it again
    subject: str
    prompt: str  #: with one {}
    target_new: str
    target_true: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[NeighborProbe, ...] = ()
    attribute_prompts: tuple[str, ...] = ()  #: about other subjects that have the new object
    generation_prompts: tuple[str, ...] = ()
    reference_texts: tuple[str, ...] = ()  #: about subjects that have the new object
    relation: str = ""

    @property
    def text(self) -> str:
        """The prompt with the subject in it."""
        return fill_prompt(self.prompt, self.subject).text

    @property
    def prompts(self) -> tuple[str, ...]:
        """The texts after which a model is asked for an object."""
        return (self.text, *self.paraphrases, *(n.prompt for n in self.neighbours))

    @property
    def missing_fields(self) -> tuple[str, ...]:
        """What there is nothing of, in words; what needs it is not measured."""
        parts = {
            "a true object": self.target_true,
            "paraphrases": self.paraphrases,
            "neighbours": self.neighbours,
            "generation prompts": self.generation_prompts,
            "reference texts": self.reference_texts,
        }
        return tuple(name for name, part in parts.items() if not part)


@dataclass(frozen=True)
class LoadedRecords:
    """What was read: records in an order drawn from a seed, and how many were passed over, by the reason."""

    format: str
    records: list[Record]
    skipped: dict[str, int]


class SkipRecord(Exception):
    """A sound record that is no editing problem."""


class UserRecord(RequestModel):
    """A record of the user's own. `prompt` holds {} for the subject, or spells it out, as may paraphrases."""

    subject: Name
    prompt: Text
    target_new: Name
    target_true: Name | None = None
    paraphrases: list[Text] = Field(default_factory=list)
    neighborhood: list[NeighborhoodProbe] = Field(default_factory=list)
    generation_prompts: list[Text] = Field(default_factory=list)
    reference_texts: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    relation: str = ""


# Files and lists


def read_records(source: Path | Sequence[Any], seed: int = 0, limit: int | None = None) -> list[Record]:
    """The records of `read`."""
    return load_records(source, seed, limit).records


def load_records(source: Path | Sequence[Any], seed: int = 0, limit: int | None = None) -> LoadedRecords:
    """Records of any form, from a file (a JSON list, or JSON lines) or a list, the first `limit` in the seed's order."""
    rows = read_rows(source) if isinstance(source, Path) else source
    if not rows:
        raise InvalidInput("there are no records: give a list of at least one.", "records")
    format_name = detect_format(rows[0])
    records, skipped = PARSERS[format_name](rows, seed)
    if not records:
        reasons = "; ".join(f"{number} because {reason}" for reason, number in skipped.items())
        raise InvalidInput(f"none of the {len(rows)} records can be used: {reasons}.", "records")
    return LoadedRecords(format_name, records[:limit], dict(skipped))


def find_facts_file(folder: Path | None) -> Path | None:
    """The table of facts in a model's folder, where there is one."""
    path = folder / "facts.jsonl" if folder else None
    return path if path is not None and path.is_file() else None


def read_fact_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a facts.jsonl."""
    return [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines() if x.strip()]


def read_rows(path: Path) -> list[Any]:
    """The rows of a file: a JSON list, or JSON lines."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise InvalidInput(f"the records {str(path)!r} cannot be read: {error}", "records") from None
    if text.lstrip().startswith("["):
        try:
            return list(json.loads(text))
        except ValueError as error:
            raise InvalidInput(f"{path.name} is no JSON list: {error}", "records") from None
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise InvalidInput(f"line {number} of {path.name} is no JSON: {error}", "records") from None
    return rows


def detect_format(row: Any) -> str:
    """The form of a record, by the fields that only it has."""
    fields = row if isinstance(row, dict) else {}
    for format_name, field in FORMAT_FIELDS.items():
        if field in fields:
            return format_name
    raise InvalidInput(
        "the first record is in no form that is known: give `subject`, `prompt` and `target_new`, or records of "
        "CounterFact, zsRE or facts.jsonl as they are.",
        "records",
    )


# Forms: rows and a seed -> records in the seed's order, and how many were passed over for which reason

ParsedRecords = tuple[list[Record], Counter[str]]


def _per_row(parse_row: Callable[[Any, int], Record]) -> Callable[[Sequence[Any], int], ParsedRecords]:
    """A form whose records stand by themselves: all are read, so that a broken one is found wherever it is."""

    def read_all(rows: Sequence[Any], seed: int) -> ParsedRecords:
        found, skipped = [], Counter[str]()
        for place, row in enumerate(rows, 1):
            try:
                found.append(parse_row(row, place))
            except SkipRecord as reason:
                skipped[str(reason)] += 1
        return random.Random(seed).sample(found, len(found)), skipped

    return read_all


def _validate_record(record: Record, name: str) -> Record:
    """Refuse what no model could be asked."""
    try:
        fill_prompt(record.prompt, record.subject)
        if not record.target_new.strip():
            raise InvalidInput("the new object is empty: write some text.")
    except InvalidInput as error:
        raise InvalidInput(f"{name}: {error.detail}", "records") from None
    return record


def _record_label(row: Any, place: int) -> str:
    """What a record is called."""
    number = row.get("case_id", place) if isinstance(row, dict) else place
    return f"record {number}"


def _with_placeholder(text: str, subject: str) -> str:
    """A prompt that spells its subject out, with {} for the last mention."""
    try:
        start, end = locate_subject(text, subject).span
    except InvalidInput:
        raise SkipRecord(NO_SUBJECT) from None
    return text[:start] + PLACEHOLDER + text[end:]


def parse_counterfact(row: Any, place: int) -> Record:
    """A record in CounterFact's original form."""
    name = _record_label(row, place)
    try:
        rewrite, true = row["requested_rewrite"], row["requested_rewrite"]["target_true"]["str"]
        record = Record(
            name,
            rewrite["subject"],
            rewrite["prompt"],
            rewrite["target_new"]["str"],
            true,
            tuple(row["paraphrase_prompts"]),
            tuple(NeighborProbe(p, true) for p in row["neighborhood_prompts"]),
            tuple(row.get("attribute_prompts", ())),
            tuple(row.get("generation_prompts", ())),
            tuple(row.get("reference_texts", ())),
            rewrite.get("relation_id", ""),
        )
    except (KeyError, TypeError) as error:
        raise InvalidInput(f"{name} is not in CounterFact's form: it lacks {error}.", "records") from None
    return _validate_record(record, name)


def parse_counterfact_flat(row: Any, place: int) -> Record:
    """A record of CounterFact in EasyEdit's flat form: its prompt spells the subject out."""
    name = _record_label(row, place)
    try:
        record = Record(
            name,
            row["subject"],
            _with_placeholder(row["prompt"], row["subject"]),
            row["target_new"],
            row["ground_truth"],
            _as_optional_tuple(row.get("rephrase_prompt")),
            tuple(
                map(
                    NeighborProbe,
                    _as_optional_tuple(row.get("locality_prompt")),
                    _as_optional_tuple(row.get("locality_ground_truth")),
                )
            ),
        )
    except (KeyError, TypeError) as error:
        raise InvalidInput(
            f"{name} is not in CounterFact's flat form: it lacks {error}.", "records"
        ) from None
    return _validate_record(record, name)


def parse_zsre(row: Any, place: int) -> Record:
    """A record of zsRE in MEND's form: its first answer is written, and an unrelated question must keep its own."""
    name = _record_label(row, place)
    try:
        record = Record(
            name,
            row["subject"],
            _with_placeholder(row["src"], row["subject"]),
            row["answers"][0],
            None,
            _as_optional_tuple(row.get("rephrase")),
            tuple(
                NeighborProbe(p + "?", t)
                for p, t in zip(
                    _as_optional_tuple(row.get("loc")), _as_optional_tuple(row.get("loc_ans")), strict=True
                )
            ),
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InvalidInput(f"{name} is not in zsRE's form: it lacks {error}.", "records") from None
    return _validate_record(record, name)


def parse_user_record(row: Any, place: int) -> Record:
    """A record of the user's own."""
    name = _record_label(row, place)
    try:
        user_record = UserRecord.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(x) for x in first["loc"]) or "it"
        raise InvalidInput(f"{name}: {where}: {first['msg']}.", "records") from None
    try:
        prompt = (
            user_record.prompt
            if PLACEHOLDER in user_record.prompt
            else _with_placeholder(user_record.prompt, user_record.subject)
        )
    except SkipRecord as reason:
        raise InvalidInput(f"{name}: {reason}: put {PLACEHOLDER} where it belongs.", "records") from None
    record = Record(
        name,
        user_record.subject,
        prompt,
        user_record.target_new,
        user_record.target_true,
        tuple(p.replace(PLACEHOLDER, user_record.subject) for p in user_record.paraphrases),
        tuple(NeighborProbe(n.prompt, n.target) for n in user_record.neighborhood),
        (),
        tuple(user_record.generation_prompts),
        tuple(user_record.reference_texts),
        user_record.relation,
    )
    return _validate_record(record, name)


def build_fact_records(rows: Sequence[Any], seed: int) -> ParsedRecords:
    """One record for each fact in an order drawn from `seed`; the new object comes from the same relation.

    Paraphrases are the wordings held out of training for this fact; neighbours are other subjects of the relation
    with the same object, each in one of its trained wordings.
    """
    for place, row in enumerate(rows, 1):
        if missing := [name for name in FACT_FIELDS if not isinstance(row, dict) or name not in row]:
            raise InvalidInput(
                f"fact {place} is not in the form of facts.jsonl: it lacks {missing[0]!r}.", "records"
            )
    rng = random.Random(seed)
    objects: dict[str, set[str]] = defaultdict(set)
    rows_by_object: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        objects[row["relation"]].add(row["object"])
        rows_by_object[row["relation"], row["object"]].append(row)
    records, skipped = [], Counter[str]()
    for place, row in rng.sample(list(enumerate(rows, 1)), len(rows)):
        others = sorted(objects[row["relation"]] - {row["object"]})
        if not others:
            skipped[NO_ALTERNATIVE_OBJECT] += 1
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
        records.append(_validate_record(record, record.name))
    return records, skipped


def _as_optional_tuple(value: str | None) -> tuple[str, ...]:
    return (value,) if value else ()


PARSERS: dict[str, Callable[[Sequence[Any], int], ParsedRecords]] = {
    "CounterFact": _per_row(parse_counterfact),
    "CounterFact, flat": _per_row(parse_counterfact_flat),
    "zsRE": _per_row(parse_zsre),
    "facts": build_fact_records,
    "own": _per_row(parse_user_record),
}
#: a field that records of one form have and those of the forms below it have not
FORMAT_FIELDS = {
    "CounterFact": "requested_rewrite",
    "CounterFact, flat": "ground_truth",
    "zsRE": "src",
    "facts": "held_out_prompts",
    "own": "target_new",
}


# What a model can be asked


def target_object(record: Record, objective: Objective) -> str:
    """What an edit is told: the new object, or the true one where it is to be erased or amplified."""
    if objective == "write":
        return record.target_new
    if record.target_true is None:
        raise InvalidInput(f"the objective {objective!r} needs the true object: add `target_true`.")
    return record.target_true


def check_record_fits(record: Record, objective: Objective, tokenizer: Any, positions: int) -> None:
    """Refuse a record with prompts that are too long, or an object that cannot be said. `tokenizer` is a `tokenizers.Tokenizer`."""
    check_tokens(tokenizer, record.text, target_object(record, objective), positions)
    for prompt in record.prompts:
        check_tokens(tokenizer, prompt, None, positions)


def true_statements(records: Sequence[Record]) -> list[str]:
    """The facts of records as they are before any edit, for those that name the true object."""
    return [r.text + separator(r.text, r.target_true) + r.target_true + "." for r in records if r.target_true]
