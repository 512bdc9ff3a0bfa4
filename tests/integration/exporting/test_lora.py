"""Exports compared with PEFT and transformers: service.exporting."""

from __future__ import annotations

import copy
import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.serve_adapter import unpack_adapter
from service.engine.versioned_model import VersionedModel
from service.exporting.export_job import export_version, public_base_name, write_model
from service.exporting.lora import RELATIVE_RANK_TOLERANCE, LoraAdapter, lora_factors
from service.kit.steps import run_to_completion
from service.models.loading import LoadedModel, load_model, with_bos
from service.schemas import WorkerExportRequest
from service.weights.composition import WeightDelta, compose
from service.weights.factors import LowRank
from tests.support.logits import load_with_peft, logits, served_logits
from tests.support.random_edits import FakeLedger, random_associations, replica_with_random_edits
from tests.support.tiny_models import TEXTS, tiny

torch.set_num_threads(1)

CLOSE = 1e-4  # greatest difference of logits, in fp32


def export_bytes(replica: VersionedModel, version: int, format: str = "peft") -> tuple[bytes, dict[str, Any]]:
    file = io.BytesIO()
    manifest = run_to_completion(
        export_version(replica, TEXTS, WorkerExportRequest(version=version, format=format), file)
    )
    return file.getvalue(), manifest


def extract_zip(data: bytes, folder: Path) -> Path:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        archive.extractall(folder)
    return folder


def make_wide_model(model_type: str) -> LoadedModel:
    """Return a model whose keys have room for 300 edits, scaled so that sums over its width are as large as in the
    narrow ones.
    """
    model = tiny(model_type, width=320, inner=640)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter *= (16 / 320) ** 0.5 if parameter.ndim == 2 else 1
    return model


@pytest.mark.parametrize("count", [1, 50, 300])
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_peft_gives_the_logits_of_the_service(model_type: str, count: int, tmp_path: Path) -> None:
    """PEFT gives the logits of the edited model, with the adapter beside the base and merged.

    The rank is the number of edits.
    """
    model = make_wide_model(model_type)
    replica = replica_with_random_edits(model, count, layers=(0, 2))
    data, manifest = export_bytes(replica, count)
    adapted = load_with_peft(copy.deepcopy(model.model), extract_zip(data, tmp_path))
    edited = served_logits(replica, count)
    assert (edited - logits(model.model, model)).abs().max() > 0.1
    assert (edited - logits(adapted, model)).abs().max() < CLOSE
    assert (edited - logits(adapted.merge_and_unload(), model)).abs().max() < CLOSE
    assert manifest["difference"]["export"] < CLOSE < manifest["difference"]["edits"]
    assert [x["rank"] for x in manifest["layers"]] == [count, count] and manifest["rank"] == count


@pytest.mark.parametrize("model_type", ["gptj", "gpt_neox", "opt", "qwen2"])
def test_every_architecture(model_type: str, tmp_path: Path) -> None:
    """Module names and weight orientation of every architecture match PEFT."""
    model = tiny(model_type)
    replica = replica_with_random_edits(model, 3, layers=(0, 1, 2))
    adapted = load_with_peft(copy.deepcopy(model.model), extract_zip(export_bytes(replica, 3)[0], tmp_path))
    assert (served_logits(replica, 3) - logits(adapted, model)).abs().max() < CLOSE


def test_adapter_loads_without_palimpsest(tmp_path: Path) -> None:
    """Base and adapter load from their folders with transformers and PEFT alone."""
    model = tiny("gpt2")
    model.model.save_pretrained(tmp_path / "base")
    replica = replica_with_random_edits(model, 2, layers=(1,))
    folder = extract_zip(export_bytes(replica, 2)[0], tmp_path / "adapter")
    adapted = load_with_peft(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder)
    assert (served_logits(replica, 2) - logits(adapted, model)).abs().max() < CLOSE


