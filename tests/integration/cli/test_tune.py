"""`palimpsest tune` on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.main import main
from cli.tune import candidate_row, parse_methods, resolve_facts
from service.errors import InvalidInput
from service.kit.steps import Phase, Progress, Stepper
from service.settings import SHIPPED_MODEL, Settings
from service.tuning import fact_selection, fact_trials, objective, search_space
from service.tuning.objective import Candidate
from tests.support.tiny_models import TEXTS, tiny
from workers.resident_model import load_served_model

SUBJECTS = ("Eiffel", "Big Ben", "Rome", "Paris", "Japan", "Brazil", "Mount Fuji", "Marie", "Curie", "London")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tiny model, facts and texts."""
    model = tiny()
    model.model.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    facts = [
        {"subject": s, "prompt": "{} is in", "target_new": "Rome", "target_true": "Paris"} for s in SUBJECTS
    ]
    near = {"paraphrases": ["Rome is in"], "neighborhood": [{"prompt": "Japan is in", "target": "Brazil"}]}
    (tmp_path / "facts.json").write_text(json.dumps([f | near for f in facts]), encoding="utf-8")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    return tmp_path


def tune_command(folder: Path, *more: str) -> list[str]:
    given = [
        "--facts",
        folder / "facts.json",
        "--data-dir",
        folder / "data",
        "--corpus",
        folder / "texts.txt",
    ]
    return [str(word) for word in ["tune", folder / "model", *given, *more]]


def command_line(folder: Path, *more: str) -> list[str]:
    return tune_command(folder, "--limit", "10", "--batch-facts", "10", *more)


def within_minutes(folder: Path, minutes: str, *more: str) -> list[str]:
    return tune_command(folder, "--limit", "4", "--minutes", minutes, *more)


def known_records(_model: Any, records: list[Any], limit: int) -> Stepper[list[Any]]:
    """Return the first records, as if the model knew them."""
    yield Progress(Phase.PROBE, 1, 1)
    return records[:limit]


@pytest.mark.parametrize("start", [True, False])
def test_the_recipe_is_written_where_the_worker_loads_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], start: bool
) -> None:
    """The recipe is written to the path from which the worker loads the model, with its `prepend_bos`."""
    monkeypatch.setattr(fact_selection, "select_known_records", known_records)
    monkeypatch.setattr(fact_selection, "prefers_bos", lambda *_: start)
    monkeypatch.setattr(search_space, "START_VALUES", search_space.START_VALUES | {"steps": 3, "contexts": 0})
    monkeypatch.setattr(search_space, "STAGES", {})
    monkeypatch.setattr(search_space, "MARGIN_GRID", (0.5,))
    monkeypatch.setattr(
        objective, "compute_objective", lambda figures: float("joint" in figures)
    )  # edits of a random model are not effective
    assert main(command_line(folder, "--json")) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["recipe"]["prepend_bos"] is start
    assert Path(said["path"]).is_file()
    model = load_served_model(Settings(model=str(folder / "model"), data_dir=folder / "data"))
    begins = model.encode("Rome")[0][0] == model.tokenizer.bos_token_id
    assert begins is start
    assert {h["stage"] for h in said["tried"]} == {"layer", "layer_range", "margin", "form"}
    assert main(command_line(folder)) == 0
    assert "objective" in capsys.readouterr().out


def test_a_model_that_knows_nothing_has_no_recipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If the model knows too few facts no recipe is written, and the message says how many are needed."""
    assert main(command_line(folder)) == 1
    assert "a recipe needs at least 8" in " ".join(capsys.readouterr().err.split())
    assert not (folder / "data" / "recipes").exists()


def test_budget_gives_a_recipe_and_says_what_it_leaves_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With `--minutes` the rungs are printed, and the result has what was not tried."""
    monkeypatch.setattr(fact_selection, "select_known_records", known_records)
    monkeypatch.setattr(
        search_space, "RACE_START_VALUES", search_space.RACE_START_VALUES | {"steps": 2, "contexts": 0}
    )
    monkeypatch.setattr(search_space, "RACE_VALUES", ({}, {"clamp": 1.0}))
    monkeypatch.setattr(fact_trials, "compute_objective", lambda figures: float("joint" in figures))
    assert main(within_minutes(folder, "5", "--json")) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert Path(result["path"]).is_file()
    assert "margins for many edits" in result["not_tried"][-1]
    assert result["recipe"]["source"] == "palimpsest tune --minutes 5, on 4 facts that the model knows"
    assert "values, rung 1 of 1 (4 facts): 2 candidates; best " in printed.err
    assert "The same command continues" in printed.err
    assert main(within_minutes(folder, "5")) == 0
    assert "Not tried: " in capsys.readouterr().err


def test_budget_that_is_too_small_says_where_it_ended(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If the budget ends before there is a recipe, the message says during what, and that the command continues."""
    assert main(within_minutes(folder, "0.00001")) == 1
    message = " ".join(capsys.readouterr().err.split())
    assert "--minutes 1e-05 ended during the choice of facts" in message
    assert "The same command continues" in message


@pytest.mark.parametrize("words", [["--batch-facts", "10"], ["--methods", "memit"]])
def test_budget_refuses_stages_that_it_leaves_out(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    """`--minutes` tunes single edits with rome, and says which flag to leave out."""
    assert main(within_minutes(folder, "5", *words)) == 1
    assert f"{words[0]} cannot be used with --minutes" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf", "ten"])
def test_minutes_are_a_number_above_zero(capsys: pytest.CaptureFixture[str], minutes: str) -> None:
    """Any other value is refused by the parser."""
    with pytest.raises(SystemExit):
        main(["tune", "model", f"--minutes={minutes}"])
    assert f"'{minutes}' is not a number above 0" in capsys.readouterr().err


def test_interruption_says_that_the_command_continues(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C ends the command with the code of SIGINT and a line that says how to continue."""

    def interrupted(*_: Any) -> Stepper[list[Any]]:
        yield Progress(Phase.PROBE, 0, 1)
        raise KeyboardInterrupt

    monkeypatch.setattr(fact_selection, "select_known_records", interrupted)
    assert main(within_minutes(folder, "5")) == 130
    assert "Stopped. The same command continues" in capsys.readouterr().err


def test_facts_and_methods_are_resolved() -> None:
    """The default facts are the shipped ones, and `--methods` is a comma-separated list of methods other than
    rome."""
    assert resolve_facts(None, Settings(model="no/folder")) == SHIPPED_MODEL / "facts.jsonl"
    assert parse_methods("memit, ft-l") == ("memit", "ft-l")
    assert parse_methods(None) == ()
    with pytest.raises(InvalidInput, match="--methods cannot be 'rome'"):
        parse_methods("rome")


def test_candidate_is_a_table_row() -> None:
    """The row of a failed candidate has its reason, and that of another one its scores."""
    failed = Candidate("layer", "rome", {"layers": [9]}, 0.0, reason="no layer")
    assert candidate_row(failed, {})[-2:] == ("no layer", 0.0)
    joint: dict[str, float | None] = {"ES": 1.0, "PS": 0.5, "NS": 0.25, "S": 0.4}
    batch = Candidate("margin", "rome", {"margin": 1}, 0.4, joint=joint, loss_increase=0.05, edits=50)
    assert candidate_row(batch, {})[1] == "50 edits margin=1"
    assert candidate_row(batch, {})[2:] == (1.0, 0.5, 0.25, None, 0.4, 0.05, 0.4)
