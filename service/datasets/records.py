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
from service.kit.text import SLOT, check_tokens, fill, find, separator
from service.schemas import Asked, Name, Neighbour, Objective, Text

NEIGHBOURS = 10
FACT = ("subject", "object", "relation", "prompts", "held_out_prompts")
NO_SUBJECT = "the prompt does not mention the subject"
NO_OTHER = "its relation has no other object to write"


class Near(NamedTuple):
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
    neighbours: tuple[Near, ...] = ()
    attribute_prompts: tuple[str, ...] = ()  #: about other subjects that have the new object
    generation_prompts: tuple[str, ...] = ()
    reference_texts: tuple[str, ...] = ()  #: about subjects that have the new object
    relation: str = ""

    @property
    def text(self) -> str:
        """The prompt with the subject in it."""
        return fill(self.prompt, self.subject).text

    @property
    def prompts(self) -> tuple[str, ...]:
        """The texts after which a model is asked for an object."""
        return (self.text, *self.paraphrases, *(n.prompt for n in self.neighbours))

    @property
    def lacks(self) -> tuple[str, ...]:
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
class Reading:
    """What was read: records in an order drawn from a seed, and how many were passed over, by the reason."""

    form: str
    records: list[Record]
    skipped: dict[str, int]


class Skipped(Exception):
    """A sound record that is no editing problem."""


class OwnRecord(Asked):
    """A record of the user's own. `prompt` holds {} for the subject, or spells it out, as may paraphrases."""

    subject: Name
    prompt: Text
    target_new: Name
    target_true: Name | None = None
    paraphrases: list[Text] = Field(default_factory=list)
    neighborhood: list[Neighbour] = Field(default_factory=list)
    generation_prompts: list[Text] = Field(default_factory=list)
    reference_texts: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    relation: str = ""


# Files and lists


def read_records(source: Path | Sequence[Any], seed: int = 0, limit: int | None = None) -> list[Record]:
    """The records of `read`."""
    return read(source, seed, limit).records


def read(source: Path | Sequence[Any], seed: int = 0, limit: int | None = None) -> Reading:
    """Records of any form, from a file (a JSON list, or JSON lines) or a list, the first `limit` in the seed's order."""
    rows = rows_of(source) if isinstance(source, Path) else source
    if not rows:
        raise InvalidInput("there are no records: give a list of at least one.", "records")
    form = form_of(rows[0])
    found, skipped = FORMS[form](rows, seed)
    if not found:
        why = "; ".join(f"{number} because {reason}" for reason, number in skipped.items())
        raise InvalidInput(f"none of the {len(rows)} records can be used: {why}.", "records")
    return Reading(form, found[:limit], dict(skipped))


def facts_beside(folder: Path | None) -> Path | None:
    """The table of facts in a model's folder, where there is one."""
    path = folder / "facts.jsonl" if folder else None
    return path if path is not None and path.is_file() else None


def read_facts(path: Path) -> list[dict[str, Any]]:
    """The rows of a facts.jsonl."""
    return [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines() if x.strip()]


def rows_of(path: Path) -> list[Any]:
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


def form_of(row: Any) -> str:
    """The form of a record, by the fields that only it has."""
    known = row if isinstance(row, dict) else {}
    for form, field in SIGNS.items():
        if field in known:
            return form
    raise InvalidInput(
        "the first record is in no form that is known: give `subject`, `prompt` and `target_new`, or records of "
        "CounterFact, zsRE or facts.jsonl as they are.",
        "records",
    )


# Forms: rows and a seed -> records in the seed's order, and how many were passed over for which reason

Found = tuple[list[Record], Counter[str]]


def _each(read_one: Callable[[Any, int], Record]) -> Callable[[Sequence[Any], int], Found]:
    """A form whose records stand by themselves: all are read, so that a broken one is found wherever it is."""

    def read_all(rows: Sequence[Any], seed: int) -> Found:
        found, skipped = [], Counter[str]()
        for place, row in enumerate(rows, 1):
            try:
                found.append(read_one(row, place))
            except Skipped as reason:
                skipped[str(reason)] += 1
        return random.Random(seed).sample(found, len(found)), skipped

    return read_all


def _checked(record: Record, name: str) -> Record:
    """Refuse what no model could be asked."""
    try:
        fill(record.prompt, record.subject)
        if not record.target_new.strip():
            raise InvalidInput("the new object is empty: write some text.")
    except InvalidInput as error:
        raise InvalidInput(f"{name}: {error.detail}", "records") from None
    return record


def _numbered(row: Any, place: int) -> str:
    """What a record is called."""
    known = row.get("case_id", place) if isinstance(row, dict) else place
    return f"record {known}"


def _opened(text: str, subject: str) -> str:
    """A prompt that spells its subject out, with {} for the last mention."""
    try:
        start, end = find(text, subject).span
    except InvalidInput:
        raise Skipped(NO_SUBJECT) from None
    return text[:start] + SLOT + text[end:]


def counterfact(row: Any, place: int) -> Record:
    """A record in CounterFact's original form."""
    name = _numbered(row, place)
    try:
        rewrite, true = row["requested_rewrite"], row["requested_rewrite"]["target_true"]["str"]
        record = Record(
            name,
            rewrite["subject"],
            rewrite["prompt"],
            rewrite["target_new"]["str"],
            true,
            tuple(row["paraphrase_prompts"]),
            tuple(Near(p, true) for p in row["neighborhood_prompts"]),
            tuple(row.get("attribute_prompts", ())),
            tuple(row.get("generation_prompts", ())),
            tuple(row.get("reference_texts", ())),
            rewrite.get("relation_id", ""),
        )
    except (KeyError, TypeError) as error:
        raise InvalidInput(f"{name} is not in CounterFact's form: it lacks {error}.", "records") from None
    return _checked(record, name)


