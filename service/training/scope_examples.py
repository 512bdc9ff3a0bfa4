"""The texts with which a scope classifier is trained and measured, split by subject. Free of torch.

A fact has texts within its scope, its paraphrases, and three kinds of texts out of it: those about its subject with
another relation, those of its relation about another subject, and any others. The first two are the hard ones: a
classifier that was trained without them tells apart either the subjects or the relations.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from service.datasets.record import Record
from service.errors import InvalidInput
from service.kit.names_in_text import NameFinder
from service.kit.separator import separator
from service.kit.text import normalize_whitespace

OutsideKind = Literal["subject", "relation", "other"]  #: what a text out of scope has in common with the fact
OUTSIDE_KINDS: tuple[OutsideKind, ...] = ("subject", "relation", "other")
MAX_MEASURED = 4  # texts of each kind that are measured for a fact
MAX_NEIGHBORS = 2  # neighbours of a fact that are read
MIN_FACTS = 8  # with paraphrases, in all parts together


@dataclass(frozen=True)
class ScopeFact:
    """A fact as a record of the memory, and the texts about it."""

    subject: str
    relation: str
    prompt: str
    statement: str  #: the prompt with the object
    paraphrases: tuple[str, ...]
    neighbors: tuple[str, ...]  #: of the relation, about other subjects

    @property
    def key_texts(self) -> tuple[str, str]:
        return self.prompt, self.statement

    @property
    def prompts(self) -> tuple[str, ...]:
        """All prompts about the fact."""
        return (self.prompt, *self.paraphrases)

    def names_subject(self, text: str) -> bool:
        """Return whether a text contains the subject."""
        return self._finder.is_in(text)

    @cached_property
    def _finder(self) -> NameFinder:
        return NameFinder([self.subject])


class OutsideText(NamedTuple):
    """A text out of the scope of a fact."""

    kind: OutsideKind
    text: str


@dataclass(frozen=True)
class ScopePart:
    """The facts of some subjects."""

    facts: tuple[ScopeFact, ...]

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """Every text, each once."""
        each = (t for f in self.facts for t in (*f.key_texts, *f.paraphrases, *f.neighbors))
        return tuple(dict.fromkeys(each))

    @cached_property
    def _by_subject(self) -> dict[str, list[ScopeFact]]:
        return _group(self.facts, lambda f: f.subject)

    @cached_property
    def _by_relation(self) -> dict[str, list[ScopeFact]]:
        return _group(self.facts, lambda f: f.relation)

    def draw_within(self, fact: ScopeFact, rng: random.Random) -> str:
        """Return a paraphrase of a fact."""
        return rng.choice(fact.paraphrases)

    def draw_outside(self, fact: ScopeFact, rng: random.Random) -> list[OutsideText]:
        """Return a text of each kind that there is for a fact."""
        drawn = (self._draw_of_subject, self._draw_of_relation, self._draw_other)
        texts = [(kind, draw(fact, rng)) for kind, draw in zip(OUTSIDE_KINDS, drawn, strict=True)]
        return [OutsideText(kind, text) for kind, text in texts if text is not None]

    def _draw_of_subject(self, fact: ScopeFact, rng: random.Random) -> str | None:
        others = [f for f in self._by_subject[fact.subject] if not _same_fact(f, fact)]
        return rng.choice(rng.choice(others).prompts) if others else None

    def _draw_of_relation(self, fact: ScopeFact, rng: random.Random) -> str | None:
        others = self._by_relation[fact.relation] if fact.relation else []
        other = _draw_other_fact(others, fact, rng)
        if fact.neighbors and (other is None or rng.random() < 0.5):
            return rng.choice(fact.neighbors)
        return rng.choice(other.prompts) if other is not None else None

    def _draw_other(self, fact: ScopeFact, rng: random.Random) -> str | None:
        other = _draw_other_fact(self.facts, fact, rng)
        return rng.choice(other.prompts) if other is not None else None


class ScopeSplit(NamedTuple):
    """The parts of a training. No subject is in two of them."""

    training: ScopePart
    threshold: ScopePart  #: by which the threshold is chosen
    measured: ScopePart  #: of the figures


class MeasuredPair(NamedTuple):
    """A text and a fact of a held-out part."""

    text: str
    fact: int
    kind: OutsideKind | None  #: None: it is within the scope of the fact
    names_subject: bool


def scope_facts(records: Sequence[Record]) -> list[ScopeFact]:
    """Return the facts of records that have paraphrases, and are plain texts."""
    return [
        ScopeFact(
            normalize_whitespace(r.subject),
            r.relation,
            r.text,
            r.text + separator(r.text, r.target_new) + r.target_new,
            r.paraphrases,
            tuple(n.prompt for n in r.neighbours[:MAX_NEIGHBORS]),
        )
        for r in records
        if r.paraphrases and not r.messages
    ]


def split_by_subject(facts: Sequence[ScopeFact], seed: int) -> ScopeSplit:
    """Return half of the subjects for training, a quarter for the threshold and a quarter for the figures. Raise
    InvalidInput for too few facts."""
    subjects = sorted({f.subject for f in facts})
    if len(facts) < MIN_FACTS or len(subjects) < MIN_FACTS:
        raise InvalidInput(
            f"a training needs records with paraphrases of at least {MIN_FACTS} subjects, and there are {len(subjects)}.",
            "records",
        )
    random.Random(seed).shuffle(subjects)
    part_of = {s: (0, 1, 0, 2)[i % 4] for i, s in enumerate(subjects)}
    parts = [ScopePart(tuple(f for f in facts if part_of[f.subject] == number)) for number in range(3)]
    return ScopeSplit(*parts)


def measured_pairs(part: ScopePart, seen: Iterable[str], seed: int) -> list[MeasuredPair]:
    """Return the pairs by which a part is measured: every paraphrase of each fact, and at most `MAX_MEASURED` texts of
    each kind out of scope. `seen`: texts of the training, which are left out."""
    rng, left_out = random.Random(seed), set(seen)
    pairs: dict[MeasuredPair, None] = {}
    for number, fact in enumerate(part.facts):
        within = [(None, text) for text in fact.paraphrases]
        outside = [o for _ in range(MAX_MEASURED) for o in part.draw_outside(fact, rng)]
        for kind, text in [*within, *outside]:
            if text not in left_out:
                pairs[MeasuredPair(text, number, kind, fact.names_subject(text))] = None
    return list(pairs)


def _group(facts: Sequence[ScopeFact], key: Callable[[ScopeFact], str]) -> dict[str, list[ScopeFact]]:
    groups: dict[str, list[ScopeFact]] = defaultdict(list)
    for fact in facts:
        groups[key(fact)].append(fact)
    return groups


def _same_fact(a: ScopeFact, b: ScopeFact) -> bool:
    return a is b or (a.subject == b.subject and a.relation == b.relation and bool(a.relation))


def _draw_other_fact(facts: Sequence[ScopeFact], fact: ScopeFact, rng: random.Random) -> ScopeFact | None:
    """Return a fact about another subject; None if a few draws find none."""
    for _ in range(8):
        if facts and (other := rng.choice(facts)).subject != fact.subject:
            return other
    return None
