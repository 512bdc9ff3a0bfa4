"""Exports of a base model that was loaded from a GGUF file: quantised in the file, whole in the service."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import AutoModelForCausalLM, AutoTokenizer

from service.engine.versioned_model import VersionedModel
from service.exporting.export_job import export_version, write_model
from service.kit.steps import run_to_completion
from service.models.loading import load_model
from service.schemas import WorkerExportRequest
from tests.support.gguf_files import CHAT_TEMPLATE, write_gguf
from tests.support.logits import load_with_peft, logits, served_logits
from tests.support.random_edits import replica_with_random_edits
from tests.support.tiny_models import TEXTS, tiny

CLOSE = 1e-4  # greatest difference of logits, in fp32


@pytest.fixture
def replica(tmp_path: Path) -> VersionedModel:
    (tmp_path / "base").mkdir()
    path = write_gguf(
        tmp_path / "base" / "Tiny.Q8_0.gguf", tiny("llama", width=32, inner=64), GGMLQuantizationType.Q8_0
    )
    return replica_with_random_edits(load_model(path), 2, layers=(0, 2))


def test_the_whole_model_is_a_folder_in_full_precision(replica: VersionedModel, tmp_path: Path) -> None:
    """The exported folder has the edited weights, the tokenizer and the chat template, is not marked as quantised, and
    is loaded by the service and by transformers."""
    folder = tmp_path / "edited"
    write_model(replica, 2, folder)
    model = load_model(folder)
    assert torch.equal(logits(model.model, model), served_logits(replica, 2))
    assert model.encode(TEXTS[0]) == replica.base.encode(TEXTS[0])
    assert AutoTokenizer.from_pretrained(folder).chat_template == CHAT_TEMPLATE
    assert "quantization_config" not in (folder / "config.json").read_text()


def test_the_base_version_is_the_same_model(replica: VersionedModel, tmp_path: Path) -> None:
    """Version 0 in a folder has the fingerprint of the GGUF file: the two are one model to a ledger."""
    write_model(replica, 0, tmp_path / "base-folder")
    assert load_model(tmp_path / "base-folder").fingerprint == replica.base.fingerprint


def test_the_adapter_names_the_file_of_its_base(replica: VersionedModel, tmp_path: Path) -> None:
    """The model card loads the base by its GGUF file with transformers, and the adapter on it gives the logits of the
    service."""
    file, folder = io.BytesIO(), tmp_path / "adapter"
    request = WorkerExportRequest(version=2, format="peft")
    manifest = run_to_completion(export_version(replica, TEXTS, request, file))
    zipfile.ZipFile(file).extractall(folder)
    call = 'from_pretrained("folder/of/the/base", gguf_file="Tiny.Q8_0.gguf", dtype="float32")'
    assert call in (folder / "README.md").read_text() and manifest["base"]["name"] == "Tiny.Q8_0"
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", gguf_file="Tiny.Q8_0.gguf", dtype="float32"
    )
    adapted = load_with_peft(base, folder)
    assert (served_logits(replica, 2) - logits(adapted, replica.base)).abs().max() < CLOSE
    assert (served_logits(replica, 2) - served_logits(replica, 0)).abs().max() > 0.1
    merged = load_model(tmp_path / "base" / "Tiny.Q8_0.gguf", adapter=folder)
    assert (served_logits(replica, 2) - logits(merged.model, merged)).abs().max() < CLOSE
