"""What a command computes by itself: cli.local_model."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.local_model import resident, shown, table_of, without
from service.errors import Misconfigured
from service.kit.steps import Progress, Steps
from service.settings import SHIPPED_MODEL, Settings


def test_facts_are_the_table_beside_the_model(tmp_path: Path) -> None:
    """A name is a file's, but for `facts`; what is not there is said."""
    assert table_of("facts", str(SHIPPED_MODEL)) == SHIPPED_MODEL / "facts.jsonl"
    assert table_of(__file__, "x") == Path(__file__)
    with pytest.raises(Misconfigured, match="no table of facts beside it"):
        table_of("facts", str(tmp_path))
    with pytest.raises(Misconfigured, match="there is no file 'nothing"):
        table_of("nothing.json", str(tmp_path))


def test_what_is_not_installed_is_named() -> None:
    """What computes is told how to be installed; any other missing module is a fault of its own."""
    assert "pip install" in str(without(ModuleNotFoundError("no torch", name="torch")))
    other = ModuleNotFoundError("no x", name="x")
    assert without(other) is other


def test_settings_say_which_model(tmp_path: Path) -> None:
    """A precision that there is not, and a folder without a model, are refused in the house's words."""
    with pytest.raises(Misconfigured, match="dtype 'float8' is not known"):
        resident(Settings(dtype="float8"))
    with pytest.raises(Misconfigured, match="cannot be loaded"):
        resident(Settings(model=str(tmp_path)))


def test_all_steps_are_run() -> None:
    """The result is the steps' own."""

    def steps() -> Steps[str]:
        yield Progress("count", 0, 1)
        return "done"

    assert shown(steps()) == "done"
