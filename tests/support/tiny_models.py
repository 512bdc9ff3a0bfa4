"""Tiny random models of every supported architecture, with a small real tokenizer. No downloads."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from service.models.architectures import ARCHITECTURES
from service.models.loading import LoadedModel, wrap_model

MODEL_TYPES = sorted(ARCHITECTURES)
TEXTS = [
    "The Eiffel Tower is located in the city of Paris. The Colosseum is located in the city of Rome.",
    "Big Ben can be found in London. The mother tongue of Marie Curie was Polish.",
    "In which country is Mount Fuji? It rises in Japan, and São Paulo lies in Brazil.",
]
END = "<|endoftext|>"


@lru_cache
def tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer as in GPT-2; with `bos`, texts begin with a BOS token as in Llama."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(TEXTS, trainer)
    if bos:
        raw.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=END, eos_token=END)


def _config(model_type: str, layers: int, width: int, inner: int, positions: int) -> dict[str, Any]:
    common = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    if model_type in ("gpt2", "gptj"):
        own: dict[str, Any] = {"n_embd": width, "n_layer": layers, "n_head": 2, "n_inner": inner}
        own |= {"n_positions": positions, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        return common | own | ({"rotary_dim": 4} if model_type == "gptj" else {})
    own = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2}
    own |= {"max_position_embeddings": positions}
    if model_type == "opt":
        return common | own | {"ffn_dim": inner, "word_embed_proj_dim": width, "dropout": 0.0}
    own |= {"intermediate_size": inner}
    return common | own | ({} if model_type == "gpt_neox" else {"num_key_value_heads": 1})


def tiny(
    model_type: str = "gpt2",
    layers: int = 3,
    width: int = 16,
    inner: int = 40,
    positions: int = 64,
    seed: int = 0,
    bos: bool = False,
    dtype: torch.dtype = torch.float32,
) -> LoadedModel:
    """Return a random model with enlarged weights, so that its outputs differ clearly between prompts."""
    config = AutoConfig.for_model(model_type, **_config(model_type, layers, width, inner, positions))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.2)
    return wrap_model(model, tokenizer(bos), f"tiny-{model_type}")
