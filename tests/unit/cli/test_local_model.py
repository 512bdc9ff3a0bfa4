"""Commands that load a model locally: cli.local_model."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.local_model import load_served_model, missing_dependency_error, resolve_source, run_with_progress_bar
from service.errors import Misconfigured
from service.kit.steps import Phase, Progress, Stepper
from service.settings import SHIPPED_MODEL, Settings


def test_facts_are_the_table_beside_the_model(tmp_path: Path) -> None:
    """`facts` is the fact table in the folder of the model; any other name is a file. A missing table or file
    raises Misconfigured."""
    assert resolve_source("facts", str(SHIPPED_MODEL)) == SHIPPED_MODEL / "facts.jsonl"
    assert resolve_source(__file__, "x") == Path(__file__)
    with pytest.raises(Misconfigured, match="has no fact table"):
        resolve_source("facts", str(tmp_path))
    with pytest.raises(Misconfigured, match="there is no file 'nothing"):
        resolve_source("nothing.json", str(tmp_path))


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


def test_run_with_progress_bar_returns_the_result() -> None:
    """The result of the stepper is returned."""

    def steps() -> Stepper[str]:
        yield Progress(Phase.RUN, 0, 1)
        return "done"

    assert run_with_progress_bar(steps()) == "done"
