"""The module paths of each supported architecture: one frozen row for each `config.model_type`.

The edited weight is the MLP's down-projection. In most blocks its output is what the MLP adds to the residual stream.
In a post-norm block a norm comes between them (Gemma 2, OLMo 2, GLM-4): `mlp_output` names the module whose output is
added, which traces read and restore, and `down_proj` the weight that edits change. A factor that a block applies to
both of its outputs (Granite) is a constant, and is not a module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from service.errors import Misconfigured


def _key_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _key_heads_of_falcon(config: Any) -> int:
    """Falcon's newer blocks cache each key once for every query head."""
    one_head = config.multi_query and not config.new_decoder_architecture
    return 1 if one_head else int(config.num_attention_heads)


def _key_heads_of_bigcode(config: Any) -> int:
    return 1 if config.multi_query else int(config.num_attention_heads)


@dataclass(frozen=True)
class Architecture:
    """One row of the table. Paths are relative to the model, or to a block where a comment says so."""

    model_type: str
    embedding: str  #: token embedding; its output is where traces add noise
    blocks: str  #: the list of blocks
    attention: str  #: within a block: the attention module
    down_proj: str  #: within a block: the MLP's down-projection (the edited weight)
    final_norm: str  #: final normalisation
    lm_head: str  #: output embedding
    #: within a block: the projections that compute queries, keys and values, fused or separate
    attention_projections: tuple[str, ...]
    #: within a block: the modules whose outputs attention and MLP add to the residual stream; empty where these are
    #: `attention` and `down_proj`
    attention_output: str = ""
    mlp_output: str = ""
    block_norm: str = ""  #: within a block: a norm of the block's whole output, after the residual was added
    conv1d: bool = False  #: weights stored (in, out) as in GPT-2's Conv1D, not (out, in) as in nn.Linear
    parallel: bool = False  #: attention and MLP read the same input (GPT-J, GPT-NeoX)
    fused_gate: bool = False  #: one projection computes the MLP's gate and its input
    #: the attention holds a weight for every pair of positions also where it uses torch's fused kernel
    holds_weights: bool = False
    #: the model computes positions from its mask of padding, which must have the shape (rows, positions)
    positions_from_mask: bool = False
    #: an argument of the blocks whose first dimension counts rows times heads
    rows_argument: str = ""
    key_heads: Callable[[Any], int] = field(default=_key_heads, repr=False)  #: heads that the cache stores
    #: changes the row to what a configuration says
    configure: Callable[[Architecture, Any], Architecture] = field(
        default=lambda row, _config: row, repr=False, compare=False
    )


def _configure_opt(row: Architecture, config: Any) -> Architecture:
    """OPT-350m normalises the output of each block, and has no norm before its head."""
    if config.do_layer_norm_before:
        return row
    return replace(row, final_norm="", block_norm="final_layer_norm")


def _configure_parallel(row: Architecture, config: Any) -> Architecture:
    return replace(row, parallel=bool(config.use_parallel_residual))


def _configure_falcon(row: Architecture, config: Any) -> Architecture:
    """Falcon-RW has serial blocks and linear biases; its biases are computed from the mask of padding."""
    parallel = bool(config.new_decoder_architecture or config.parallel_attn)
    return replace(row, parallel=parallel, positions_from_mask=bool(config.alibi))


def _separate(attention: str) -> tuple[str, ...]:
    return tuple(f"{attention}.{name}_proj" for name in "qkv")


def _gpt_like(model_type: str, down_proj: str, projections: tuple[str, ...], **changes: Any) -> Architecture:
    row = Architecture(
        model_type,
        "transformer.wte",
        "transformer.h",
        "attn",
        down_proj,
        "transformer.ln_f",
        "lm_head",
        projections,
    )
    return replace(row, **changes)


def _llama_like(model_type: str, **changes: Any) -> Architecture:
    row = Architecture(
        model_type,
        "model.embed_tokens",
        "model.layers",
        "self_attn",
        "mlp.down_proj",
        "model.norm",
        "lm_head",
        _separate("self_attn"),
    )
    return replace(row, **changes)


