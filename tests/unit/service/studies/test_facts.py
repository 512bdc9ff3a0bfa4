"""The facts of a study: service.studies.facts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.errors import InvalidInput
from service.studies.facts import Fact, read_study_facts

KNOWN = {"subject": "Vinson Massif", "attribute": "Antarctica", "template": "{} is located in the continent"}
PROBLEM = {
    "requested_rewrite": {
        "subject": "Spur Point",
        "prompt": "{}, in",
        "target_true": {"str": "Antarctica"},
        "target_new": {"str": "Asia"},
    },
    "paraphrase_prompts": [],
    "neighborhood_prompts": [],
}


def write_json_file(folder: Path, rows: Any) -> Path:
    (folder / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder / "data.json"


def test_known_facts_are_traced_as_in_the_paper(tmp_path: Path) -> None:
    """The prompt of a known fact extends its template. Without a prompt the template is used."""
    rows = [KNOWN | {"prompt": "Vinson Massif is located in the continent of"}]
    assert read_study_facts(write_json_file(tmp_path, rows)) == [
        Fact("Vinson Massif", "{} is located in the continent of", "Antarctica")
    ]
    assert read_study_facts(write_json_file(tmp_path, [KNOWN]))[0].prompt == KNOWN["template"]


def test_records_are_facts(tmp_path: Path) -> None:
    """A record of any format gives its unedited fact."""
    assert read_study_facts(write_json_file(tmp_path, [PROBLEM])) == [
        Fact("Spur Point", "{}, in", "Antarctica")
    ]


def test_seed_determines_the_order(tmp_path: Path) -> None:
    """The same seed gives the same order, another seed another order of the same facts."""
    path = write_json_file(tmp_path, [KNOWN | {"subject": f"s{i}"} for i in range(20)])
    assert read_study_facts(path, 1) == read_study_facts(path, 1) != read_study_facts(path, 2)
    assert set(read_study_facts(path, 1)) == set(read_study_facts(path, 2))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [{"subject": "x", "attribute": "y"}],
            "known fact 1 is not a known-facts record: `template` is missing",
        ),
        ([KNOWN | {"prompt": "It is in"}], "known fact 1: the subject 'Vinson Massif' does not occur"),
        ([KNOWN, 5], "known fact 2 is not a known-facts record"),
        ([{"subject": "a", "prompt": "{} is", "target_new": "b"}], "has a true object"),
        ([], "no records"),
    ],
)
def test_invalid_facts_are_refused(rows: Any, words: str, tmp_path: Path) -> None:
    """The error names the fact and what it lacks."""
    with pytest.raises(InvalidInput) as refused:
        read_study_facts(write_json_file(tmp_path, rows))
    assert words in refused.value.detail
