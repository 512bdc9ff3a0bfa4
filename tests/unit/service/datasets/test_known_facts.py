"""Records from known facts: service.datasets.known_facts."""

from __future__ import annotations

from typing import Any

import pytest

from service.datasets.loading import RecordFormat, load_records
from service.datasets.parsing import SkipReason
from service.datasets.record import NeighborProbe
from service.errors import InvalidInput
from tests.support.paths import SHARED_DATA

KNOWN_FACTS = SHARED_DATA / "known_facts.json"


def known_fact(subject: str, object_: str, verb: str = "lies", relation: str = "P30") -> dict[str, Any]:
    return {
        "subject": subject,
        "attribute": object_,
        "template": "{} " + verb + " in",
        "prompt": f"{subject} {verb} in",
        "relation_id": relation,
    }


ROWS = [
    known_fact("Oslo", "Norway"),
    known_fact("Bergen", "Norway", "is"),
    known_fact("Rome", "Italy", "is found"),
    known_fact("Perl", "1987", "began", "P571"),
]


def test_a_record_takes_what_its_row_lacks_from_its_relation() -> None:
    """The new object, the paraphrases and the neighbors are of the same relation; a row of a relation with one object
    is skipped."""
    loaded = load_records(ROWS)
    assert loaded.format is RecordFormat.KNOWN_FACTS
    assert loaded.skipped == {SkipReason.NO_ALTERNATIVE_OBJECT: 1}
    record = next(r for r in loaded.records if r.subject == "Oslo")
    assert (record.prompt, record.target_true, record.target_new) == ("{} lies in", "Norway", "Italy")
    assert set(record.paraphrases) == {"Oslo is in", "Oslo is found in"}
    assert record.neighbours == (NeighborProbe("Bergen is in", "Norway"),)


def test_a_second_true_object_of_the_subject_is_never_the_new_one() -> None:
    """The new object differs from every object that the relation gives the subject."""
    rows = [*ROWS[:3], known_fact("Oslo", "Italy", "sits")]
    loaded = load_records(rows)
    assert "Oslo" not in {r.subject for r in loaded.records}


def test_the_seed_draws_order_and_objects() -> None:
    """The same seed gives the same records."""
    rows = [known_fact(f"Town {i}", f"Country {i % 7}", f"verb{i % 5}") for i in range(60)]
    assert load_records(rows, 1) == load_records(rows, 1)
    assert load_records(rows, 1).records != load_records(rows, 2).records


def test_a_row_without_its_subject_in_the_prompt_is_refused() -> None:
    """The error names the row."""
    with pytest.raises(InvalidInput, match="known fact 2: the subject 'Bergen' does not occur"):
        load_records([ROWS[0], {**ROWS[1], "prompt": "It is in"}])


@pytest.mark.skipif(not KNOWN_FACTS.exists(), reason="the published file is not here")
def test_the_published_file_is_read() -> None:
    """Nearly every published fact is a record, and its new object is not its true one."""
    loaded = load_records(KNOWN_FACTS)
    assert len(loaded.records) >= 1200
    assert all(r.target_new != r.target_true and r.text for r in loaded.records)
    assert all(n.target == r.target_true for r in loaded.records for n in r.neighbours)
