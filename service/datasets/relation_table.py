"""The facts of a table by relation: which relation a prompt is about, how else the table words it, and subjects of the
same kind.

A table words each subject either with or without an article: "The {} is located in" for Louvre, "{} is located in" for
Notre-Dame. Prompts and subjects are combined only where they are alike in that.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from service.datasets.fact_table import FactRow
from service.datasets.parsing import validate_row
from service.errors import InvalidInput
from service.kit.steps import Phase, Progress, Stepper
from service.kit.text import PLACEHOLDER, fill_prompt, normalize_whitespace

ROWS_PER_STEP = 250
_ARTICLE = re.compile(r"\bthe\s+(?=\{\})", re.IGNORECASE)


@dataclass
class RelationFacts:
    """The subjects of one relation, and the wordings that the table has for each."""

    subjects: dict[str, FactRow] = field(default_factory=dict)  #: by `_name_key`

    def rewordings(self, subject: str, prompt: str) -> list[str]:
        """Return other texts that say the same as a prompt about a subject: in the wordings of the subject, or for an
        unknown subject in those of all subjects like it. Those that were held out of training come first."""
        fact = self.subjects.get(_name_key(subject))
        name, facts = subject, [f for f in self.subjects.values() if _alike(f, prompt)]
        if fact is not None:
            name, facts = fact.subject, [fact]
        wordings = dict.fromkeys([w for f in facts for w in f.held_out_prompts])
        wordings |= dict.fromkeys([w for f in facts for w in f.prompts])
        return [
            fill_prompt(wording, name).text
            for wording in wordings
            if wording.count(PLACEHOLDER) == 1 and _wording_key(wording) != _wording_key(prompt)
        ]

    def others_than(self, subject: str, prompt: str) -> list[str]:
        """Return the other subjects that the table words with an article where the prompt has one."""
        own = _name_key(subject)
        return [f.subject for key, f in self.subjects.items() if key != own and _alike(f, prompt)]


@dataclass(frozen=True)
class RelationMatch:
    """The relation that a prompt is about."""

    facts: RelationFacts
    #: whether the prompt is one of the table's wordings; otherwise only the kind of its subject is known
    by_wording: bool


class RelationTable:
    """The facts of a table by relation."""

    def __init__(self) -> None:
        self._relations: dict[str, RelationFacts] = defaultdict(RelationFacts)
        self._by_wording: dict[str, set[str]] = defaultdict(set)
        self._by_subject: dict[str, list[FactRow]] = defaultdict(list)

    def add(self, fact: FactRow) -> None:
        """Add a fact."""
        self._relations[fact.relation].subjects.setdefault(_name_key(fact.subject), fact)
        self._by_subject[_name_key(fact.subject)].append(fact)
        for wording in (*fact.prompts, *fact.held_out_prompts):
            self._by_wording[_wording_key(wording)].add(fact.relation)

    def subjects(self) -> list[str]:
        """Return the names of all subjects, in the order of the table."""
        return [facts[0].subject for facts in self._by_subject.values()]

    def find(self, prompt: str, subject: str, true: str) -> RelationMatch | None:
        """Return the relation of a prompt that is one of the table's wordings. For another prompt return a relation of
        the subject, of several the one in which it has the true object, for subjects of the same kind."""
        known = self._by_subject.get(_name_key(subject), [])
        named = self._relations_of_wording(prompt, subject)
        if len(named) == 1:
            return RelationMatch(self._relations[next(iter(named))], True)
        with_true = [f for f in known if _name_key(f.object) == _name_key(true)]
        for fact in (*with_true, *known):
            return RelationMatch(self._relations[fact.relation], False)
        return None

    def other_facts(self, prompt: str, subject: str, true: str) -> list[FactRow]:
        """Return the facts of a subject in other relations than that of a prompt: not those of which the prompt is a
        wording, and not those in which the subject has the true object. Without either the prompt can be about any
        relation of the subject, and there are none."""
        known = self._by_subject.get(_name_key(subject), [])
        own = self._relations_of_wording(prompt, subject)
        own |= {f.relation for f in known if _name_key(f.object) == _name_key(true)}
        return [f for f in known if f.relation not in own] if own else []

    def _relations_of_wording(self, prompt: str, subject: str) -> set[str]:
        """Return the relations of which a prompt is a wording; of several, those of the subject."""
        named = self._by_wording.get(_wording_key(prompt), set())
        known = {f.relation for f in self._by_subject.get(_name_key(subject), [])}
        return named & known if len(named) > 1 else set(named)


def load_relation_table(path: Path) -> Stepper[RelationTable]:
    """Read a table of facts. Raise InvalidInput if it cannot be read."""
    table = RelationTable()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        for place, line in enumerate(lines, 1):
            if line.strip():
                table.add(validate_row(FactRow, json.loads(line), f"line {place} of {path.name}", "fact"))
            if place % ROWS_PER_STEP == 0:
                yield Progress(Phase.PREPARE, place, len(lines))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"the table of facts {str(path)!r} cannot be read: {error}", "facts") from None
    return table


def _name_key(name: str) -> str:
    return normalize_whitespace(name).casefold().removeprefix("the ")


def _wording_key(prompt: str) -> str:
    return _ARTICLE.sub("", normalize_whitespace(prompt)).casefold()


def _has_article(prompt: str) -> bool:
    return _ARTICLE.search(prompt) is not None


def _alike(fact: FactRow, prompt: str) -> bool:
    """Whether the table words a fact with an article where the prompt has one."""
    return any(map(_has_article, fact.prompts)) == _has_article(prompt)
