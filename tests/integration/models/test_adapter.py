"""Tests of service.models.adapter: LoRA adapters that are merged into the base model. PEFT is the oracle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from service.errors import Misconfigured
from service.models.loading import LoadedModel, load_model
from tests.support.tiny_models import TEXTS, tiny

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # in PEFT
ATTENTION = {"gpt2": ["c_attn", "mlp.c_proj"], "llama": ["q_proj", "down_proj"]}


def saved_base(folder: Path, model_type: str) -> Path:
    model = tiny(model_type)
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


def saved_adapter(base: Path, folder: Path, model_type: str, **changes: Any) -> torch.Tensor:
    """Save an adapter with random factors; return the logits that PEFT computes with it."""
    values: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION[model_type]}
    config = LoraConfig(**(values | changes))
    config.fan_in_fan_out = model_type == "gpt2"
    model = load_model(base)
    adapted = get_peft_model(model.model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    adapted.save_pretrained(str(folder))
    with torch.no_grad():
        logits: torch.Tensor = adapted.eval()(token_ids(model)).logits
    return logits


def token_ids(model: LoadedModel) -> torch.Tensor:
    return torch.tensor([model.encode(TEXTS[0])[0]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model that the tests do not change."""
    return saved_base(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture(scope="module")
def valid_adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("valid")
    saved_adapter(base, folder, "llama")
    return folder


@pytest.fixture
def adapter(valid_adapter: Path, tmp_path: Path) -> Path:
    """A copy of a valid adapter, which a test may change."""
    return shutil.copytree(valid_adapter, tmp_path / "adapter")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"q_proj": 9}},
    ],
)
def test_a_merged_adapter_answers_as_with_peft(changes: dict[str, Any], base: Path, tmp_path: Path) -> None:
    """A model with a merged adapter has the logits that PEFT computes with the adapter beside the weights."""
    expected = saved_adapter(base, tmp_path / "adapter", "llama", **changes)
    merged = load_model(base, adapter=tmp_path / "adapter")
    torch.testing.assert_close(merged.model(token_ids(merged)).logits, expected, rtol=1e-4, atol=1e-4)
    plain = load_model(base)
    assert (plain.model(token_ids(plain)).logits - expected).abs().max() > 0.1


def test_weights_of_gpt2_are_changed_transposed(tmp_path: Path) -> None:
    """An adapter of GPT-2, whose weights are stored transposed, answers as with PEFT."""
    base = saved_base(tmp_path / "base", "gpt2")
    expected = saved_adapter(base, tmp_path / "adapter", "gpt2")
    merged = load_model(base, adapter=tmp_path / "adapter")
    torch.testing.assert_close(merged.model(token_ids(merged)).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_fingerprint_is_that_of_the_merged_weights(base: Path, adapter: Path, tmp_path: Path) -> None:
    """A merged adapter changes the fingerprint, as the same weights in a folder do."""
    merged = load_model(base, adapter=adapter)
    merged.model.save_pretrained(tmp_path / "merged")
    merged.tokenizer.save_pretrained(tmp_path / "merged")
    assert load_model(base).fingerprint != merged.fingerprint == load_model(tmp_path / "merged").fingerprint


def refusal(base: Path, adapter: Path) -> str:
    with pytest.raises(Misconfigured) as caught:
        load_model(base, adapter=adapter)
    assert "\n" not in caught.value.detail and str(adapter) in caught.value.detail
    return caught.value.detail


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_dora": True}, "use_dora in adapter_config.json is more than a low-rank change"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save in"),
        ({"layer_replication": [[0, 2]]}, "layer_replication in"),
        ({"bias": "all"}, "it changes biases"),
        ({"init_lora_weights": "pissa"}, "its base weights were changed too"),
        ({"peft_type": "IA3"}, "it is of the type IA3"),
        ({"r": 8}, "the rank of model.layers.0"),
        ({"r": None}, "adapter_config.json: r:"),
    ],
)
def test_other_forms_of_adapters_are_refused(
    changes: dict[str, Any], reason: str, base: Path, adapter: Path
) -> None:
    """An adapter that is more than W + scale B A, or whose configuration does not fit, is refused with the reason."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert reason in refusal(base, adapter)


def test_adapters_of_other_models_are_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    """An adapter whose modules or shapes are not those of the base model is refused."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {k.replace("q_proj", "qq_proj"): v for k, v in tensors.items()}, adapter / "adapter_model.safetensors"
    )
    assert "qq_proj, which the base model does not have" in refusal(base, adapter)
    other = saved_base(tmp_path / "other", "gpt2")
    assert "does not have as a linear layer" in refusal(other, adapter)
    save_file({k: v[..., :3].clone() for k, v in tensors.items()}, adapter / "adapter_model.safetensors")
    assert "it belongs to another base model" in refusal(base, adapter)


def test_incomplete_adapters_are_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    """An adapter with half of a pair, with other tensors, without weights or without configuration is refused."""
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if "lora_A" in k}, file)
    assert "has only one of lora_A and lora_B" in refusal(base, adapter)
    save_file({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(1)}, file)
    assert "which is no factor of a linear layer" in refusal(base, adapter)
    file.unlink()
    assert "pickles are not read" in refusal(base, adapter)
    (adapter / "adapter_config.json").write_text("[")
    assert "is not JSON" in refusal(base, adapter)
    assert "has no readable adapter_config.json" in refusal(base, tmp_path / "nothing")


def test_an_adapter_of_a_tied_head_is_refused(tmp_path: Path) -> None:
    """An adapter of an output embedding that is also the token embedding is refused: merging would change both."""
    base = saved_base(tmp_path / "base", "gpt2")
    adapter = tmp_path / "adapter"
    saved_adapter(base, adapter, "gpt2", target_modules=["c_attn"])
    save_file(
        {
            f"base_model.model.lm_head.lora_{x}.weight": torch.ones(s)
            for x, s in {"A": (4, 16), "B": (320, 4)}.items()
        },
        adapter / "adapter_model.safetensors",
    )
    assert "whose weight is also the token embedding" in refusal(base, adapter)
