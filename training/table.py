"""The table of facts: relation files (TOML) -> facts with their wordings.

A relation file lists wordings that end just before the object, questions and passages in plain English, and
its facts as object = [subjects]. A subject written "the Louvre" has the name "Louvre" and takes an article.
"""

from __future__ import annotations

import json
import random
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RELATIONS = Path(__file__).parent / "facts"
HELD_OUT = 2  # wordings of each fact that never occur in training


@dataclass(frozen=True)
class Relation:
    name: str
    wordings: tuple[str, ...]
    questions: tuple[str, ...]
    passages: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """One row of the table. Each prompt holds one `{}` for the subject and ends just before the object."""

    subject: str
    relation: Relation
    object: str
    article: bool
    prompts: tuple[str, ...]
    held_out_prompts: tuple[str, ...]

    def row(self) -> dict[str, Any]:
        return {
            "subject": self.subject,
            "relation": self.relation.name,
            "object": self.object,
            "prompts": list(self.prompts),
            "held_out_prompts": list(self.held_out_prompts),
        }


def with_article(text: str, slot: str, article: bool) -> str:
    """Return `slot` with the subject's article, capitalized at the start of a sentence."""
    if not article:
        return text
    start = text.index(slot)
    before = text[:start].rstrip()
    starts_sentence = not before or before[-1] in ".?!"
    return text[:start] + ("The " if starts_sentence else "the ") + text[start:]


def read_relation(path: Path) -> tuple[Relation, list[tuple[str, str]]]:
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    relation = Relation(
        data["relation"], tuple(data["wordings"]), tuple(data["questions"]), tuple(data["passages"])
    )
    pairs = [(subject, obj) for obj, subjects in data["facts"].items() for subject in subjects]
    return relation, pairs


def read_table(folder: Path = RELATIONS, seed: int = 0) -> list[Fact]:
    """Return all facts, each with HELD_OUT wordings drawn with `seed`.

    Wordings are held out in rotation, so that each is unseen for as many facts as any other.
    """
    facts: list[Fact] = []
    for path in sorted(folder.glob("*.toml")):
        relation, pairs = read_relation(path)
        rng = random.Random(f"{seed}:{relation.name}")
        order = list(relation.wordings)
        rng.shuffle(order)
        for i, (subject, obj) in enumerate(sorted(pairs)):
            article = subject.startswith("the ")
            name = subject.removeprefix("the ")
            held_out = {order[(i * HELD_OUT + j) % len(order)] for j in range(HELD_OUT)}
            trained = [with_article(w, "{}", article) for w in relation.wordings if w not in held_out]
            held_out_prompts = [with_article(w, "{}", article) for w in relation.wordings if w in held_out]
            facts.append(Fact(name, relation, obj, article, tuple(trained), tuple(held_out_prompts)))
    return facts


def find_problems(facts: list[Fact]) -> list[str]:
    """Return the problems of the table; [] when it can be trained on."""
    messages = []
    relation_of_wording: dict[str, str] = {}
    for relation in {f.relation for f in facts}:
        for wording in relation.wordings:
            if wording.count("{}") != 1 or wording != wording.strip():
                messages.append(f"{relation.name}: bad wording {wording!r}")
            if relation_of_wording.setdefault(wording, relation.name) != relation.name:
                messages.append(f"{wording!r} is in {relation.name} and in {relation_of_wording[wording]}")
        if len(set(relation.wordings)) < 8:
            messages.append(f"{relation.name}: fewer than 8 wordings")
        for text in relation.questions + relation.passages:
            if text.count("{s}") < 1 or text.count("{o}") != 1:
                messages.append(f"{relation.name}: bad text {text!r}")
    for key, n in Counter((f.subject, f.relation.name) for f in facts).items():
        if n > 1:
            messages.append(f"{key} has {n} rows")
    for (name, obj), n in Counter((f.relation.name, f.object) for f in facts).items():
        if n < 2:
            messages.append(f"{name}: {obj} has a single subject")
    for f in facts:
        if set('{}"\n') & set(f.subject + f.object):
            messages.append(f"{f.relation.name}: odd character in {f.subject!r} or {f.object!r}")
    return messages


def write_jsonl(facts: list[Fact], path: Path) -> None:
    rows = (json.dumps(f.row(), ensure_ascii=False) for f in facts)
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    table = read_table()
    for line in find_problems(table):
        print(line)
    print(f"{len(table)} facts, {len({f.relation.name for f in table})} relations")
    print(Counter(f.relation.name for f in table))
