"""`palimpsest evaluate` on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.evaluate import load_damage_texts, select_records
from cli.main import build_parser, main
from service.datasets.record import Record
from service.editing.context import EditorContext
from tests.support.tiny_models import TEXTS, tiny

Captured = pytest.CaptureFixture[str]
USER_RECORDS: list[dict[str, Any]] = [
    {
        "subject": subject,
        "prompt": prompt,
        "target_new": new,
        "target_true": true,
        "neighborhood": [{"prompt": "Big Ben can be found in", "target": "London"}],
    }
    for subject, prompt, new, true in (
        ("Eiffel Tower", "The {} is located in the city of", "Rome", "Paris"),
        ("Colosseum", "The {} is located in the city of", "Paris", "Rome"),
        ("Mount Fuji", "In which country is {}? In", "Brazil", "Japan"),
    )
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tiny model, three records and plain texts."""
    model = tiny()
    model.model.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "records.json").write_text(json.dumps(USER_RECORDS), encoding="utf-8")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    return tmp_path


def command_line(folder: Path, out: str, *more: str) -> list[str]:
    flags = ["--model", folder / "model", "--data-dir", folder / "data", "--corpus", folder / "texts.txt"]
    hparams = ["--hparam", "layers=[1]", "--hparam", "steps=3", "--hparam", "contexts=1"]
    command = ["evaluate", folder / "records.json", "--out", folder / out, *flags, *hparams, *more]
    return [str(word) for word in command]


def test_an_evaluation_from_the_command_line(folder: Path, capsys: Captured) -> None:
    """Sentences and tables go to stdout; the folder has the result, the figures, the report and the store of
    intermediate results."""
    assert (
        main(command_line(folder, "one", "--mode", "sequence", "--checkpoints", "1,2", "--limit", "2")) == 0
    )
    shown = capsys.readouterr()
    assert "found on the base model: 2 edits at layers 1" in shown.out and "still hold" in shown.out
    assert {p.name for p in (folder / "one").iterdir()} == {
        "result.json", "report.html", "bars.png", "curves.png", "kept",
    }  # fmt: skip
    result = json.loads((folder / "one" / "result.json").read_text(encoding="utf-8"))
    assert [t["edits"] for t in result["checkpoints"]] == [1, 2]
    assert result["plan"]["hparams"] == {"layers": [1], "steps": 3, "contexts": 1}
    assert result["damage_texts"]["source"] == "the file texts.txt"


def test_a_second_run_resumes_and_results_are_compared(
    folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run searches no edit again, a report can include the result of another folder, and a folder of
    another plan is rejected."""
    assert main(command_line(folder, "one", "--no-damage")) == 0
    monkeypatch.setattr(EditorContext, "find_all_factors", None)
    assert main(command_line(folder, "one", "--no-damage")) == 0
    monkeypatch.undo()
    assert main(command_line(folder, "two", "--method", "r-rome", "--compare-with", str(folder / "one"))) == 0
    page = (folder / "two" / "report.html").read_text(encoding="utf-8")
    assert page.count("<h2>") == 3 and "r-rome" in page  # the comparison, and each result
    capsys.readouterr()
    assert main(command_line(folder, "one", "--limit", "1")) == 1
    assert "choose another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--checkpoints", "1,none"), "checkpoints.1"),
        (("--strengths", "0"), "strengths.0"),
        (("--compare-with", "nowhere"), "contains no result"),
        (("--damage-corpus", "nowhere.txt"), "cannot be read"),
        (("--hparam", "layers"), "NAME=VALUE"),
    ],
)
def test_invalid_options_are_reported_before_loading(
    folder: Path, capsys: Captured, more: tuple[str, ...], said: str
) -> None:
    """Invalid options are reported before the model is loaded and the folder is created."""
    assert main(command_line(folder, "one", *more)) == 1
    assert said in capsys.readouterr().err
    assert not (folder / "one").exists()


def parse_args(*flags: str) -> Any:
    return build_parser().parse_args(["evaluate", "facts", "--out", "x", *flags])


RECORDS = [Record(str(i), f"subject {i // 2}", "{} is", "new", "true") for i in range(80)]


def test_which_records_are_edited() -> None:
    """`--split`, `--unique-subjects` and `--limit` are applied in this order, and the two splits are
    disjoint."""
    tune, test = (select_records(RECORDS, parse_args("--split", split)) for split in ("tune", "test"))
    assert tune == RECORDS[::2] and test == RECORDS[1::2]
    assert select_records(RECORDS, parse_args("--unique-subjects", "--limit", "3")) == RECORDS[:6:2]
    assert select_records(RECORDS, parse_args()) == RECORDS


def test_plain_texts_are_statements_of_other_subjects() -> None:
    """The damage texts are statements of facts that are not edited; if these are too few there are none, and
    the corpus is used."""
    source, texts = load_damage_texts(parse_args(), RECORDS, RECORDS[:4]) or ("", [])
    assert source == "statements of facts that are not edited"
    assert len(texts) == 76 and texts[0] == "subject 2 is true."
    assert load_damage_texts(parse_args(), RECORDS, RECORDS[:60]) is None
