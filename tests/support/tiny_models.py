"""Tiny random models of every supported architecture, with a small real tokenizer. No downloads."""

from __future__ import annotations

import copy
from functools import lru_cache
from itertools import cycle, islice
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from service.models.architectures import ARCHITECTURES
from service.models.loading import LoadedModel, wrap_model

#: one type of each kind of block and cache, for tests of parts that are the same for many types
MODEL_TYPES = ["gpt2", "gpt_neox", "gptj", "llama", "mistral", "opt", "qwen2", "qwen3"]
#: what a type's configuration can change, as the values of a tiny model that has it
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon-new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 1}),
    "falcon-rw": ("falcon", {"alibi": True, "parallel_attn": False, "multi_query": False, "bias": True}),
    "gpt_bigcode-heads": ("gpt_bigcode", {"multi_query": False}),
    "gpt_neox-serial": ("gpt_neox", {"use_parallel_residual": False}),
    "opt-350m": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 12}),
    "phi3-longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 24,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "long_factor": [4.0],  # for each frequency; a tiny model repeats it
                "short_factor": [1.5],
            },
        },
    ),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True}),
}
#: every type and variant that the service supports
ALL_MODELS = sorted([*ARCHITECTURES, *VARIANTS])
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


#: the names of sizes in the configurations that do not use the most common ones
SIZE_NAMES = {
    "gpt2": {"inner": "n_inner", "positions": "n_positions"},
    "gptj": {"inner": "n_inner", "positions": "n_positions"},
    "codegen": {"inner": "n_inner", "positions": "n_positions"},
    "gpt_bigcode": {"inner": "n_inner", "positions": "n_positions"},
    "opt": {"inner": "ffn_dim"},
    "falcon": {"inner": "ffn_hidden_size"},
    "mpt": {"positions": "max_seq_len"},
    "bloom": {"positions": "seq_length"},
}
WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
#: values that are lists of one entry for each layer; a tiny model repeats what it has here
LAYER_LISTS = ("layer_types", "no_rope_layers", "attention_layers")
#: values of tiny models beside their sizes: sliding windows shorter than a text, and factors that are not one
OWN_VALUES: dict[str, dict[str, Any]] = {
    "codegen": {"num_attention_heads": 4, "rotary_dim": 4},
    "cohere2": WINDOW,
    "exaone4": WINDOW,
    "gemma2": WINDOW | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "gemma3_text": WINDOW,
    "gpt_neo": {"attention_layers": ["local", "global"], "window_size": 4},
    "gptj": {"rotary_dim": 4},
    "granite": {
        "residual_multiplier": 0.5,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.4,
        "logits_scaling": 0.5,
    },
    "ministral": {"sliding_window": 4, "layer_types": ["sliding_attention"]},
    "olmo3": WINDOW,
    "opt": {"word_embed_proj_dim": 16},
    "smollm3": {"no_rope_layers": [1, 0]},
    "starcoder2": {"sliding_window": 4},
}


def _config(model_type: str, layers: int, width: int, inner: int, positions: int) -> dict[str, Any]:
    names = {"inner": "intermediate_size", "positions": "max_position_embeddings"}
    names |= SIZE_NAMES.get(model_type, {})
    own: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2}
    own |= {names["inner"]: inner, names["positions"]: positions}
    defaults = CONFIG_MAPPING[model_type]()
    if hasattr(defaults, "num_key_value_heads") and model_type != "gpt_bigcode":
        own |= {"num_key_value_heads": 1}
    if hasattr(defaults, "head_dim") and model_type not in ("falcon", "qwen3"):
        own |= {"head_dim": width // 2}
    own |= OWN_VALUES.get(model_type, {})
    own |= {k: list(islice(cycle(own[k]), layers)) for k in LAYER_LISTS if k in own}
    if "attention_layers" in own:
        own["attention_types"] = [[own["attention_layers"], 1]]
    return {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None} | own


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
    """Return a random model of a type or a variant with enlarged weights, so that its outputs differ clearly between
    prompts. Some types have an inner size of four widths and ignore `inner`."""
    base_type, changes = copy.deepcopy(VARIANTS.get(model_type, (model_type, {})))
    rope = changes.get("rope_parameters", {})
    rope |= {k: v * (width // 4) for k, v in rope.items() if isinstance(v, list)}
    config = AutoConfig.for_model(base_type, **_config(base_type, layers, width, inner, positions) | changes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.2)
    return wrap_model(model, tokenizer(bos), f"tiny-{model_type}")
