"""A version's change as a LoRA adapter, held to what stock peft makes of it: service.exporting."""

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

CLOSE = 1e-4  # of two logits, in single precision


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
    """Room for 300 edits in a layer, and sums over its width as large as in the narrow ones: as a trained model has them."""
    model = tiny(model_type, width=320, inner=640)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter *= (16 / 320) ** 0.5 if parameter.ndim == 2 else 1
    return model


@pytest.mark.parametrize("count", [1, 50, 300])
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_peft_agrees_with_the_service(model_type: str, count: int, tmp_path: Path) -> None:
    """Base and adapter, beside each other and merged, give the logits of the edited model; every edit has its own rank."""
    model = make_wide_model(model_type)
    replica = replica_with_random_edits(model, count, layers=(0, 2))
    data, manifest = export_bytes(replica, count)
    adapted = load_with_peft(copy.deepcopy(model.model), extract_zip(data, tmp_path))
    edited = served_logits(replica, count)
    assert (edited - logits(model.model, model)).abs().max() > 0.1
    assert (edited - logits(adapted, model)).abs().max() < CLOSE
    assert (edited - logits(adapted.merge_and_unload(), model)).abs().max() < CLOSE
    assert manifest["difference"]["adapter"] < CLOSE < manifest["difference"]["edits"]
    assert [x["rank"] for x in manifest["layers"]] == [count, count] and manifest["rank"] == count


@pytest.mark.parametrize("model_type", ["gptj", "gpt_neox", "opt", "qwen2"])
def test_every_architecture(model_type: str, tmp_path: Path) -> None:
    """The names of its modules and the orientation of its weights are peft's, too."""
    model = tiny(model_type)
    replica = replica_with_random_edits(model, 3, layers=(0, 1, 2))
    adapted = load_with_peft(copy.deepcopy(model.model), extract_zip(export_bytes(replica, 3)[0], tmp_path))
    assert (served_logits(replica, 3) - logits(adapted, model)).abs().max() < CLOSE


def test_a_newcomer_loads_base_and_adapter_from_folders(tmp_path: Path) -> None:
    """With nothing of ours in between."""
    model = tiny("gpt2")
    model.model.save_pretrained(tmp_path / "base")
    replica = replica_with_random_edits(model, 2, layers=(1,))
    folder = extract_zip(export_bytes(replica, 2)[0], tmp_path / "adapter")
    adapted = load_with_peft(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder)
    assert (served_logits(replica, 2) - logits(adapted, model)).abs().max() < CLOSE


def test_the_portable_form(tmp_path: Path) -> None:
    """One rank, padded with zeros, alpha = rank, no patterns, whole names: what programs other than peft need."""
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


def test_the_same_version_is_the_same_bytes() -> None:
    """Of every form, from replicas that know nothing of each other."""
    for form in ("peft", "safetensors"):
        first, second = (
            export_bytes(replica_with_random_edits(tiny("llama"), 3, (0, 1)), 2, form)[0] for _ in range(2)
        )
        assert first == second


def test_only_directions_below_single_precision_are_dropped() -> None:
    """Of two edits with one key one rank is left; where all keys differ, however little, none is lost."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(16, 5, dtype=torch.float64, generator=generator)
    right = torch.randn(5, 40, generator=generator)
    right[4] = right[1]
    found = lora_factors(WeightDelta((LowRank(left, right),)))
    assert (found.rank, found.terms) == (4, 5) and found.residual < 2 * RELATIVE_RANK_TOLERANCE
    right[4] = right[1] + 1e-3 * torch.randn(40, generator=generator)
    found = lora_factors(WeightDelta((LowRank(left, right),)))
    assert found.rank == 5 and found.residual < 2 * RELATIVE_RANK_TOLERANCE


def test_keys_that_nearly_coincide_cost_nothing() -> None:
    """Their terms are large and cancel; stored as they are, in single precision, they would not."""
    model = tiny(width=64, inner=160)
    ((a,), (b,)) = random_associations(model, 2, (1,)).values()
    b = replace(b, key=a.key + 1e-3 * b.key, direction=a.direction + 1e-3 * b.direction)
    (change,) = compose([a, b]).values()
    found, exact = lora_factors(change), change.dense()
    raw = change.low_rank_terms[0].left.float().double() @ change.low_rank_terms[0].right.double()
    off = (found.b.double() @ found.a.double() - exact).norm() / exact.norm()
    assert off == pytest.approx(found.residual, rel=0.1)
    assert off < 1e-6 and off < (raw - exact).norm() / exact.norm()


def test_the_model_card_reports_measurements(tmp_path: Path) -> None:
    """The base model and its fingerprint, the edits, ranks, and the largest difference; text of strangers breaks no table."""
    model = tiny()
    edits = random_associations(model, 2, (1,))
    edits["edit_000001"] = [replace(p, subject="a|b `c` <i>") for p in edits["edit_000001"]]
    replica = VersionedModel(model, FakeLedger(edits))
    data, manifest = export_bytes(replica, 2)
    folder = extract_zip(data, tmp_path)
    page = (folder / "README.md").read_text()
    assert model.fingerprint in page and replica.digest(2) in page and "float32" in page
    assert f"**{manifest['difference']['adapter']:.1e}**" in page
    assert "| 1 | `transformer.h.1.mlp.c_proj` | 2 | 2 |" in page
    assert "Look at the subject 0 … is" in page and "a\\|b \\`c\\` &lt;i>" in page
    assert json.loads((folder / "palimpsest.json").read_text())["edits"][0]["id"] == "edit_000000"
    assert "start token" not in page and not (folder / "tokenizer.json").exists()


def test_a_bos_token_is_documented_and_exported(tmp_path: Path) -> None:
    """A model that reads every text after its start token is of no use to whoever does not know that."""
    model = with_bos(tiny())
    folder = extract_zip(export_bytes(replica_with_random_edits(model, 1, (1,)), 1)[0], tmp_path)
    assert "read after the start token `<|endoftext|>`" in (folder / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(folder)("a")["input_ids"] == model.encode("a")[0]


def test_the_edited_weights_are_those_that_are_served(tmp_path: Path) -> None:
    """Bit by bit, under the names of the base model, on top of which they load."""
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
def test_a_whole_model_loads_from_its_folder(model_type: str, tmp_path: Path) -> None:
    """`from_pretrained` gives the bits that are served; base bytes are in place afterwards; the tokenizer is the same."""
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
    ).abs().max() < 1e-5  # its activations are slower twins of ours
    again = with_bos(load_model(tmp_path))
    assert again.encode(TEXTS[0]) == model.encode(TEXTS[0])
    assert "version 2" in (tmp_path / "README.md").read_text()


def test_no_local_path_is_exported() -> None:
    """The base model is called by its name on the hub, or by that of its folder."""
    model = tiny()
    model.model.config._name_or_path = "/home/somebody/models/secret"
    assert public_base_name(model) == "tiny-gpt2"
    model.model.config._name_or_path = "openai-community/gpt2-xl"
    assert public_base_name(model) == "openai-community/gpt2-xl"
    assert public_base_name(replace(model, folder=Path("/x"))) == "tiny-gpt2"


def test_an_adapter_has_one_rank_for_all() -> None:
    """That of the layer with most."""
    model = tiny()
    pieces = [p for g in random_associations(model, 3, (0, 1)).values() for p in g][:5]
    adapter = LoraAdapter.from_changes(compose(pieces))
    assert adapter.rank == 3 and sorted(adapter.ranks.values()) == [2, 3]
