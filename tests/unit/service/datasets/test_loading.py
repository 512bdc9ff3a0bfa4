"""Parsing of records in every supported format: service.datasets."""

from __future__ import annotations

import copy
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.datasets.loading import RecordFormat, load_records, read_records
from service.datasets.parsing import SkipReason
from service.datasets.record import NeighborProbe, Record, true_statements
from service.errors import InvalidInput
from tests.support.paths import SHARED_DATA

COUNTERFACT: dict[str, Any] = {
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
FLAT_COUNTERFACT: dict[str, Any] = {
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
MQUAKE: dict[str, Any] = {
    "case_id": 4,
    "requested_rewrite": [
        {
            "prompt": "{} is located in the country of",
            "relation_id": "P17",
            "target_new": {"str": "Italy", "id": "Q38"},
            "target_true": {"str": "France", "id": "Q142"},
            "subject": "Eiffel Tower",
            "question": "Where is the Eiffel Tower?",
        }
    ],
    "questions": [
        "What is the capital of the country of the Eiffel Tower?",
        "Which city is the capital of the country in which the Eiffel Tower stands?",
        "The Eiffel Tower stands in a country whose capital is",
    ],
    "answer": "Paris",
    "answer_alias": [],
    "new_answer": "Rome",
    "new_answer_alias": ["Roma"],
    "new_single_hops": [{"question": "Where is the Eiffel Tower?", "answer": "Italy", "answer_alias": []}],
}
RIPPLE_EDITS: dict[str, Any] = {
    "example_type": "random",
    "edit": {
        "prompt": "The name of the mother of Ada Lovelace is Mary Shelley.",
        "subject_id": "Q7259",
        "relation": "MOTHER",
        "target_id": "Q47152",
        "original_fact": {
            "prompt": "The name of the mother of Ada Lovelace is Anne Isabella Milbanke.",
            "subject_id": "Q7259",
            "relation": "MOTHER",
            "target_id": "Q272161",
        },
    },
    "Logical_Generalization": [
        {
            "test_queries": [
                {
                    "prompt": "The names of the children of Mary Shelley include",
                    "answers": [{"value": "Ada Lovelace", "aliases": []}],
                    "subject_id": "Q47152",
                }
            ],
            "test_condition": "OR",
            "condition_queries": [],
        }
    ],
    "Subject_Aliasing": [
        {
            "test_queries": [
                {
                    "prompt": "The name of the mother of Countess Lovelace is",
                    "answers": [{"value": "Mary Shelley", "aliases": ["Mary W. Shelley"]}],
                    "subject_id": "",
                }
            ],
            "test_condition": "OR",
            "condition_queries": [],
        }
    ],
    "Relation_Specificity": [
        {
            "test_queries": [
                {
                    "prompt": "The gender of Ada Lovelace is",
                    "answers": [{"value": "female", "aliases": ["woman"]}],
                    "subject_id": "Q7259",
                }
            ],
            "test_condition": "OR",
            "condition_queries": [],
        }
    ],
}
KNOW_EDIT: dict[str, Any] = {
    "subject": "France",
    "prompt": "The capital of France is",
    "target_new": "Rome",
    "ground_truth": ["Paris"],
    "portability": {
        "Reasoning": [
            {
                "prompt": "The country whose capital is the capital of France is",
                "ground_truth": [["Italy", "Italia"]],
            }
        ],
        "Subject_Aliasing": [{"prompt": "The capital of the French Republic is", "ground_truth": "Rome"}],
    },
    "locality": {
        "Relation_Specificity": [{"prompt": "The continent of France is", "ground_truth": [["Europe"]]}],
        "Forgetfulness": [{"prompt": "A former capital of France is", "ground_truth": [["Versailles"]]}],
    },
}
USER: dict[str, Any] = {"subject": "Eiffel Tower", "prompt": "The {} is in", "target_new": "Rome"}


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


def test_counterfact_record() -> None:
    """Every field of a CounterFact record is parsed, and empty fields are listed as missing."""
    (record,) = read_records([COUNTERFACT])
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
    assert record.missing_fields == ("generation_prompts", "reference_texts")
    complete = COUNTERFACT | {
        "generation_prompts": ["It is near"],
        "attribute_prompts": ["The Colosseum is in"],
    }
    (record,) = read_records([complete])
    assert record.generation_prompts == ("It is near",)
    assert record.attribute_prompts == ("The Colosseum is in",)


@pytest.mark.parametrize("field", ["requested_rewrite", "paraphrase_prompts", "neighborhood_prompts"])
def test_error_names_the_record_and_its_missing_field(field: str) -> None:
    """A CounterFact record without a field is refused, and the error names both."""
    with pytest.raises(
        InvalidInput, match=f"record 7 is not a CounterFact record: `{field}` is missing: add it"
    ):
        read_records([COUNTERFACT, without(COUNTERFACT, field)])


@pytest.mark.parametrize("row", ["text", 3, None, ["a"]])
def test_rows_that_are_not_objects_are_refused(row: Any) -> None:
    """A row that is not a JSON object raises InvalidInput, as the first row and as a later one."""
    with pytest.raises(InvalidInput, match="not a CounterFact record"):
        read_records([COUNTERFACT, row])
    with pytest.raises(InvalidInput, match="format of the first record is unknown"):
        read_records([row])


@pytest.mark.parametrize("field", ["subject", "object", "relation", "prompts", "held_out_prompts"])
def test_error_names_the_fact_and_its_missing_field(field: str) -> None:
    """A row of facts.jsonl without a field is refused, and the error names its place and the field."""
    malformed = [*FACTS[:2], without(FACTS[2], field)]
    with pytest.raises(InvalidInput, match=f"fact 3 of facts.jsonl .*`{field}` is missing: add it"):
        read_records(malformed)


def test_fact_table_gives_one_record_for_each_fact() -> None:
    """The new object is another one of the same relation, and probes have the subject filled in, braces included."""
    records = read_records(FACTS)
    assert sorted((r.subject, r.target_true) for r in records) == sorted(
        (f["subject"], f["object"]) for f in FACTS
    )
    for record in records:
        objects = {f["object"] for f in FACTS if f["relation"] == record.relation}
        assert record.target_new in objects - {record.target_true}
        assert record.prompt.count("{}") == 1
        assert record.paraphrases == (f"Where is {record.subject}? In",)
        assert not any("{}" in p for p in (*record.paraphrases, *(n.prompt for n in record.neighbours)))


def test_neighbours_of_a_fact_share_its_object() -> None:
    """Neighbours are other subjects of the relation with the same true object."""
    record = next(r for r in read_records(FACTS) if r.subject == "Louvre")
    assert {n.target for n in record.neighbours} == {"Paris"} and len(record.neighbours) == 2
    assert all(any(s in n.prompt for s in ("Eiffel Tower", "Notre-Dame")) for n in record.neighbours)
    only_one = next(r for r in read_records(FACTS) if r.subject == "Colosseum")
    assert only_one.neighbours == () and "neighborhood" in only_one.missing_fields


def test_fact_without_an_alternative_object_is_skipped() -> None:
    """A fact whose relation has a single object is skipped and counted."""
    loaded = load_records([*FACTS, fact("Moon", "Earth", "orbit")])
    assert len(loaded.records) == len(FACTS)
    assert loaded.skipped == {SkipReason.NO_ALTERNATIVE_OBJECT: 1}


def test_seed_determines_order_and_choices() -> None:
    """The same seed gives the same records, another seed gives others, and a limit keeps the first."""
    assert read_records(FACTS, 1) == read_records(FACTS, 1)
    assert read_records(FACTS, 1) != read_records(FACTS, 2)
    assert read_records(FACTS, 1, limit=3) == read_records(FACTS, 1)[:3]
    many = [USER | {"target_new": str(i)} for i in range(20)]
    assert sorted(r.target_new for r in read_records(many, 1)) == sorted(str(i) for i in range(20))
    assert read_records(many, 1) != read_records(many, 2)


def test_flat_record_has_its_placeholder_at_the_last_mention() -> None:
    """In a flat record, {} replaces the last mention of the subject."""
    (record,) = read_records([FLAT_COUNTERFACT])
    assert record.prompt == "Eiffel Tower! The {} is in" and record.text == FLAT_COUNTERFACT["prompt"]
    assert record.paraphrases == ("One finds the Eiffel Tower in",)
    assert record.neighbours == (NeighborProbe("The Louvre is in", "Paris"),)
    optional = ("rephrase_prompt", "locality_prompt", "locality_ground_truth")
    bare = {k: v for k, v in FLAT_COUNTERFACT.items() if k not in optional}
    assert {"paraphrases", "neighborhood"} <= set(read_records([bare])[0].missing_fields)


def test_data_set_record_whose_prompt_lacks_the_subject_is_skipped() -> None:
    """A record whose prompt lacks the subject is skipped and counted; the load fails if no record is left."""
    loaded = load_records(
        [
            FLAT_COUNTERFACT,
            FLAT_COUNTERFACT | {"subject": "Louvre"},
            FLAT_COUNTERFACT | {"subject": "Big Ben"},
        ]
    )
    assert len(loaded.records) == 1 and loaded.skipped == {SkipReason.SUBJECT_NOT_IN_PROMPT: 2}
    with pytest.raises(InvalidInput, match=r"none of the 1 records can be used: .* \(1\)"):
        load_records([ZSRE | {"subject": "Cintas"}])


def test_zsre_record() -> None:
    """The first answer is the new object, the rephrasing a paraphrase, and the unrelated question a neighbour."""
    (record,) = read_records([ZSRE])
    assert record.prompt == "What is the product made by {}?" and record.target_new == "uniform"
    assert record.target_true is None and "target_true" in record.missing_fields
    assert record.paraphrases == ("What will be the product of UniFirst?",)
    assert record.neighbours == (NeighborProbe("nq question: who wrote the big lebowski?", "the Coens"),)


def test_user_records() -> None:
    """Three fields are enough. Prompt and paraphrases may hold {} or spell the subject out."""
    more = {"paraphrases": ["One finds the {} in"], "neighborhood": [{"prompt": "It is", "target": "so"}]}
    (record,) = read_records([USER | more | {"prompt": "The Eiffel Tower is in", "target_true": "Paris"}])
    assert (record.prompt, record.paraphrases) == ("The {} is in", ("One finds the Eiffel Tower in",))
    assert record.neighbours == (NeighborProbe("It is", "so"),)
    assert read_records([USER])[0].missing_fields[:3] == ("target_true", "paraphrases", "neighborhood")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "The {} and the {} are in"}, "record 2: `prompt` must contain exactly one"),
        ({"prompt": "The Louvre is in"}, r"record 2: .*put \{\} in its place"),
        ({"target_new": " "}, "record 2 .*`target_new` is empty"),
        ({"target": "Rome"}, "record 2 .*`target` is not a known field"),
        ({"neighborhood": [{"prompt": "It is"}]}, "record 2 .*`neighborhood.0.target` is missing"),
        ({"case_id": 5}, "record 5 .*`case_id` is not a known field"),
    ],
)
def test_invalid_user_record_is_refused(changes: dict[str, Any], message: str) -> None:
    """An invalid user record is never skipped: the error names the record and what to change."""
    with pytest.raises(InvalidInput, match=message):
        read_records([USER, USER | changes])


