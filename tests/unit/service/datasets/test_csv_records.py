"""Records in CSV files: columns, their mapping, and errors with line and column."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.datasets.loading import load_records, read_rows
from service.errors import InvalidInput

HEADER = "subject,prompt,target_new"


def write(folder: Path, text: str, name: str = "facts.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_columns_are_fields(tmp_path: Path) -> None:
    """A row is the record whose fields its columns name; empty cells and lines are left out, and a byte order mark and
    quoted line breaks are no part of a value."""
    path = write(
        tmp_path,
        "\ufeff" + HEADER + ",target_true,paraphrases,neighborhood.prompt,neighborhood.target\r\n"
        'Louvre,The {} is in,"Oslo",Paris,"See the {},\nin",The Eiffel Tower is in,Paris\r\n\r\n'
        "Nile,{} is,short,,,,\r\n",
    )
    louvre, nile = read_rows(path)
    assert louvre == {
        "subject": "Louvre",
        "prompt": "The {} is in",
        "target_new": "Oslo",
        "target_true": "Paris",
        "paraphrases": ["See the {},\nin"],
        "neighborhood": [{"prompt": "The Eiffel Tower is in", "target": "Paris"}],
    }
    assert nile == {"subject": "Nile", "prompt": "{} is", "target_new": "short", "paraphrases": []}
    assert {record.subject for record in load_records(path).records} == {"Louvre", "Nile"}


def test_a_mapping_names_other_columns(tmp_path: Path) -> None:
    """A field is read from the column that the mapping names, paraphrases from several, and a .tsv file has tabs."""
    path = write(tmp_path, "Who\tQuestion\tA\tP1\tP2\nNile\t{} is\tshort\tThe {} is\tthe {}\n", "facts.tsv")
    mapping = {"subject": ["Who"], "prompt": ["Question"], "target_new": ["A"], "paraphrases": ["P1", "P2"]}
    (row,) = read_rows(path, mapping)
    assert (row["subject"], row["prompt"], row["target_new"]) == ("Nile", "{} is", "short")
    assert row["paraphrases"] == ["The {} is", "the {}"]


@pytest.mark.parametrize(
    ("text", "mapping", "said"),
    [
        (f"{HEADER}\nNile,{{}} is,short\n,{{}} is,x\n", {}, "line 3 of facts.csv, column 'subject': is empty"),
        ('subject,Q,target_new\n"a\nb",{} is,x\nNile,,x\n', {"prompt": ["Q"]}, "line 4 of facts.csv, column 'Q'"),
        (f"{HEADER}\nNile,The Rhine is,x\n", {}, "line 2 of facts.csv: the prompt does not mention the subject"),
        (f"{HEADER}\nNile,{{}} is\n", {}, "line 2 of facts.csv: it has 2 cells, and the header has 3"),
        ("subject,prompt\nNile,{} is\n", {}, "names no column 'target_new': its columns are 'subject', 'prompt'"),
        (f"{HEADER}\n", {"prompt": ["Q"]}, "line 1 of facts.csv has no column 'Q'"),
        (f"{HEADER}\n", {"propmt": ["prompt"]}, "there is no field 'propmt'"),
        (f'{HEADER}\nNile,"{{}} is,x\n', {}, "line 2 of facts.csv: it is not CSV"),
        ("", {}, "names no column 'subject': its columns are none"),
        (f"{HEADER},neighborhood.prompt,neighborhood.target\nNile,{{}} is,x,The Rhine is,\n", {}, "line 2 of facts.csv, column 'neighborhood.target': is empty"),
    ],
)  # fmt: skip
def test_an_error_names_line_and_column(
    tmp_path: Path, text: str, mapping: dict[str, list[str]], said: str
) -> None:
    """A file that cannot be used is refused with the line, the column, and what is wrong."""
    with pytest.raises(InvalidInput) as refused:
        read_rows(write(tmp_path, text), mapping)
    assert said in refused.value.detail


def test_json_is_refused_with_line_and_column(tmp_path: Path) -> None:
    """An error in JSON lines and in a JSON list names its line and column. JSON has no columns of CSV."""
    lines = write(tmp_path, '{"subject": "Nile"}\n{"subject": }\n', "a.jsonl")
    listed = write(tmp_path, '[\n{"subject": }\n]', "a.json")
    for path in (lines, listed):
        with pytest.raises(InvalidInput, match=r"line 2, column 13 of a\.jsonl? is not valid JSON"):
            read_rows(path)
    with pytest.raises(InvalidInput, match="has no columns"):
        read_rows(lines, {"prompt": ["Q"]})
