"""Records of data sets about what follows from an edit: MQuAKE, RippleEdits, KnowEdit, and a user's own questions."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from service.datasets.loading import RecordFormat, load_records, read_records
from service.datasets.parsing import SkipReason
from service.datasets.record import NeighborProbe, PortabilityProbe
from service.datasets.ripple_edits import find_subject, split_objects
from service.errors import InvalidInput
from tests.unit.service.datasets.test_loading import FORMATS

MQUAKE, RIPPLE_EDITS, KNOW_EDIT = (FORMATS[name] for name in ("mquake", "ripple_edits", "know_edit"))


def changed(row: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return copy.deepcopy(row) | fields


@pytest.mark.parametrize("name", ["mquake", "ripple_edits", "know_edit"])
def test_format_is_recognised_and_every_row_is_a_record(name: str) -> None:
    """A row in its published form is recognised by its fields, and becomes a record."""
    loaded = load_records([FORMATS[name]])
    assert loaded.format == RecordFormat(name) and len(loaded.records) == 1 and not loaded.skipped


def test_mquake_question_has_three_wordings_and_both_answers() -> None:
    """The wordings of a case are one probe, with the answers after and before the edit and their aliases."""
    (record,) = read_records([MQUAKE])
    assert (record.subject, record.target_new, record.target_true) == ("Eiffel Tower", "Italy", "France")
    assert record.paraphrases == ("Where is the Eiffel Tower?",)
    (probe,) = record.portability
    assert probe.kind == "hop" and len(probe.prompts) == 3
    assert probe.targets == ("Rome", "Roma") and probe.targets_before == ("Paris",)


def test_mquake_case_of_several_edits_is_skipped() -> None:
    """A question about several edits together cannot be asked of one."""
    two = changed(MQUAKE, requested_rewrite=MQUAKE["requested_rewrite"] * 2)
    assert load_records([MQUAKE, two]).skipped == {SkipReason.SEVERAL_EDITS: 1}


def test_ripple_edits_sentence_is_split_into_prompt_and_objects() -> None:
    """The prompt is what the sentences before and after the edit begin with."""
    (record,) = read_records([RIPPLE_EDITS])
    assert (record.prompt, record.subject) == ("The name of the mother of {} is", "Ada Lovelace")
    assert (record.target_new, record.target_true) == ("Mary Shelley", "Anne Isabella Milbanke")
    assert [p.kind for p in record.portability] == ["logical", "alias", "kept"]
    assert record.portability[1] == PortabilityProbe(
        "alias", ("The name of the mother of Countess Lovelace is",), ("Mary Shelley", "Mary W. Shelley")
    )


def test_ripple_edits_without_a_name_of_the_subject_is_skipped() -> None:
    """The name is that which the prompts about the subject share; without such prompts the record is skipped."""
    unnamed = {name: value for name, value in RIPPLE_EDITS.items() if name != "Relation_Specificity"}
    assert load_records([RIPPLE_EDITS, unnamed]).skipped == {SkipReason.UNKNOWN_SUBJECT: 1}
    named = copy.deepcopy(unnamed)
    named["edit"]["subject"] = "Ada Lovelace"
    assert read_records([named])[0].subject == "Ada Lovelace"
    alone = copy.deepcopy(RIPPLE_EDITS)
    del alone["edit"]["original_fact"]
    assert load_records([RIPPLE_EDITS, alone]).skipped == {SkipReason.NO_ALTERNATIVE_OBJECT: 1}


@pytest.mark.parametrize(
    ("edited", "original", "expected"),
    [
        ("The capital of X is Rome.", "The capital of X is Paris.", ("The capital of X is", "Rome", "Paris")),
        ("X is in New York.", "X is in New Delhi.", ("X is in New", "York", "Delhi")),
        ("X is Y.", "X is Y.", ("X is Y.", "", "")),
    ],
)
def test_objects_are_what_two_sentences_differ_in(edited: str, original: str, expected: object) -> None:
    """Words in common belong to the prompt."""
    assert split_objects(edited, original) == expected


@pytest.mark.parametrize(
    ("prompt", "others", "name"),
    [
        (
            "The mother of Leonardo di Caprio is",
            ["The gender of Leonardo di Caprio is"],
            "Leonardo di Caprio",
        ),
        ("The mother of Ada is", ["Ada was born in", "The gender of Ada is"], "Ada"),
        ("The owner of 3Com is", ["The seat of 3Com is"], "3Com"),
        ("The mother of Ada is", ["The gender of Bob is"], None),
        ("The mother of Ada is", [], None),
    ],
)
def test_subject_is_the_longest_name_that_prompts_share(
    prompt: str, others: list[str], name: str | None
) -> None:
    """Words in small letters at the ends are no part of a name."""
    assert find_subject(prompt, others) == name


def test_know_edit_questions_by_kind() -> None:
    """Portability gives probes, facts about others give neighbours, other objects of the relation stay."""
    (record,) = read_records([KNOW_EDIT])
    assert record.prompt == "The capital of {} is" and record.target_true == "Paris"
    assert record.neighbours == (NeighborProbe("The continent of France is", "Europe"),)
    assert [(p.kind, p.targets) for p in record.portability] == [
        ("hop", ("Italy", "Italia")),
        ("alias", ("Rome",)),
        ("kept", ("Versailles",)),
    ]


def test_own_portability_questions() -> None:
    """A user's question has a kind, a prompt that may hold {}, and the answers after and before."""
    question = {
        "kind": "hop",
        "prompt": "The {} is in the country",
        "target": "Italy",
        "target_before": "France",
    }
    own = {"subject": "Eiffel Tower", "prompt": "The {} is in", "target_new": "Rome"}
    (record,) = read_records([own | {"portability": [question]}])
    assert record.portability == (
        PortabilityProbe("hop", ("The Eiffel Tower is in the country",), ("Italy",), ("France",)),
    )
    with pytest.raises(InvalidInput, match=r"`portability.0.kind` must be"):
        read_records([own | {"portability": [question | {"kind": "other"}]}])