def test_json_lists_and_json_lines_are_read(tmp_path: Path) -> None:
    """The content decides between a JSON list and JSON lines, not the file's name."""
    facts, records = tmp_path / "facts.jsonl", tmp_path / "counterfact.json"
    facts.write_text("\n".join(map(json.dumps, FACTS)) + "\n\n", encoding="utf-8")
    records.write_text(json.dumps([COUNTERFACT, COUNTERFACT | {"paraphrase_prompts": []}]), encoding="utf-8")
    assert read_records(facts, 3) == read_records(FACTS, 3)
    assert sorted(len(r.paraphrases) for r in read_records(records)) == [0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no records"),
        ("[]", "no records"),
        ("[1,", "line 1, column 4 of .* is not valid JSON"),
        ('{"a": 1}\n{', "line 2, column 2 of"),
    ],
)
def test_unreadable_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    """The error says what is wrong with a file, with the number of the line."""
    file = tmp_path / "mine.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidInput, match=message):
        load_records(file)
    with pytest.raises(InvalidInput, match="cannot be read"):
        load_records(tmp_path / "nowhere.json")


def test_true_statements() -> None:
    """The statement of a fact ends with its true object. A record without a true object has no statement."""
    records = read_records([COUNTERFACT]) + read_records([ZSRE])
    assert true_statements(records) == ["The Eiffel Tower is located in the city of Paris."]


