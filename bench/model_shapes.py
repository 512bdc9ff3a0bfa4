"""Models of well-known sizes with random weights and the shipped tokenizer, for measurements of cost."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from service.models.loading import LoadedModel, load_model, wrap_model
from service.settings import SHIPPED_MODEL

#: name -> configuration. The vocabulary has the published size; the tokenizer uses its first entries.
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2-small": {"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257},
    "gpt2-xl": {"model_type": "gpt2", "n_layer": 48, "n_embd": 1600, "n_head": 25, "vocab_size": 50257},
    "gptj-6b": {
        "model_type": "gptj",
        "n_layer": 28,
        "n_embd": 4096,
        "n_head": 16,
        "n_positions": 2048,
        "rotary_dim": 64,
        "vocab_size": 50400,
    },
    "llama-1b": {
        "model_type": "llama",
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
        "vocab_size": 128256,
    },
}
EDIT_LAYERS = {
    "gpt2-small": 5,
    "gpt2-xl": 17,
    "gptj-6b": 5,
    "llama-1b": 5,
}  # layer that the published recipes edit (ROME, Meng et al. 2022; EasyEdit)


def build_model(
    name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> LoadedModel:
    """Return a model of SHAPES with random weights, the shipped GPT for "shipped", else the model of that path or
    name."""
    if name not in SHAPES:
        return load_model(SHIPPED_MODEL if name == "shipped" else name, device, dtype)
    shape = dict(SHAPES[name])
    config = AutoConfig.for_model(shape.pop("model_type"), **shape, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return wrap_model(model, AutoTokenizer.from_pretrained(SHIPPED_MODEL), name)
