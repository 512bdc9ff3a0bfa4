"""Editing problems from every form of records: service.datasets.records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.datasets.records import (
    NO_ALTERNATIVE_OBJECT,
    NO_SUBJECT,
    NeighborProbe,
    Record,
    load_records,
    read_records,
    true_statements,
)
from service.errors import InvalidInput
from tests.support.paths import SHARED_DATA

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
FLAT: dict[str, Any] = {
    "case_id": 3,
    "subject": "Eiffel Tower",
    "prompt": "Eiffel Tower! The Eiffel Tower is in",
    "ground_truth": "Paris",
    "target_new": "Rome",
    "rephrase_prompt": "One finds the Eiffel Tower in",
    "locality_prompt": "The Louvre is in",
    "locality_ground_truth": "Paris",
}
ZSRE: dict[str, Any] = {
    "subject": "UniFirst",
    "src": "What is the product made by UniFirst?",
    "pred": "shoes",
    "rephrase": "What will be the product of UniFirst?",
    "alt": "unmanned aircraft",
    "answers": ["uniform", "uniforms"],
    "loc": "nq question: who wrote the big lebowski",
    "loc_ans": "the Coens",
}
OWN: dict[str, Any] = {"subject": "Eiffel Tower", "prompt": "The {} is in", "target_new": "Rome"}
DATA = SHARED_DATA


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


def without(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k != name}


def test_a_counterfact_record() -> None:
    """A record in CounterFact's form is read field by field, and says what it lacks."""
    (record,) = read_records([RECORD])
    assert record == Record(
        "record 7",
        "Eiffel Tower",
        "The {} is located in the city of",
        "Rome",
        "Paris",
        ("One finds the Eiffel Tower in",),
        (NeighborProbe("The Louvre is in", "Paris"), NeighborProbe("Notre-Dame is in", "Paris")),
        relation="P131",
    )
    assert record.missing_fields == ("generation prompts", "reference texts")
    whole = RECORD | {"generation_prompts": ["It is near"], "attribute_prompts": ["The Colosseum is in"]}
    (record,) = read_records([whole])
    assert record.generation_prompts == ("It is near",) and record.attribute_prompts == (
        "The Colosseum is in",
    )


@pytest.mark.parametrize("lost", ["requested_rewrite", "paraphrase_prompts", "neighborhood_prompts"])
def test_missing_field_of_a_record_is_named(lost: str) -> None:
    """A record without a field is refused with its number and the field's name."""
    with pytest.raises(InvalidInput, match=f"record 7 .*lacks '{lost}'"):
        read_records([RECORD, without(RECORD, lost)])


@pytest.mark.parametrize("wrong", ["text", 3, None, ["a"]])
def test_what_is_no_record_is_refused(wrong: Any) -> None:
    """Something that is not even an object is refused, not stumbled over."""
    with pytest.raises(InvalidInput, match="CounterFact's form"):
        read_records([RECORD, wrong])
    with pytest.raises(InvalidInput, match="no form that is known"):
        read_records([wrong])


@pytest.mark.parametrize("lost", ["subject", "object", "relation", "prompts", "held_out_prompts"])
def test_missing_field_of_a_fact_is_named(lost: str) -> None:
    """A row of facts.jsonl without a field is refused with its place and the field's name."""
    broken = [*FACTS[:2], without(FACTS[2], lost)]
    with pytest.raises(InvalidInput, match=f"3.*lacks '{lost}'"):
        read_records(broken)


def test_every_fact_gives_one_record() -> None:
    """A new object is another of the same relation; probes spell their subjects out, braces included."""
    records = read_records(FACTS)
    assert sorted((r.subject, r.target_true) for r in records) == sorted(
        (f["subject"], f["object"]) for f in FACTS
    )
    for record in records:
        same = {f["object"] for f in FACTS if f["relation"] == record.relation}
        assert record.target_new in same - {record.target_true}
        assert record.prompt.count("{}") == 1
        assert record.paraphrases == (f"Where is {record.subject}? In",)
        assert not any("{}" in p for p in (*record.paraphrases, *(n.prompt for n in record.neighbours)))


def test_neighbours_share_the_object_and_not_the_subject() -> None:
    """Neighbours are other subjects of the relation with the same true object."""
    record = next(r for r in read_records(FACTS) if r.subject == "Louvre")
    assert {n.target for n in record.neighbours} == {"Paris"} and len(record.neighbours) == 2
    assert all(any(s in n.prompt for s in ("Eiffel Tower", "Notre-Dame")) for n in record.neighbours)
    alone = next(r for r in read_records(FACTS) if r.subject == "Colosseum")
    assert alone.neighbours == () and "neighbours" in alone.missing_fields


def test_a_relation_with_one_object_has_no_record() -> None:
    """Where there is no other object to write, there is nothing to edit, and that is counted."""
    loaded = load_records([*FACTS, fact("Moon", "Earth", "orbit")])
    assert len(loaded.records) == len(FACTS)
    assert loaded.skipped == {NO_ALTERNATIVE_OBJECT: 1}


def test_the_order_is_that_of_the_seed() -> None:
    """One seed gives one order and one choice; another seed another; a limit takes the first of them."""
    assert read_records(FACTS, 1) == read_records(FACTS, 1)
    assert read_records(FACTS, 1) != read_records(FACTS, 2)
    assert read_records(FACTS, 1, limit=3) == read_records(FACTS, 1)[:3]
    many = [OWN | {"target_new": str(i)} for i in range(20)]
    assert sorted(r.target_new for r in read_records(many, 1)) == sorted(str(i) for i in range(20))
    assert read_records(many, 1) != read_records(many, 2)


