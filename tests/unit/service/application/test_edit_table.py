"""Tables of edits: service.application.edit_table."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from service.application.edit_table import busy_seconds, csv_lines, stated_request
from service.datasets.csv_records import parse_csv_lines

START = datetime(2026, 12, 1, tzinfo=UTC)


def test_a_list_is_read_back() -> None:
    """The CSV of a list, read as a table, states the same facts, also where a cell was neutralized."""
    edit = {
        "subject": "-Tower",
        "prompt": '{} is "in", or = at',
        "target_new": "=Rome",
        "target_true": "Paris",
    }
    text = "".join(csv_lines([edit | {"id": "edit_1", "result": None, "dry_run": False}]))
    (line,) = parse_csv_lines(text, "the table")
    assert (stated_request(line) or {}).items() >= edit.items()


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_what_a_line_states(separator: str) -> None:
    """A line states a request with its probes, whichever separator the header has; the service finds what is
    missing."""
    header = ["subject", "prompt", "target_new", "paraphrases", "neighborhood.prompt", "neighborhood.target"]
    cells = ["Nile", "The Nile is", "short", "Is the {}", "The Rhine is", "long"]
    text = "\n".join(separator.join(line) for line in (header, cells, [*cells[:3], "", "", ""]))
    with_probes, without = parse_csv_lines("\ufeff" + text, "the table")
    assert stated_request(with_probes) == {
        "subject": "Nile",
        "prompt": "The {} is",
        "target_new": "short",
        "probes": {
            "paraphrase": ["Is the {}"],
            "neighborhood": [{"prompt": "The Rhine is", "target": "long"}],
        },
    }
    assert (stated_request(without) or {})["probes"] == {"paraphrase": "auto", "neighborhood": "auto"}


def test_lines_that_cannot_be_read() -> None:
    """A line with too few cells, and one that is no CSV, each have a fault; what follows the latter is not read."""
    text = 'subject,prompt,target_new\nNile,{} is\nNile,{} is,long\n"Nile"x,{} is,long\nNile,{} is,wide\n'
    lines = list(parse_csv_lines(text, "the table"))
    assert [(line.number, line.fault is None) for line in lines] == [(2, False), (3, True), (4, False)]
    assert [stated_request(line) is None for line in lines] == [True, False, True]


def test_the_busy_time_of_edits() -> None:
    """Time in which several edits ran counts once, and time in which none ran does not count."""
    spans = [(30, 40), (0, 10), (2, 5), (5, 12), (12, 13)]
    times = [(START + timedelta(seconds=a), START + timedelta(seconds=b)) for a, b in spans]
    assert busy_seconds(times) == 23.0
    assert busy_seconds([]) == 0.0
