"""Editing problems from both forms of records: service.evaluation.cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.errors import InvalidInput
from service.evaluation.cases import Case, case_from_counterfact, cases_from_facts, read_cases

RECORD: dict[str, Any] = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "The {} is located in the city of",
        "subject": "Eiffel Tower",
        "target_new": {"str": "Rome", "id": "Q220"},
        "target_true": {"str": "Paris", "id": "Q90"},
        "relation_id": "P131",
    },
    "paraphrase_prompts": ["One finds the Eiffel Tower in"],
    "neighborhood_prompts": ["The Louvre is in", "Notre-Dame is in"],
}


def fact(subject: str, object_: str, relation: str = "city") -> dict[str, Any]:
    return {
        "subject": subject,
        "object": object_,
        "relation": relation,
        "prompts": ["The {} is in", "{} stands in"],
        "held_out_prompts": ["Where is {}? In"],
    }


FACTS = [
    fact("Eiffel Tower", "Paris"),
    fact("Louvre", "Paris"),
    fact("Notre-Dame", "Paris"),
    fact("Colosseum", "Rome"),
    fact("Big {0} Ben", "London"),
    fact("Eiffel Tower", "Gustave Eiffel", "builder"),
    fact("Panama Canal", "Ferdinand", "builder"),
]


def test_a_counterfact_record() -> None:
    """A record in CounterFact's form is read field by field."""
    assert case_from_counterfact(RECORD) == Case(
        "Eiffel Tower",
        "The {} is located in the city of",
        "Paris",
        "Rome",
        ("One finds the Eiffel Tower in",),
        ("The Louvre is in", "Notre-Dame is in"),
        "P131",
    )


@pytest.mark.parametrize("lost", ["requested_rewrite", "paraphrase_prompts", "neighborhood_prompts"])
def test_what_a_record_lacks_is_said(lost: str) -> None:
    """A record without a field is refused with its number and the field's name."""
    with pytest.raises(InvalidInput, match=f"record 7 .*lacks '{lost}'"):
        case_from_counterfact({k: v for k, v in RECORD.items() if k != lost})


@pytest.mark.parametrize("wrong", ["text", 3, None, ["a"]])
def test_what_is_no_record_is_refused(wrong: Any) -> None:
    """Something that is not even an object is refused, not stumbled over."""
    with pytest.raises(InvalidInput, match="CounterFact's form"):
        case_from_counterfact(wrong)


@pytest.mark.parametrize("lost", ["subject", "object", "relation", "prompts", "held_out_prompts"])
def test_what_a_fact_lacks_is_said(lost: str) -> None:
    """A row of facts.jsonl without a field is refused with its place and the field's name."""
    broken = [*FACTS[:2], {k: v for k, v in FACTS[2].items() if k != lost}]
    with pytest.raises(InvalidInput, match=f"3.*lacks '{lost}'"):
        cases_from_facts(broken)


def test_every_fact_gives_one_case() -> None:
    """A new object is another of the same relation; probes spell their subjects out, braces included."""
    cases = cases_from_facts(FACTS)
    assert sorted((c.subject, c.target_true) for c in cases) == sorted(
        (f["subject"], f["object"]) for f in FACTS
    )
    for case in cases:
        same = {f["object"] for f in FACTS if f["relation"] == case.relation}
        assert case.target_new in same - {case.target_true}
        assert case.prompt.count("{}") == 1
        assert case.paraphrases == (f"Where is {case.subject}? In",)
        assert not any("{}" in p for p in (*case.paraphrases, *case.neighbours))


def test_neighbours_share_the_object_and_not_the_subject() -> None:
    """Neighbours are other subjects of the relation with the same true object."""
    case = next(c for c in cases_from_facts(FACTS) if c.subject == "Louvre")
    assert len(case.neighbours) == 2
    assert all(any(s in p for s in ("Eiffel Tower", "Notre-Dame")) for p in case.neighbours)
    alone = next(c for c in cases_from_facts(FACTS) if c.subject == "Colosseum")
    assert alone.neighbours == ()


def test_a_relation_with_one_object_has_no_case() -> None:
    """Where there is no other object to write, there is nothing to edit."""
    assert len(cases_from_facts([*FACTS, fact("Moon", "Earth", "orbit")])) == len(FACTS)


def test_the_order_is_that_of_the_seed() -> None:
    """One seed gives one order and one choice; another seed another."""
    assert cases_from_facts(FACTS, 1) == cases_from_facts(FACTS, 1)
    assert cases_from_facts(FACTS, 1) != cases_from_facts(FACTS, 2)


def test_both_files_are_read(tmp_path: Path) -> None:
    """A .jsonl is a table of facts, a .json holds CounterFact records; either in the seed's order."""
    facts, records = tmp_path / "facts.jsonl", tmp_path / "counterfact.json"
    facts.write_text("\n".join(map(json.dumps, FACTS)) + "\n\n", encoding="utf-8")
    records.write_text(json.dumps([RECORD, RECORD | {"paraphrase_prompts": []}]), encoding="utf-8")
    assert read_cases(facts, 3) == cases_from_facts(FACTS, 3)
    assert sorted(len(c.paraphrases) for c in read_cases(records)) == [0, 1]