def _bloom_like(model_type: str, **changes: Any) -> Architecture:
    row = Architecture(
        model_type,
        "transformer.word_embeddings",
        "transformer.h",
        "self_attention",
        "mlp.dense_4h_to_h",
        "transformer.ln_f",
        "lm_head",
        ("self_attention.query_key_value",),
    )
    return replace(row, **changes)


def _norm_after(model_type: str, attention_norm: str, mlp_norm: str, **changes: Any) -> Architecture:
    """Return the row of a model with a norm after attention and MLP, before each is added to the residual stream."""
    return _llama_like(model_type, attention_output=attention_norm, mlp_output=mlp_norm, **changes)


NEOX = Architecture(
    "gpt_neox",
    "gpt_neox.embed_in",
    "gpt_neox.layers",
    "attention",
    "mlp.dense_4h_to_h",
    "gpt_neox.final_layer_norm",
    "lm_head",
    ("attention.query_key_value",),
    configure=_configure_parallel,
)
OPT = Architecture(
    "opt",
    "model.decoder.embed_tokens",
    "model.decoder.layers",
    "self_attn",
    "fc2",
    "model.decoder.final_layer_norm",
    "lm_head",
    _separate("self_attn"),
    configure=_configure_opt,
)
MPT = Architecture(
    "mpt",
    "transformer.wte",
    "transformer.blocks",
    "attn",
    "ffn.down_proj",
    "transformer.norm_f",
    "lm_head",
    ("attn.Wqkv",),
)
GPT_LIKE = (
    _gpt_like("gpt2", "mlp.c_proj", ("attn.c_attn",), conv1d=True),
    _gpt_like("gptj", "mlp.fc_out", _separate("attn"), parallel=True),
    _gpt_like("gpt_neo", "mlp.c_proj", _separate("attn.attention")),
    _gpt_like("codegen", "mlp.fc_out", ("attn.qkv_proj",), parallel=True),
    _gpt_like("gpt_bigcode", "mlp.c_proj", ("attn.c_attn",), key_heads=_key_heads_of_bigcode),
)
LLAMA_LIKE = (
    *map(_llama_like, ("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3", "gemma", "granite")),
    *map(_llama_like, ("olmo", "nemotron", "ernie4_5", "seed_oss", "helium")),
    _llama_like("glm", fused_gate=True),
    _llama_like("cohere", parallel=True),
    _llama_like("cohere2", parallel=True),
    _llama_like("stablelm", configure=_configure_parallel),
    _llama_like("starcoder2", down_proj="mlp.c_proj"),
    _llama_like("phi", down_proj="mlp.fc2", final_norm="model.final_layernorm", parallel=True),
    _llama_like("phi3", attention_projections=("self_attn.qkv_proj",), fused_gate=True),
    _llama_like(
        "persimmon",
        down_proj="mlp.dense_4h_to_h",
        final_norm="model.final_layernorm",
        attention_projections=("self_attn.query_key_value",),
    ),
    _norm_after("glm4", "post_self_attn_layernorm", "post_mlp_layernorm", fused_gate=True),
    *(
        _norm_after(name, "post_attention_layernorm", "post_feedforward_layernorm")
        for name in ("gemma2", "gemma3_text", "olmo2", "olmo3", "exaone4")
    ),
)
BLOOM_LIKE = (
    # the attention module of BLOOM returns the residual with its own output
    _bloom_like(
        "bloom", attention_output="self_attention.dense", positions_from_mask=True, rows_argument="alibi"
    ),
    _bloom_like("falcon", key_heads=_key_heads_of_falcon, configure=_configure_falcon, holds_weights=True),
)
ARCHITECTURES = {a.model_type: a for a in (*GPT_LIKE, NEOX, OPT, *LLAMA_LIKE, *BLOOM_LIKE, MPT)}


def architecture_of(config: Any) -> Architecture:
    """Return the row of a model's configuration. Raise Misconfigured for a type that is not supported."""
    try:
        row = ARCHITECTURES[config.model_type]
    except KeyError:
        supported = ", ".join(sorted(ARCHITECTURES))
        raise Misconfigured(
            f"models of type {config.model_type!r} are not supported; the types that are: {supported}."
        ) from None
    return row.configure(row, config)