def counterfact_flat(row: Any, place: int) -> Record:
    """A record of CounterFact in EasyEdit's flat form: its prompt spells the subject out."""
    name = _numbered(row, place)
    try:
        record = Record(
            name,
            row["subject"],
            _opened(row["prompt"], row["subject"]),
            row["target_new"],
            row["ground_truth"],
            _some(row.get("rephrase_prompt")),
            tuple(map(Near, _some(row.get("locality_prompt")), _some(row.get("locality_ground_truth")))),
        )
    except (KeyError, TypeError) as error:
        raise InvalidInput(
            f"{name} is not in CounterFact's flat form: it lacks {error}.", "records"
        ) from None
    return _checked(record, name)


def zsre(row: Any, place: int) -> Record:
    """A record of zsRE in MEND's form: its first answer is written, and an unrelated question must keep its own."""
    name = _numbered(row, place)
    try:
        record = Record(
            name,
            row["subject"],
            _opened(row["src"], row["subject"]),
            row["answers"][0],
            None,
            _some(row.get("rephrase")),
            tuple(
                Near(p + "?", t)
                for p, t in zip(_some(row.get("loc")), _some(row.get("loc_ans")), strict=True)
            ),
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InvalidInput(f"{name} is not in zsRE's form: it lacks {error}.", "records") from None
    return _checked(record, name)


def own(row: Any, place: int) -> Record:
    """A record of the user's own."""
    name = _numbered(row, place)
    try:
        asked = OwnRecord.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(x) for x in first["loc"]) or "it"
        raise InvalidInput(f"{name}: {where}: {first['msg']}.", "records") from None
    try:
        prompt = asked.prompt if SLOT in asked.prompt else _opened(asked.prompt, asked.subject)
    except Skipped as reason:
        raise InvalidInput(f"{name}: {reason}: put {SLOT} where it belongs.", "records") from None
    record = Record(
        name,
        asked.subject,
        prompt,
        asked.target_new,
        asked.target_true,
        tuple(p.replace(SLOT, asked.subject) for p in asked.paraphrases),
        tuple(Near(n.prompt, n.target) for n in asked.neighborhood),
        (),
        tuple(asked.generation_prompts),
        tuple(asked.reference_texts),
        asked.relation,
    )
    return _checked(record, name)


def facts(rows: Sequence[Any], seed: int) -> Found:
    """One record for each fact in an order drawn from `seed`; the new object comes from the same relation.

    Paraphrases are the wordings held out of training for this fact; neighbours are other subjects of the relation
    with the same object, each in one of its trained wordings.
    """
    for place, row in enumerate(rows, 1):
        if lost := [name for name in FACT if not isinstance(row, dict) or name not in row]:
            raise InvalidInput(
                f"fact {place} is not in the form of facts.jsonl: it lacks {lost[0]!r}.", "records"
            )
    rng = random.Random(seed)
    objects: dict[str, set[str]] = defaultdict(set)
    sharing: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        objects[row["relation"]].add(row["object"])
        sharing[row["relation"], row["object"]].append(row)
    found, skipped = [], Counter[str]()
    for place, row in rng.sample(list(enumerate(rows, 1)), len(rows)):
        others = sorted(objects[row["relation"]] - {row["object"]})
        if not others:
            skipped[NO_OTHER] += 1
            continue
        near = [r for r in sharing[row["relation"], row["object"]] if r["subject"] != row["subject"]]
        chosen = rng.sample(near, min(NEIGHBOURS, len(near)))
        record = Record(
            f"fact {place}",
            row["subject"],
            rng.choice(row["prompts"]),
            rng.choice(others),
            row["object"],
            tuple(p.replace(SLOT, row["subject"]) for p in row["held_out_prompts"]),
            tuple(Near(rng.choice(r["prompts"]).replace(SLOT, r["subject"]), row["object"]) for r in chosen),
            relation=row["relation"],
        )
        found.append(_checked(record, record.name))
    return found, skipped


def _some(value: str | None) -> tuple[str, ...]:
    return (value,) if value else ()


FORMS: dict[str, Callable[[Sequence[Any], int], Found]] = {
    "CounterFact": _each(counterfact),
    "CounterFact, flat": _each(counterfact_flat),
    "zsRE": _each(zsre),
    "facts": facts,
    "own": _each(own),
}
#: a field that records of one form have and those of the forms below it have not
SIGNS = {
    "CounterFact": "requested_rewrite",
    "CounterFact, flat": "ground_truth",
    "zsRE": "src",
    "facts": "held_out_prompts",
    "own": "target_new",
}


# What a model can be asked


def wanted_object(record: Record, objective: Objective) -> str:
    """What an edit is told: the new object, or the true one where it is to be erased or amplified."""
    if objective == "write":
        return record.target_new
    if record.target_true is None:
        raise InvalidInput(f"the objective {objective!r} needs the true object: add `target_true`.")
    return record.target_true


def check_askable(record: Record, objective: Objective, tokenizer: Any, positions: int) -> None:
    """Refuse a record with prompts that are too long, or an object that cannot be said. `tokenizer` is a `tokenizers.Tokenizer`."""
    check_tokens(tokenizer, record.text, wanted_object(record, objective), positions)
    for prompt in record.prompts:
        check_tokens(tokenizer, prompt, None, positions)


def statements(records: Sequence[Record]) -> list[str]:
    """The facts of records as they are before any edit, for those that name the true object."""
    return [r.text + separator(r.text, r.target_true) + r.target_true + "." for r in records if r.target_true]
