"""Tests of service.fetching.models_folder: which model a setting names."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.errors import Misconfigured
from service.fetching.known_models import KNOWN_MODELS
from service.fetching.models_folder import FetchRecord, ModelsFolder, resolve_model, write_record

MODEL = KNOWN_MODELS[0]


def fetched(folder: Path) -> Path:
    path = ModelsFolder(folder).model_path(MODEL)
    path.mkdir()
    write_record(path, FetchRecord(MODEL.name, MODEL.title, MODEL.license, "wheel:x"))
    return path


def test_a_known_name_is_the_fetched_model(tmp_path: Path) -> None:
    """A name and an alias of a fetched model are its folder; its record says where it came from."""
    path = fetched(tmp_path)
    assert {resolve_model(name, tmp_path) for name in (MODEL.name, *MODEL.aliases)} == {str(path)}
    record = ModelsFolder(tmp_path).record(MODEL)
    assert record is not None and record.source == "wheel:x"


def test_a_known_name_that_was_not_fetched_says_how(tmp_path: Path) -> None:
    """A known model that is not here is refused with the command that gets it."""
    for name in (MODEL.name, *MODEL.aliases):
        with pytest.raises(Misconfigured, match=f"get it with `palimpsest fetch {MODEL.name}`"):
            resolve_model(name, tmp_path)


def test_other_models_are_left_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path and a name on the hub are not changed; a folder with a known name takes precedence."""
    assert resolve_model("gpt2-xl", tmp_path) == "gpt2-xl"
    assert resolve_model(str(tmp_path), tmp_path) == str(tmp_path)
    (tmp_path / MODEL.aliases[0]).mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model(MODEL.aliases[0], tmp_path) == MODEL.aliases[0]
