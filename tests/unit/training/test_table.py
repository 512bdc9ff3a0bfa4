"""The table of facts: training/table.py."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import table
from table import Fact, read_table, write_jsonl


@pytest.fixture(scope="module")
def facts() -> list[Fact]:
    return read_table()


def test_the_table_is_large(facts: list[Fact]) -> None:
    """The table has at least 2,000 facts of at least 20 relations, and no problems are found in it."""
    assert len(facts) >= 2000
    assert len({f.relation.name for f in facts}) >= 20
    assert table.find_problems(facts) == []


def test_relations_have_many_wordings(facts: list[Fact]) -> None:
    """Each relation has at least eight different wordings, and no two relations share one."""
    relations = {f.relation.name: f.relation for f in facts}.values()
    assert all(len(set(r.wordings)) == len(r.wordings) >= 8 for r in relations)
    assert max(Counter(w for r in relations for w in r.wordings).values()) == 1


def test_wordings_are_held_out(facts: list[Fact]) -> None:
    """Each fact has at least two held-out wordings. All other wordings of its relation are trained."""
    for f in facts:
        assert len(set(f.held_out_prompts)) >= 2
        assert not set(f.prompts) & set(f.held_out_prompts)
        assert len(f.prompts) + len(f.held_out_prompts) == len(f.relation.wordings)


def test_every_wording_is_held_out_as_often(facts: list[Fact]) -> None:
    """The wordings of a relation are held out equally often, up to one fact."""
    times = Counter(
        (f.relation.name, w)
        for f in facts
        for w in f.relation.wordings
        if table.with_article(w, "{}", f.article) in f.held_out_prompts
    )
    for relation in {f.relation.name: f.relation for f in facts}.values():
        counts = [times[relation.name, w] for w in relation.wordings]
        assert max(counts) - min(counts) <= 1


def test_prompts_have_one_place_for_the_subject(facts: list[Fact]) -> None:
    """Each prompt has one `{}`, and no subject or object contains a brace."""
    assert all(p.count("{}") == 1 for f in facts for p in (*f.prompts, *f.held_out_prompts))
    assert not [f for f in facts if set("{}") & set(f.subject + f.object)]


def test_objects_have_several_subjects(facts: list[Fact]) -> None:
    """Each object of a relation has at least two subjects, so that edits have neighbours. Each subject has
    one object."""
    assert min(Counter((f.relation.name, f.object) for f in facts).values()) >= 2
    assert max(Counter((f.relation.name, f.subject) for f in facts).values()) == 1


def test_a_bad_table_is_rejected(facts: list[Fact]) -> None:
    """A repeated subject, an object with one subject and an invalid character are each reported."""
    first = facts[0]
    assert any("has 2 rows" in p for p in table.find_problems([*facts, first]))
    assert any(
        "single subject" in p for p in table.find_problems([*facts, replace(first, subject="x", object="y")])
    )
    assert any("odd character" in p for p in table.find_problems([*facts, replace(first, subject="a {} b")]))


def test_the_table_is_the_same_each_time(facts: list[Fact], tmp_path: Path) -> None:
    """Reading the table is deterministic, and another seed holds out other wordings. A JSON row has the
    documented fields."""
    assert read_table() == facts
    other = read_table(seed=1)
    assert [f.subject for f in other] == [f.subject for f in facts]
    assert [f.held_out_prompts for f in other] != [f.held_out_prompts for f in facts]
    write_jsonl(facts[:3], tmp_path / "facts.jsonl")
    rows = [json.loads(x) for x in (tmp_path / "facts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == [f.row() for f in facts[:3]]
    assert set(rows[0]) == {"subject", "relation", "object", "prompts", "held_out_prompts"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{} is in", "The {} is in"),
        ("To see {}, go to", "To see the {}, go to"),
        ("It is old. {} is in", "It is old. The {} is in"),
    ],
)
def test_articles(text: str, expected: str) -> None:
    """The article of a subject is capitalized only at the beginning of a sentence."""
    assert table.with_article(text, "{}", article=True) == expected
    assert table.with_article(text, "{}", article=False) == text