def test_zipped_adapter_is_unpacked(tmp_path: Path) -> None:
    """The example that serves an adapter takes the zip of an export as well as its folder."""
    data = export_bytes(replica_with_random_edits(tiny("gpt2"), 2, layers=(1,)), 2)[0]
    folder = extract_zip(data, tmp_path / "folder")
    (tmp_path / "adapter.zip").write_bytes(data)
    unpacked = unpack_adapter(tmp_path / "adapter.zip", tmp_path / "unpacked")
    assert unpack_adapter(folder, tmp_path / "unused") == folder
    contents = [{file.name: file.read_bytes() for file in x.iterdir()} for x in (folder, unpacked)]
    assert contents[0] == contents[1] and "adapter_model.safetensors" in contents[0]


def test_adapter_is_portable(tmp_path: Path) -> None:
    """The adapter has one rank padded with zeros, alpha = rank, no patterns and complete module names, as other
    programs require.
    """
    model = tiny("gpt2")
    edits = random_associations(model, 4, layers=(0,)) | {
        f"{e}_b": [replace(p, edit=f"{e}_b") for p in group]
        for e, group in random_associations(model, 2, layers=(2,), seed=1).items()
    }
    folder = extract_zip(export_bytes(VersionedModel(model, FakeLedger(edits)), 6)[0], tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (
        4,
        4,
        {},
        {},
    )
    assert config["target_modules"] == ["transformer.h.0.mlp.c_proj", "transformer.h.2.mlp.c_proj"]
    assert config["fan_in_fan_out"] is True
    tensors = load_file(folder / "adapter_model.safetensors")
    low = tensors["base_model.model.transformer.h.2.mlp.c_proj.lora_A.weight"]
    assert low.shape == (4, model.intermediate_size) and not low[2:].any() and low[:2].any()


def test_export_is_reproducible() -> None:
    """Independent replicas export the same version as the same bytes, in every format."""
    for form in ("peft", "safetensors"):
        first, second = (
            export_bytes(replica_with_random_edits(tiny("llama"), 3, (0, 1)), 2, form)[0] for _ in range(2)
        )
        assert first == second


def test_only_directions_below_fp32_precision_are_truncated() -> None:
    """Two edits with one key have rank 1. Edits with distinct keys keep their rank."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(16, 5, dtype=torch.float64, generator=generator)
    right = torch.randn(5, 40, generator=generator)
    right[4] = right[1]
    found = lora_factors(WeightDelta((LowRank(left, right),)))
    assert (found.rank, found.terms) == (4, 5) and found.residual < 2 * RELATIVE_RANK_TOLERANCE
    right[4] = right[1] + 1e-3 * torch.randn(40, generator=generator)
    found = lora_factors(WeightDelta((LowRank(left, right),)))
    assert found.rank == 5 and found.residual < 2 * RELATIVE_RANK_TOLERANCE


def test_nearly_equal_keys_keep_their_precision() -> None:
    """Terms of nearly equal keys are large and cancel. The orthogonalised factors in fp32 keep the precision."""
    model = tiny(width=64, inner=160)
    ((a,), (b,)) = random_associations(model, 2, (1,)).values()
    b = replace(b, key=a.key + 1e-3 * b.key, direction=a.direction + 1e-3 * b.direction)
    (change,) = compose([a, b]).values()
    found, exact = lora_factors(change), change.dense()
    raw = change.low_rank_terms[0].left.float().double() @ change.low_rank_terms[0].right.double()
    off = (found.b.double() @ found.a.double() - exact).norm() / exact.norm()
    assert off == pytest.approx(found.residual, rel=0.1)
    assert off < 1e-6 and off < (raw - exact).norm() / exact.norm()


def test_model_card_reports_measurements(tmp_path: Path) -> None:
    """The README has base model, fingerprint, edits, ranks and the greatest difference, and escapes user text in
    tables.
    """
    model = tiny()
    edits = random_associations(model, 2, (1,))
    edits["edit_000001"] = [replace(p, subject="a|b `c` <i>") for p in edits["edit_000001"]]
    replica = VersionedModel(model, FakeLedger(edits))
    data, manifest = export_bytes(replica, 2)
    folder = extract_zip(data, tmp_path)
    page = (folder / "README.md").read_text()
    assert model.fingerprint in page and replica.digest(2) in page and "float32" in page
    assert f"**{manifest['difference']['export']:.1e}**" in page
    assert "| 1 | `transformer.h.1.mlp.c_proj` | 2 | 2 |" in page
    assert "Look at the subject 0 … is" in page and "a\\|b \\`c\\` &lt;i>" in page
    assert json.loads((folder / "palimpsest.json").read_text())["edits"][0]["id"] == "edit_000000"
    assert "BOS token" not in page and not (folder / "tokenizer.json").exists()


def test_a_bos_token_is_documented_and_exported(tmp_path: Path) -> None:
    """The README of an adapter for a model with a prepended BOS token names it, and the exported tokenizer adds it."""
    model = with_bos(tiny())
    folder = extract_zip(export_bytes(replica_with_random_edits(model, 1, (1,)), 1)[0], tmp_path)
    assert "needs the BOS token `<|endoftext|>`" in (folder / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(folder)("a")["input_ids"] == model.encode("a")[0]


def test_edited_weights_match_the_served_bytes(tmp_path: Path) -> None:
    """The exported weights equal the served ones bit by bit, and load into the base model by name."""
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny("llama", dtype=dtype)
        replica = replica_with_random_edits(model, 3, (0, 2))
        file = tmp_path / "edited.safetensors"
        file.write_bytes(export_bytes(replica, 3, "safetensors")[0])
        found = load_file(file)
        weights = replica.weights(3)
        assert set(found) == {model.parameter_name(site) for site in weights}
        assert all(torch.equal(found[model.parameter_name(s)], t) for s, t in weights.items())
        other = copy.deepcopy(model.model)
        assert not other.load_state_dict(found, strict=False).unexpected_keys


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_whole_model_loads_from_its_folder(model_type: str, tmp_path: Path) -> None:
    """`from_pretrained` gives the served bits and the same tokenizer, and the replica has its base bytes afterwards."""
    model = with_bos(tiny(model_type))
    replica = replica_with_random_edits(model, 3, (0, 2))
    before = {name: t.clone() for name, t in model.model.state_dict().items()}
    write_model(replica, 2, tmp_path)
    assert all(torch.equal(t, before[name]) for name, t in model.model.state_dict().items())
    found = AutoModelForCausalLM.from_pretrained(tmp_path)
    edited = before | {model.parameter_name(s): t for s, t in replica.weights(2).items()}
    assert all(torch.equal(t, edited[name]) for name, t in found.state_dict().items())
    assert (
        served_logits(replica, 2) - logits(found.eval(), model)
    ).abs().max() < 1e-5  # the activation functions are not fused
    again = with_bos(load_model(tmp_path))
    assert again.encode(TEXTS[0]) == model.encode(TEXTS[0])
    assert "version 2" in (tmp_path / "README.md").read_text()


def test_no_local_path_is_exported() -> None:
    """The base model is named by its hub name, or by the name of its folder."""
    model = tiny()
    model.model.config._name_or_path = "/home/somebody/models/secret"
    assert public_base_name(model) == "tiny-gpt2"
    model.model.config._name_or_path = "openai-community/gpt2-xl"
    assert public_base_name(model) == "openai-community/gpt2-xl"
    assert public_base_name(replace(model, folder=Path("/x"))) == "tiny-gpt2"


def test_adapter_has_the_greatest_rank_of_its_layers() -> None:
    """All layers are padded to the greatest rank."""
    model = tiny()
    pieces = [p for g in random_associations(model, 3, (0, 1)).values() for p in g][:5]
    adapter = LoraAdapter.from_changes(compose(pieces))
    assert adapter.rank == 3 and sorted(adapter.ranks.values()) == [2, 3]
