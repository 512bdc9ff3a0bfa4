"""GGUF files of tiny models, written with the package `gguf` in the layout of llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from torch import Tensor

from service.models.loading import LoadedModel
from tests.support.tiny_models import END

CHAT_TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
CONTROL, NORMAL = 3, 1  # types of tokens
F32 = GGMLQuantizationType.F32


def write_gguf(
    path: Path,
    model: LoadedModel,
    kind: GGMLQuantizationType = F32,
    metadata: Mapping[str, Any] | None = None,
    extra: Mapping[str, Tensor] | None = None,
    tokenizer: bool = True,
    architecture: str | None = None,
) -> Path:
    """Write a tiny model and its tokenizer. Matrices are quantised as `kind`. `metadata`: further keys of the
    architecture; None as a value leaves a key out."""
    config = model.model.config
    name = architecture or config.model_type
    writer = gguf.GGUFWriter(path, name)
    values = _shape(config) | dict(metadata or {})
    for key, value in values.items():
        if value is not None:
            _add(writer, f"{name}.{key}", value)
    if tokenizer:
        _add_tokenizer(writer, model)
    for tensor_name, tensor in {**gguf_tensors(model), **(extra or {})}.items():
        stored = kind if tensor.ndim == 2 and not tensor_name.startswith("position") else F32
        writer.add_tensor(tensor_name, quantize(tensor.float().numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    adders = {
        int: writer.add_uint32,
        float: writer.add_float32,
        bool: writer.add_bool,
        str: writer.add_string,
    }
    add: Any = adders[type(value)]
    add(key, value)


def _shape(config: Any) -> dict[str, Any]:
    if config.model_type == "gpt2":
        return {
            "context_length": config.n_positions,
            "block_count": config.n_layer,
            "embedding_length": config.n_embd,
            "feed_forward_length": config.n_inner,
            "attention.head_count": config.n_head,
            "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        }
    return {
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": model_head_size(config),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }


def model_head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def gguf_tensors(model: LoadedModel) -> dict[str, Tensor]:
    """Return the weights under the names and in the layout of llama.cpp."""
    config = model.model.config
    architecture = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == config.model_type)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.model.state_dict().items():
        module, _, suffix = name.rpartition(".")
        stored = f"{names.get_name(module)}.{suffix}"
        if stored == "output.weight" and model.lm_head.weight is model.embedding.weight:
            continue
        tensors[stored] = _layout(tensor, stored, config).contiguous()
    return tensors


def _layout(tensor: Tensor, name: str, config: Any) -> Tensor:
    """Return a tensor as llama.cpp stores it: rotary halves interleaved, Conv1D transposed."""
    if config.model_type == "gpt2":
        conv1d = any(x in name for x in ("attn_qkv.w", "attn_output.w", "ffn_up.w", "ffn_down.w"))
        return tensor.T if conv1d else tensor
    if config.model_type == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        halves = tensor.view(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return halves.transpose(1, 2).reshape(tensor.shape)
    return tensor


def _add_tokenizer(writer: gguf.GGUFWriter, model: LoadedModel) -> None:
    raw = json.loads(model.tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(raw["vocab"], key=raw["vocab"].__getitem__)
    tokens += [f"[PAD{i}]" for i in range(len(tokens), model.vocabulary_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if token == END else NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in raw["merges"]])
    end = raw["vocab"][END]
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_chat_template(CHAT_TEMPLATE)


def llama3_factors(size: int, theta: float, factor: float) -> Tensor:
    """Return what llama.cpp stores for the rotary embedding of Llama 3.1: what each frequency is divided by."""
    wavelengths = 2 * np.pi * theta ** (np.arange(0, size, 2) / size)
    share = (8192 / wavelengths - 1.0) / (4.0 - 1.0)
    return torch.tensor(1 / ((1 - share.clip(0, 1)) / factor + share.clip(0, 1)), dtype=torch.float32)
