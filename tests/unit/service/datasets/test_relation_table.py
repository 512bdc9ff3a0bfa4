"""The table of facts by relation: service.datasets.relation_table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service.datasets.relation_table import RelationTable, load_relation_table
from service.errors import InvalidInput
from service.kit.steps import run_to_completion

LANDMARK = ["The {} is located in", "To see the {}, travel to"]
CHURCH = ["{} is located in", "To see {}, travel to"]


def fact_row(subject: str, relation: str, name: str, prompts: list[str], held_out: list[str]) -> str:
    fields = {"subject": subject, "relation": relation, "object": name}
    return json.dumps(fields | {"prompts": prompts, "held_out_prompts": held_out})


@pytest.fixture
def table(tmp_path: Path) -> RelationTable:
    """A table with landmarks, with and without an article, and two relations of countries."""
    rows = [
        fact_row("Louvre", "landmark", "Paris", LANDMARK, ["The {} stands in"]),
        fact_row("Colosseum", "landmark", "Rome", LANDMARK, []),
        fact_row("Notre-Dame", "landmark", "Paris", CHURCH, ["{} stands in"]),
        fact_row("Japan", "continent", "Asia", ["{} is a country in", "{} is in"], []),
        fact_row("Chile", "continent", "South America", ["{} is a country in"], []),
        fact_row("Japan", "currency", "yen", ["{} pays with the", "{} is in"], []),
        fact_row("Kenya", "currency", "shilling", ["{} pays with the"], []),
    ]
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return run_to_completion(load_relation_table(path))


@pytest.mark.parametrize("prompt", ["The {} is located in", "the  {}  is Located in", "{} is located in"])
def test_a_relation_is_recognised_by_its_wording(table: RelationTable, prompt: str) -> None:
    """A prompt that is a wording of the table has its relation, for an unknown subject too, whatever its article, white
    space and capitals."""
    match = table.find(prompt, "Eiffel Tower", "Paris")
    assert match is not None and match.by_wording
    assert match.facts.others_than("Eiffel Tower", prompt) == (
        ["Louvre", "Colosseum"] if "the" in prompt.casefold() else ["Notre-Dame"]
    )


def test_a_subject_of_the_table_has_others_of_its_kind(table: RelationTable) -> None:
    """For a prompt that is no wording of the table, the subjects are those of a relation of its subject: that in which
    it has the true object, if there is one."""
    match = table.find("The capital of {} is", "japan", "Tokyo")
    assert match is not None and not match.by_wording
    assert match.facts.others_than("japan", "The capital of {} is") == ["Chile"]
    match = table.find("They count their money in {}, in", "Japan", "Yen")
    assert match is not None
    assert match.facts.others_than("Japan", "They count their money in {}, in") == ["Kenya"]
    assert table.find("The capital of {} is", "Peru", "Lima") is None


def test_a_wording_of_two_relations_is_decided_by_its_subject(table: RelationTable) -> None:
    """A wording that several relations have says nothing about a subject that has several of them or none."""
    assert table.find("{} is in", "Peru", "America") is None
    match = table.find("{} is in", "Chile", "America")
    assert match is not None and match.by_wording
    match = table.find("{} is in", "Japan", "Asia")
    assert match is not None and not match.by_wording


def test_rewordings_fit_the_subject(table: RelationTable) -> None:
    """A prompt is worded as the table words its subject, or else subjects with the same article, held-out wordings
    first and without the prompt itself."""
    match = table.find(LANDMARK[0], "Louvre", "Paris")
    assert match is not None
    assert match.facts.rewordings("Louvre", LANDMARK[0]) == [
        "The Louvre stands in",
        "To see the Louvre, travel to",
    ]
    assert match.facts.rewordings("Notre-Dame", CHURCH[1]) == [
        "Notre-Dame stands in",
        "Notre-Dame is located in",
    ]
    assert match.facts.rewordings("Big Ben", CHURCH[0]) == ["Big Ben stands in", "To see Big Ben, travel to"]


@pytest.mark.parametrize("text", ["{", '{"subject": "a"}', "\xff"])
def test_a_malformed_table_is_refused(tmp_path: Path, text: str) -> None:
    """A line that is no fact and a file that is no text are InvalidInput, as is a missing file."""
    path = tmp_path / "facts.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InvalidInput):
        run_to_completion(load_relation_table(path))
    with pytest.raises(InvalidInput, match="cannot be read"):
        run_to_completion(load_relation_table(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    ("prompt", "true", "others"),
    [
        ("{} pays with the", "dollar", ["continent"]),  # a wording of its relation
        ("The money of {} is the", "Yen", ["continent"]),  # its object
        ("{} is a country in", "yen", []),  # a wording of one relation, the object of the other
        ("The capital of {} is", "Tokyo", []),  # any relation
    ],
)
def test_other_relations_of_a_subject_are_known(
    table: RelationTable, prompt: str, true: str, others: list[str]
) -> None:
    """The other facts of a subject are those of which the prompt is no wording and that have another object."""
    assert [f.relation for f in table.other_facts(prompt, "japan", true)] == others
    assert table.other_facts(prompt, "Kenya", "shilling") == []