def test_a_flat_record_has_its_placeholder_at_the_last_mention() -> None:
    """The prompt of a flat record spells its subject out: {} stands for the last mention."""
    (record,) = read_records([FLAT])
    assert record.prompt == "Eiffel Tower! The {} is in" and record.text == FLAT["prompt"]
    assert record.paraphrases == ("One finds the Eiffel Tower in",)
    assert record.neighbours == (NeighborProbe("The Louvre is in", "Paris"),)
    bare = without(without(without(FLAT, "rephrase_prompt"), "locality_prompt"), "locality_ground_truth")
    assert {"paraphrases", "neighbours"} <= set(read_records([bare])[0].missing_fields)


def test_a_prompt_without_its_subject_is_passed_over_and_counted() -> None:
    """A data set's record that does not mention its subject is no editing problem; when none is left, that is said."""
    loaded = load_records([FLAT, FLAT | {"subject": "Louvre"}, FLAT | {"subject": "Big Ben"}])
    assert len(loaded.records) == 1 and loaded.skipped == {NO_SUBJECT: 2}
    with pytest.raises(InvalidInput, match="none of the 1 records"):
        load_records([ZSRE | {"subject": "Cintas"}])


def test_a_zsre_record() -> None:
    """The first answer is written, the rephrasing should follow, and the unrelated question keeps its answer."""
    (record,) = read_records([ZSRE])
    assert record.prompt == "What is the product made by {}?" and record.target_new == "uniform"
    assert record.target_true is None and "a true object" in record.missing_fields
    assert record.paraphrases == ("What will be the product of UniFirst?",)
    assert record.neighbours == (NeighborProbe("nq question: who wrote the big lebowski?", "the Coens"),)


def test_user_records() -> None:
    """Three fields are enough; {} and spelled-out subjects may stand in prompt and paraphrases."""
    more = {"paraphrases": ["One finds the {} in"], "neighborhood": [{"prompt": "It is", "target": "so"}]}
    (record,) = read_records([OWN | more | {"prompt": "The Eiffel Tower is in", "target_true": "Paris"}])
    assert (record.prompt, record.paraphrases) == ("The {} is in", ("One finds the Eiffel Tower in",))
    assert record.neighbours == (NeighborProbe("It is", "so"),)
    assert read_records([OWN])[0].missing_fields[:3] == ("a true object", "paraphrases", "neighbours")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"prompt": "The {} and the {} are in"}, "record 2: `prompt` must hold exactly one"),
        ({"prompt": "The Louvre is in"}, r"record 2: .*put \{\} where it belongs"),
        ({"target_new": " "}, "record 2: target_new"),
        ({"target": "Rome"}, "record 2: target: Extra"),
        ({"neighborhood": [{"prompt": "It is"}]}, "record 2: neighborhood.0.target"),
        ({"case_id": 5}, "record 5: case_id"),
    ],
)
def test_a_bad_record_is_named_and_what_to_change(wrong: dict[str, Any], said: str) -> None:
    """Of a user's own records none is passed over in silence."""
    with pytest.raises(InvalidInput, match=said):
        read_records([OWN, OWN | wrong])


def test_every_kind_of_file_is_read(tmp_path: Path) -> None:
    """A JSON list or JSON lines, whatever the file is called; either in the seed's order."""
    facts, records = tmp_path / "facts.jsonl", tmp_path / "counterfact.json"
    facts.write_text("\n".join(map(json.dumps, FACTS)) + "\n\n", encoding="utf-8")
    records.write_text(json.dumps([RECORD, RECORD | {"paraphrase_prompts": []}]), encoding="utf-8")
    assert read_records(facts, 3) == read_records(FACTS, 3)
    assert sorted(len(r.paraphrases) for r in read_records(records)) == [0, 1]


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "no records"), ("[]", "no records"), ("[1,", "no JSON list"), ('{"a": 1}\n{', "line 2 of")],
)
def test_a_file_that_holds_no_records(tmp_path: Path, text: str, said: str) -> None:
    """What is wrong with a file is said, with the line where there is one."""
    file = tmp_path / "mine.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidInput, match=said):
        load_records(file)
    with pytest.raises(InvalidInput, match="cannot be read"):
        load_records(tmp_path / "nowhere.json")


def test_true_statements() -> None:
    """A fact as a sentence, before any edit; a record without a true object has none."""
    records = read_records([RECORD]) + read_records([ZSRE])
    assert true_statements(records) == ["The Eiffel Tower is located in the city of Paris."]


@pytest.mark.parametrize(
    ("name", "form", "count"),
    [
        ("counterfact.json", "CounterFact, flat", 5000),
        ("zsre.json", "zsRE", 1000),
        ("counterfact-gpt/cases.json", "CounterFact", 1500),
    ],
)
def test_the_published_files_are_read_whole(name: str, form: str, count: int) -> None:
    """Every record of the published data sets is an editing problem."""
    if not (DATA / name).exists():
        pytest.skip(f"{name} is not there")
    loaded = load_records(DATA / name)
    assert (loaded.format, len(loaded.records), loaded.skipped) == (form, count, {})
    assert all(r.text and r.subject in r.text for r in loaded.records)
