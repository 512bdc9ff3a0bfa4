"""How GGUF files describe each supported architecture: one frozen row for each `general.architecture`.

A row names the values of the configuration and the tensors that llama.cpp stores in another layout. Every other key of
the architecture is refused unless it has a value that changes nothing, because a key that is not read would change
what the model says without notice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from service.errors import Misconfigured
from service.models.gguf_file import GgufFile

ROPE_FACTORS = "rope_freqs.weight"  # what the frequencies of the rotary embedding are divided by
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
TOKEN_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
#: keys with the values at which they change nothing
NEUTRAL: dict[str, Callable[[Any], bool]] = {
    "attention.causal": bool,
    "attention.sliding_window": lambda value: value == 0,
    "expert_count": lambda value: value <= 1,
    "expert_used_count": lambda value: value <= 1,
    "rope.scaling.type": lambda value: value == "none",
    "tensor_data_layout": lambda value: value == "Meta AI original pth",
    "use_parallel_residual": lambda value: not value,
    "vocab_size": lambda _: True,  # the rows of the embedding count
}
#: Llama 3.1 and later, except for the factor
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class GgufArchitecture:
    """One row of the table."""

    model_type: str
    values: Mapping[str, str]  #: key without the architecture -> name in the configuration
    permuted: Mapping[str, str] = field(
        default_factory=dict
    )  #: part of a tensor's name -> its number of heads
    transposed: tuple[str, ...] = ()  #: parts of the names of Conv1D's weights
    rotary: bool = True


_DECODER = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
GGUF_ARCHITECTURES = {
    "llama": GgufArchitecture(
        "llama",
        _DECODER,
        permuted={".attn_q.": "num_attention_heads", ".attn_k.": "num_key_value_heads"},
    ),
    "qwen2": GgufArchitecture("qwen2", _DECODER),
    "qwen3": GgufArchitecture("qwen3", _DECODER),
    "gpt2": GgufArchitecture(
        "gpt2",
        {
            "context_length": "n_positions",
            "block_count": "n_layer",
            "embedding_length": "n_embd",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        transposed=(".attn_qkv.weight", ".attn_output.weight", ".ffn_up.weight", ".ffn_down.weight"),
        rotary=False,
    ),
}


def gguf_architecture(file: GgufFile) -> GgufArchitecture:
    """Return the row of a file. Raise Misconfigured for an architecture that is not supported."""
    if file.architecture not in GGUF_ARCHITECTURES:
        known = ", ".join(sorted(GGUF_ARCHITECTURES))
        raise Misconfigured(
            f"the model {str(file.path)!r} has the GGUF architecture {file.architecture or 'unknown'!r}, and those "
            f"that are read are {known}: give the model as a folder with config.json and safetensors."
        )
    return GGUF_ARCHITECTURES[file.architecture]


def gguf_config(file: GgufFile) -> Any:
    """Return the configuration of a file. Raise Misconfigured for metadata that the configuration cannot express."""
    row = gguf_architecture(file)
    given = _architecture_values(file)
    config = {name: given.pop(key) for key, name in row.values.items() if key in given}
    if absent := [
        key for key in row.values if key not in (*_architecture_values(file), "attention.head_count_kv")
    ]:
        raise _unreadable(file.path, f"its metadata lacks {file.architecture}.{absent[0]}")
    config |= _token_ids(file)
    config["vocab_size"] = file.positions[EMBEDDING][1][0] if EMBEDDING in file.positions else 0
    config["tie_word_embeddings"] = has_tied_head(file)
    if row.model_type == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.positions
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in file.positions
    if row.rotary:
        config["head_dim"] = _head_size(file.path, config, given)
        config["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": float(given.pop("rope.freq_base", 10_000.0)),
        }
    _refuse_unread(file, given)
    result = AutoConfig.for_model(row.model_type, **config)
    if ROPE_FACTORS in file.positions:
        result.rope_parameters = _scaled_rope(file, result)
    return result


def has_tied_head(file: GgufFile) -> bool:
    """Return whether the output embedding is the token embedding: absent, or stored once more."""
    if HEAD not in file.positions:
        return True
    if EMBEDDING not in file.positions or file.positions[HEAD][:2] != file.positions[EMBEDDING][:2]:
        return False
    return bool((file.stored(HEAD) == file.stored(EMBEDDING)).all())


def _architecture_values(file: GgufFile) -> dict[str, Any]:
    prefix = f"{file.architecture}."
    return {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}


def _token_ids(file: GgufFile) -> dict[str, Any]:
    return {name: file.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in TOKEN_IDS.items()}


def _head_size(path: Path, config: Mapping[str, Any], given: dict[str, Any]) -> int:
    """Take the size of a head from the keys that may state it. Raise Misconfigured where they differ: a part of a
    head without rotation, or values of another size."""
    size = given.get("attention.key_length", config["hidden_size"] // config["num_attention_heads"])
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        if given.pop(key, size) != size:
            raise _unreadable(path, f"its {key} differs from the size of a head, {size}")
    return int(size)


def _refuse_unread(file: GgufFile, given: Mapping[str, Any]) -> None:
    for key, value in given.items():
        if key not in NEUTRAL or not NEUTRAL[key](value):
            raise _unreadable(
                file.path, f"its metadata has {file.architecture}.{key} = {value!r}, which is not read"
            )


def _scaled_rope(file: GgufFile, config: Any) -> dict[str, Any]:
    """Return the rotary parameters by which llama.cpp computed the stored factors. Raise Misconfigured when the known
    form does not reproduce them."""
    factors = file.tensor(ROPE_FACTORS, torch.float32)[...]
    plain = dict(config.rope_parameters)
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    wanted = 1 / (plain["rope_theta"] ** exponents * factors)
    scaled = plain | LLAMA3_ROPE | {"factor": float(factors.max())}
    config.rope_parameters = scaled
    found, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=1e-3, atol=0):
        raise _unreadable(
            file.path, f"the factors of its rotary embedding ({ROPE_FACTORS}) are not those of Llama 3.1"
        )
    return scaled


def _unreadable(path: Path, reason: str) -> Misconfigured:
    return Misconfigured(
        f"the model {str(path)!r} cannot be loaded: {reason}. Give the model as a folder with config.json and safetensors."
    )
