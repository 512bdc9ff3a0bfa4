"""Commands that load a model locally: cli.local_model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.local_model import (
    load_served_model,
    load_without_bos,
    missing_dependency_error,
    resolve_source,
    run_with_progress_bar,
)
from cli.main import main
from service.errors import Misconfigured
from service.kit.steps import Phase, Progress, Stepper
from service.settings import SHIPPED_MODEL, Settings
from tests.support.tiny_models import tiny


def test_facts_are_the_table_beside_the_model(tmp_path: Path) -> None:
    """`facts` is the fact table in the folder of the model; any other name is a file. A missing table or file
    raises Misconfigured."""
    assert resolve_source("facts", Settings()) == SHIPPED_MODEL / "facts.jsonl"
    other = Settings(model=str(tmp_path))
    assert resolve_source(__file__, other) == Path(__file__)
    with pytest.raises(Misconfigured, match="has no fact table"):
        resolve_source("facts", other)
    with pytest.raises(Misconfigured, match="there is no file 'nothing"):
        resolve_source("nothing.json", other)


def test_facts_of_a_gguf_file_lie_beside_it(tmp_path: Path) -> None:
    """`facts` of a GGUF file is the table beside it that has its name, also when the folder of the file is given."""
    (tmp_path / "a.gguf").touch()
    (tmp_path / "a.facts.jsonl").touch()
    for model in (tmp_path / "a.gguf", tmp_path):
        assert resolve_source("facts", Settings(model=str(model))) == tmp_path / "a.facts.jsonl"


def test_missing_dependency_is_named() -> None:
    """A missing optional dependency becomes an error with the install command. Other missing modules are not
    changed."""
    assert "pip install" in str(missing_dependency_error(ModuleNotFoundError("no torch", name="torch")))
    other = ModuleNotFoundError("no x", name="x")
    assert missing_dependency_error(other) is other


def test_settings_say_which_model(tmp_path: Path) -> None:
    """An unknown dtype, or a folder without a model, raises Misconfigured."""
    with pytest.raises(Misconfigured, match="unknown dtype 'float8'"):
        load_served_model(Settings(dtype="float8"))
    with pytest.raises(Misconfigured, match="cannot be loaded"):
        load_served_model(Settings(model=str(tmp_path)))


def save_model_of_noise(folder: Path) -> None:
    """Save a random model that is confident of every prediction."""
    model = tiny("llama")
    model.lm_head.weight.data.mul_(30.0)  # type: ignore[operator]
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)


def test_a_model_of_noise_is_not_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model whose files fit and whose predictions are noise is refused by every command, in one line."""
    save_model_of_noise(tmp_path)
    records, place = tmp_path / "records.json", str(tmp_path)
    records.write_text(json.dumps([{"subject": "Rome", "prompt": "{} lies in", "target_new": "Asia"}]))
    for load in (load_served_model, load_without_bos):
        with pytest.raises(Misconfigured, match="predicts noise"):
            load(Settings(model=str(tmp_path), data_dir=tmp_path))
    capsys.readouterr()  # progress of the saving
    assert main(["evaluate", str(records), "--out", place, "--model", place, "--data-dir", place]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("palimpsest: the model") and "\n" not in error


def test_a_model_is_checked_on_its_own_facts(tmp_path: Path) -> None:
    """The predictions of a model with a table of facts are checked on its facts, with the stricter limit."""
    model = tiny("llama")
    model.lm_head.weight.data.mul_(1.5)  # type: ignore[operator]
    model.model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    settings = Settings(model=str(tmp_path), data_dir=tmp_path)
    load_served_model(settings)
    fact = {"subject": "Eiffel Tower", "object": "Paris", "prompts": ["The {} is located in the city of"]}
    (tmp_path / "facts.jsonl").write_text(json.dumps(fact), encoding="utf-8")
    with pytest.raises(Misconfigured, match="predicts noise"):
        load_served_model(settings)


def test_run_with_progress_bar_returns_the_result() -> None:
    """The result of the stepper is returned."""

    def steps() -> Stepper[str]:
        yield Progress(Phase.RUN, 0, 1)
        return "done"

    assert run_with_progress_bar(steps()) == "done"