@pytest.mark.parametrize(
    ("name", "record_format", "count"),
    [
        ("counterfact.json", RecordFormat.COUNTERFACT_FLAT, 5000),
        ("zsre.json", RecordFormat.ZSRE, 1000),
        ("counterfact-gpt/cases.json", RecordFormat.COUNTERFACT, 1500),
    ],
)
def test_published_data_sets_are_parsed_completely(
    name: str, record_format: RecordFormat, count: int
) -> None:
    """Every row of the published data sets becomes a record."""
    if not (SHARED_DATA / name).exists():
        pytest.skip(f"{name} does not exist here")
    loaded = load_records(SHARED_DATA / name)
    assert (loaded.format, len(loaded.records), loaded.skipped) == (record_format, count, {})
    assert all(r.text and r.subject in r.text for r in loaded.records)


FORMATS = {
    "counterfact": COUNTERFACT,
    "flat": FLAT_COUNTERFACT,
    "zsre": ZSRE,
    "user": USER,
    "facts": FACTS[0],
    "mquake": MQUAKE,
    "ripple_edits": RIPPLE_EDITS,
    "know_edit": KNOW_EDIT,
    "portability": USER | {"portability": [{"kind": "hop", "prompt": "The {} is in", "target": "Italy"}]},
}
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def leaf_paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value in a JSON value, itself included."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, inner in items for p in leaf_paths(inner, (*path, key)))]


