"""The texts of a training: service.training.scope_examples."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from service.datasets.record import NeighborProbe, Record
from service.errors import InvalidInput
from service.training.scope_examples import (
    ScopeFact,
    ScopePart,
    measured_pairs,
    scope_facts,
    split_by_subject,
)

RELATIONS = ("is located in", "speaks", "was founded by")


def record(subject: int, relation: int, paraphrases: int = 2) -> Record:
    text = RELATIONS[relation]
    return Record(
        f"{subject}-{relation}",
        f"subject {subject}",
        "{} " + text,
        "Rome",
        "Paris",
        tuple(f"It is said that subject {subject} {text} ({i})" for i in range(paraphrases)),
        (NeighborProbe(f"neighbor {subject} {text}", "Paris"),),
        relation=text,
    )


def some_records(subjects: int = 16) -> list[Record]:
    return [record(s, r) for s in range(subjects) for r in range(3)]


def about(text: str) -> tuple[str, str]:
    """The subject and the relation of a text."""
    words = text.removeprefix("It is said that ").split(" (")[0].split(" ")
    return " ".join(words[:2]), " ".join(words[2:])


def some_part() -> ScopePart:
    return ScopePart(tuple(scope_facts(some_records())))


def test_fact_has_the_prompt_with_and_without_its_object() -> None:
    """The texts of a record are its prompt, and the prompt with the new object."""
    (fact,) = scope_facts([record(1, 0)])
    assert fact.key_texts == ("subject 1 is located in", "subject 1 is located in Rome")


def test_records_without_paraphrases_train_nothing() -> None:
    """A record needs a text within its scope that is not its own."""
    assert scope_facts([record(1, 0, paraphrases=0)]) == []


def test_no_subject_is_in_two_parts() -> None:
    """The parts have all facts, half of the subjects are trained on, and no subject is in two parts."""
    facts = scope_facts(some_records())
    split = split_by_subject(facts, seed=1)
    subjects = [{f.subject for f in part.facts} for part in split]
    assert [len(s) for s in subjects] == [8, 4, 4]
    assert len(set.union(*subjects)) == 16
    assert sorted(f.prompt for part in split for f in part.facts) == sorted(f.prompt for f in facts)
    assert split_by_subject(facts, seed=2) != split


@pytest.mark.parametrize("records", [[], some_records(7)])
def test_too_few_subjects_are_refused(records: Sequence[Record]) -> None:
    """A training says how many subjects it needs."""
    with pytest.raises(InvalidInput, match="at least 8 subjects"):
        split_by_subject(scope_facts(records), 0)


def test_texts_out_of_scope_have_in_common_what_their_kind_says() -> None:
    """Of the hard texts one has the subject and another relation, one the relation and another subject."""
    part, rng = some_part(), random.Random(0)
    for fact in part.facts:
        drawn = {o.kind: about(o.text) for o in part.draw_outside(fact, rng)}
        assert drawn["subject"][0] == fact.subject and drawn["subject"][1] != fact.relation
        assert drawn["relation"][0] != fact.subject and drawn["relation"][1] == fact.relation
        assert drawn["other"][0] != fact.subject


def test_kinds_without_texts_are_left_out() -> None:
    """A lone fact has no text out of its scope but its neighbours."""
    (fact,) = scope_facts([record(1, 0)])
    drawn = ScopePart((fact,)).draw_outside(fact, random.Random(0))
    assert [o.kind for o in drawn] == ["relation"]
    assert drawn[0].text == "neighbor 1 is located in"


def test_measured_pairs_have_no_text_of_the_training() -> None:
    """Texts that were trained on are not measured; paraphrases are within scope, and pairs know the subject."""
    part = some_part()
    seen = part.facts[0].paraphrases
    pairs = measured_pairs(part, seen, seed=3)
    assert not {p.text for p in pairs} & set(seen)
    for pair in pairs:
        fact: ScopeFact = part.facts[pair.fact]
        assert (pair.text in fact.paraphrases) is (pair.kind is None)
        assert pair.names_subject is (about(pair.text)[0] == fact.subject)
    assert len(set(pairs)) == len(pairs)
