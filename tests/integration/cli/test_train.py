"""`palimpsest train serac` on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.main import main
from service.editing.scope_classifiers import CLASSIFIERS_FOLDER, ScopeClassifiers
from service.weights.trained_scope import deserialize_trained_scope
from tests.support.scopes import TRAINING_RECORDS
from tests.support.tiny_models import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tiny model and records."""
    model = tiny()
    model.model.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "facts.json").write_text(json.dumps(TRAINING_RECORDS), encoding="utf-8")
    return tmp_path


def command(folder: Path, *more: str) -> list[str]:
    given = [folder / "facts.json", "--model", folder / "model", "--data-dir", folder / "data"]
    return [str(word) for word in ["train", "serac", *given, "--layer", "1", "--steps", "10", *more]]


def test_classifier_is_put_into_the_data_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints the figures, and edits of this data folder find the classifier. The same command again prints
    the same classifier."""
    assert main(command(folder, "--json")) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    data = Path(result["path"]).read_bytes()
    fingerprint = deserialize_trained_scope(data).fingerprint
    found = ScopeClassifiers(folder / "data" / CLASSIFIERS_FOLDER).newest(fingerprint, 1)
    assert found is not None and found.classifier.digest == result["digest"]
    assert main(command(folder)) == 0
    printed = capsys.readouterr().out
    assert f"Classifier {result['digest'][:12]} of layer 1" in printed
    assert "with the subject" in printed and "relation" in printed


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--layer", "9"), "layers 0 to 2"),
        (("--limit", "3"), "at least 8 subjects"),
        (("--false-open-rate", "2"), "false_open_rate"),
        (("--dimensions", "1000"), "dimensions"),
    ],
)
def test_wrong_flags_are_refused(
    folder: Path, more: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A layer that does not exist, too few subjects and values out of range end with an error."""
    assert main(command(folder, *more)) == 1
    assert said in capsys.readouterr().err
