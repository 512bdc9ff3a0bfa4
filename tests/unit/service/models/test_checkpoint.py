"""Tests of service.models.checkpoint: checkpoints that transformers would load as something else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING

from service.errors import Misconfigured
from service.models.checkpoint import check_kind
from service.models.loading import load_model
from tests.support.tiny_models import tiny

Tensors = dict[str, Tensor]


def saved(folder: Path, model_type: str = "llama", config: dict[str, Any] | None = None) -> Path:
    """Save a tiny model, with changed values of config.json."""
    model = tiny(model_type)
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | (config or {})))
    return folder


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    return folder


def refusal(folder: Path) -> str:
    """Return the message with which a folder is refused; it is one line."""
    with pytest.raises(Misconfigured) as caught:
        load_model(folder)
    assert "\n" not in caught.value.detail and str(folder) in caught.value.detail
    return caught.value.detail


def as_float8(tensors: Tensors, scales: bool = True) -> Tensors:
    """Return the weights of the blocks scaled to the range of float8, with their scales."""
    result = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and ".layers." in name:
            scale = tensor.abs().max() / 448
            result[name] = (tensor / scale).to(torch.float8_e4m3fn)
            if scales:
                result[f"{name}_scale"] = scale.reshape(1)
        else:
            result[name] = tensor
    return result


def test_float8_weights_with_scales_are_refused(tmp_path: Path) -> None:
    """Weights in float8 beside `weight_scale` tensors are refused as quantised: they would be used unscaled."""
    message = refusal(rewrite(saved(tmp_path), as_float8))
    assert "is quantised" in message and "down_proj.weight_scale" in message and "and 18 more" in message
    assert "give the unquantised model" in message


@pytest.mark.parametrize("stored", ["F8_E4M3", "I8"])
def test_weights_in_narrow_types_are_refused(stored: str, tmp_path: Path) -> None:
    """Weights stored in float8 or int8 are refused also without scales."""

    def narrow(tensors: Tensors) -> Tensors:
        if stored == "I8":
            return {name: (tensor * 100).to(torch.int8) for name, tensor in tensors.items()}
        return as_float8(tensors, scales=False)

    assert f"is stored as {stored}" in refusal(rewrite(saved(tmp_path), narrow))


def test_fewer_layers_than_the_files_have_are_refused(tmp_path: Path) -> None:
    """A configuration with two of three layers is refused; the message names tensors of the third."""
    message = refusal(saved(tmp_path, config={"num_hidden_layers": 2}))
    assert "tensors that the model does not use: model.layers.2.input_layernorm.weight" in message
    assert "and 6 more" in message and "give both from one model" in message


def test_more_layers_than_the_files_have_are_refused(tmp_path: Path) -> None:
    """A configuration with four of three layers is refused; the message names tensors of the fourth."""
    assert "its weights lack model.layers.3." in refusal(saved(tmp_path, config={"num_hidden_layers": 4}))


def test_other_shapes_are_refused_with_both(tmp_path: Path) -> None:
    """A tensor of another shape is named with the stored shape and the one of the configuration."""
    message = refusal(saved(tmp_path, config={"intermediate_size": 41}))
    assert "down_proj.weight has the shape (16, 40) and config.json asks for (16, 41)" in message


@pytest.mark.parametrize(
    "method", ["bitsandbytes", "gptq", "awq", "compressed-tensors", "torchao", "hqq", "fp8", "of tomorrow"]
)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_quantised_models_are_refused(key: str, method: str, tmp_path: Path) -> None:
    """A configuration of quantisation is refused by its method, whether or not its library is installed."""
    message = refusal(saved(tmp_path, config={key: {"quant_method": method, "bits": 4}}))
    assert f"{key} in config.json, method {method}" in message and "give the unquantised model" in message


@pytest.mark.parametrize("merged", [False, True])
def test_adapters_are_refused(merged: bool, tmp_path: Path) -> None:
    """A folder with adapter_config.json is refused with the name of the base model, also beside whole weights."""
    if merged:
        saved(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    message = refusal(tmp_path)
    assert "is an adapter (adapter_config.json): give its base model 'org/base' with --model" in message
    assert "this folder with --adapter" in message


def test_a_broken_adapter_configuration_is_refused(tmp_path: Path) -> None:
    """An adapter whose configuration cannot be read is refused without the name of the base model."""
    (tmp_path / "adapter_config.json").write_text("[")
    assert "give its base model with --model" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "key"),
    [
        ("llama", "hidden_act"),
        ("gpt_neox", "hidden_act"),
        ("gpt2", "activation_function"),
        ("gemma2", "hidden_activation"),
        ("falcon", "activation"),
    ],
)
def test_unknown_activations_are_refused(model_type: str, key: str, tmp_path: Path) -> None:
    """An activation that transformers does not have is refused with those that it has."""
    message = refusal(saved(tmp_path, model_type, {key: "swoosh"}))
    assert f"an unknown {key} 'swoosh'" in message and "gelu_new" in message


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("field", ["rope_type", "type"])
def test_unknown_rotary_embeddings_are_refused(key: str, field: str, tmp_path: Path) -> None:
    """A type of rotary embedding that transformers does not have is refused with those that it has."""
    message = refusal(saved(tmp_path, config={key: {field: "spiral", "factor": 2.0}}))
    assert "an unknown rope_type 'spiral'" in message and "default, dynamic" in message


@pytest.mark.parametrize("rope_type", ["linear", "yarn"])
def test_known_rotary_embeddings_are_loaded(rope_type: str, tmp_path: Path) -> None:
    """The types of rotary embedding that transformers has are accepted."""
    load_model(saved(tmp_path, config={"rope_scaling": {"rope_type": rope_type, "factor": 2.0}}))


@pytest.mark.parametrize(
    ("model_type", "key"),
    [("mixtral", "num_local_experts"), ("qwen3_moe", "num_experts"), ("deepseek_v3", "n_routed_experts")],
)
def test_mixtures_of_experts_are_refused(model_type: str, key: str, tmp_path: Path) -> None:
    """A mixture of experts is refused with the reason, not as an unknown type."""
    message = refusal(saved(tmp_path, config={"model_type": model_type, key: 4}))
    assert (
        f"is a mixture of experts ({key} in config.json is 4)" in message and "give a dense model" in message
    )


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "olmoe", "granitemoe", "gpt_oss", "dbrx"])
def test_mixtures_of_experts_are_refused_by_their_defaults(model_type: str) -> None:
    """A mixture of experts is refused also where config.json leaves the number of experts to its type."""
    with pytest.raises(Misconfigured, match="is a mixture of experts"):
        check_kind("here", CONFIG_MAPPING[model_type]())


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("gemma3", "is multimodal"),
        ("llava", "is multimodal"),
        ("qwen2_vl", "is multimodal"),
        ("t5", "is an encoder-decoder"),
        ("bart", "is an encoder-decoder"),
        ("whisper", "is an encoder-decoder"),
    ],
)
def test_models_that_are_not_causal_models_of_text_are_refused(model_type: str, reason: str) -> None:
    """Multimodal models and encoder-decoders are refused in one line that says what to give."""
    with pytest.raises(Misconfigured, match=f"{reason} .* give") as caught:
        check_kind("here", CONFIG_MAPPING[model_type]())
    assert "\n" not in caught.value.detail


def test_a_model_that_attends_in_both_directions_is_refused(tmp_path: Path) -> None:
    """An embedding model of a supported type is refused: its states depend on later tokens."""
    folder = saved(tmp_path, "gemma3_text", {"use_bidirectional_attention": True})
    assert "attends in both directions" in refusal(folder)


def test_any_other_failure_is_one_line(tmp_path: Path) -> None:
    """An error that transformers raises for a value of another kind is shown in one line."""
    assert "cannot be loaded" in refusal(saved(tmp_path, config={"num_attention_heads": "two"}))


BUFFERS = {
    "gpt2": ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"],
    "gptj": [f"transformer.h.0.attn.{x}" for x in ("bias", "masked_bias", "scale_attn", "embed_positions")],
    "gpt_neox": [f"gpt_neox.layers.0.attention.{x}" for x in ("bias", "masked_bias", "rotary_emb.inv_freq")],
    "llama": ["model.layers.0.self_attn.rotary_emb.inv_freq"],
    "codegen": ["transformer.h.0.attn.causal_mask"],
    "gpt_neo": [f"transformer.h.0.attn.attention.{x}" for x in ("bias", "masked_bias")],
    "falcon": ["transformer.h.0.self_attention.rotary_emb.inv_freq"],
}


@pytest.mark.parametrize("model_type", BUFFERS)
def test_buffers_of_older_releases_are_accepted(model_type: str, tmp_path: Path) -> None:
    """Causal masks and rotary tables, which older releases of transformers saved, are ignored, also as integers."""
    extra = {name: torch.ones(1, 1, 4, 4, dtype=torch.uint8) for name in BUFFERS[model_type]}
    load_model(rewrite(saved(tmp_path, model_type), lambda tensors: tensors | extra))


def test_a_tied_head_may_be_in_the_files_or_not(tmp_path: Path) -> None:
    """A head that is tied to the embedding is accepted in the files and without."""
    saved(tmp_path, "gpt2")
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    load_model(tmp_path)
    head = "lm_head.weight"
    rewrite(tmp_path, lambda tensors: tensors | {head: tensors["transformer.wte.weight"].clone()})
    load_model(tmp_path)