@st.composite
def changed_rows(draw: st.DrawFn) -> list[Any]:
    """Draw a valid row and a copy of it in which one value is any JSON value."""
    row = draw(st.sampled_from(list(FORMATS.values())))
    path = draw(st.sampled_from(leaf_paths(row)))
    changed: Any = copy.deepcopy(row)
    if not path:
        return [row, draw(ANY_JSON)]
    *parents, last = path
    parent = changed
    for key in parents:
        parent = parent[key]
    parent[last] = draw(ANY_JSON)
    return [row, changed]


@settings(max_examples=400)
@given(changed_rows())
def test_any_value_in_any_field_is_parsed_or_refused(rows: list[Any]) -> None:
    """A record with any JSON value in any field is parsed to a record of texts, or raises InvalidInput."""
    try:
        records = read_records(rows)
    except InvalidInput:
        return
    for record in records:
        assert all(isinstance(prompt, str) for prompt in record.prompts)
        assert isinstance(record.target_new, str) and isinstance(record.relation, str)


@pytest.mark.parametrize("name", FORMATS)
def test_prompts_with_many_placeholders_are_refused_before_they_are_filled(name: str) -> None:
    """A prompt with thousands of {} and a long subject is refused, and little memory is used."""
    many, long = "{}" * 9000, "x" * 500
    row = copy.deepcopy(FORMATS[name])
    row |= {key: long for key in ("subject",) if key in row}
    for path in leaf_paths(row):
        *parents, last = path or (None,)
        parent = row
        for key in parents:
            parent = parent[key]
        if isinstance(last, str) and last in ("prompt", "src", "rephrase", "rephrase_prompt"):
            parent[last] = f"{many} {long}"
        if isinstance(last, str) and last in ("paraphrases", "held_out_prompts", "paraphrase_prompts"):
            parent[last] = [many] * 100
    rows = [row, FACTS[3]] if name == "facts" else [row]
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInput):
            read_records(rows)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
