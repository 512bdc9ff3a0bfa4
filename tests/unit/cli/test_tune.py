"""`palimpsest prepare` on a tiny model."""

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
from service.tuning import recipe_search
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


def command_line(folder: Path, *more: str) -> list[str]:
    given = [
        "--facts",
        folder / "facts.json",
        "--data-dir",
        folder / "data",
        "--corpus",
        folder / "texts.txt",
    ]
    words = ["tune", folder / "model", *given, "--limit", "10", "--many", "10", *more]
    return [str(word) for word in words]


@pytest.mark.parametrize("start", [True, False])
def test_the_recipe_is_written_where_the_worker_loads_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], start: bool
) -> None:
    """A recipe that was found is the one that the model is resident with afterwards, its start token included."""

    def known(_model: Any, records: list[Any], limit: int) -> Stepper[list[Any]]:
        yield Progress(Phase.PROBE, 1, 1)
        return records[:limit]

    monkeypatch.setattr(recipe_search, "select_known_records", known)
    monkeypatch.setattr(recipe_search, "prefers_bos", lambda *_: start)
    monkeypatch.setattr(
        recipe_search, "START_VALUES", recipe_search.START_VALUES | {"steps": 3, "contexts": 0}
    )
    monkeypatch.setattr(recipe_search, "STAGES", {})
    monkeypatch.setattr(recipe_search, "MARGIN_GRID", (0.5,))
    monkeypatch.setattr(
        recipe_search, "compute_objective", lambda figures: float("together" in figures)
    )  # random models take no edit
    assert main(command_line(folder, "--json")) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["recipe"]["start"] is start
    assert Path(said["path"]).is_file()
    model = load_served_model(Settings(model=str(folder / "model"), data_dir=folder / "data"))
    begins = model.encode("Rome")[0][0] == model.tokenizer.bos_token_id
    assert begins is start
    assert {h["stage"] for h in said["tried"]} == {"layer", "spread", "many"}
    assert main(command_line(folder)) == 0
    assert "merit" in capsys.readouterr().out


def test_a_model_that_knows_nothing_has_no_recipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without facts that the model knows nothing is written, and the message says what to give."""
    assert main(command_line(folder)) == 1
    assert "a recipe needs 8 at least" in " ".join(capsys.readouterr().err.split())
    assert not (folder / "data" / "recipes").exists()


def test_facts_and_methods_are_resolved() -> None:
    """Facts are those named, those beside the model, or the shipped ones; other methods are named from the table."""
    assert resolve_facts(None, "no/folder") == SHIPPED_MODEL / "facts.jsonl"
    assert parse_methods("memit, ft-l") == ("memit", "ft-l")
    assert parse_methods(None) == ()
    with pytest.raises(InvalidInput, match="--methods cannot be 'rome'"):
        parse_methods("rome")


def test_a_candidate_is_a_table_row() -> None:
    """What could not be tried says why in its line; what has figures shows them."""
    assert candidate_row(
        {"stage": "layer", "hparams": {"layers": [9]}, "reason": "no layer", "merit": 0.0}, {}
    )[-2:] == (
        "no layer",
        0.0,
    )
    together = {"ES": 1.0, "PS": 0.5, "NS": 0.25, "S": 0.4}
    many = {"stage": "many", "hparams": {"margin": 1}, "edits": 50} | {
        "together": together,
        "rise": 0.05,
        "merit": 0.4,
    }
    assert candidate_row(many, {})[1] == "50 edits margin=1"
    assert candidate_row(many, {})[2:] == (1.0, 0.5, 0.25, None, 0.4, 0.05, 0.4)
