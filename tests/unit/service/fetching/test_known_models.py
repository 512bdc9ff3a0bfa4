"""Tests of service.fetching.known_models: the table of models that can be fetched."""

from __future__ import annotations

from service.fetching.known_models import KNOWN_MODELS, find_known_model


def test_models_are_found_by_name_and_alias() -> None:
    """A model is found by its name and by each alias in any case; other names are not known."""
    for model in KNOWN_MODELS:
        assert {find_known_model(name) for name in (model.name, model.name.upper(), *model.aliases)} == {
            model
        }
    assert find_known_model("gpt2-xl") is None and find_known_model("") is None


def test_names_are_unique_and_rows_are_complete() -> None:
    """No two models share a name or an alias. A wheel is pinned by its SHA-256, and the licence is named."""
    names = [name for model in KNOWN_MODELS for name in (model.name, *model.aliases)]
    assert len(names) == len(set(names))
    for model in KNOWN_MODELS:
        assert len(bytes.fromhex(model.wheel.sha256)) == 32 and model.wheel.version in model.wheel.file
        assert model.license and model.hub.count("/") == 1 and model.megabytes > 0
